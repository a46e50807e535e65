import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shiftconv import files


def test_write_replaces(tmp_path):
    path = tmp_path / "a"
    files.write(path, b"one")
    files.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write(path, b"one")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a: No space left") as caught:
        files.write(path, b"two")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_keeps_the_old_content(tmp_path):
    path, old = tmp_path / "a", tmp_path / "old"
    files.write(path, b"one", keep=old)
    assert not old.exists()
    files.write(path, b"two", keep=old)
    assert (path.read_bytes(), old.read_bytes()) == (b"two", b"one")


def test_sweep(tmp_path):
    (tmp_path / ".last.pt.x1.partial").touch()
    (tmp_path / "mine.partial").touch()
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.partial"]


def test_unwritable_folder_is_reported_with_the_name_of_the_file(tmp_path, monkeypatch):
    def forbidden(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(PermissionError, match=r"cannot write .*a.pt: Permission denied"):
        files.write(tmp_path / "a.pt", b"one")


def test_others_may_read_as_the_system_says(tmp_path):
    files.write(tmp_path / "a", b"one")
    (tmp_path / "b").write_bytes(b"one")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_nothing_is_left_of_what_breaks_off(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "a") as file:
        file.write(b"two")
        raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"one")]


@pytest.mark.parametrize("kernel", ["copies", "cannot", "has no such call", "breaks off", "says that it has done so"])
def test_copy(tmp_path, monkeypatch, kernel):
    def cannot(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def breaks_off(old, new, count):
        if os.lseek(old, 0, os.SEEK_CUR):
            cannot()
        return os.write(new, os.read(old, 1000))

    if kernel == "has no such call":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif kernel != "copies":
        way = {"cannot": cannot, "breaks off": breaks_off}.get(kernel, lambda *_: 0)
        monkeypatch.setattr(os, "copy_file_range", way, raising=False)
    content = os.urandom(100_001)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"old")
    files.copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == content
    with pytest.raises(FileNotFoundError):
        files.copy(tmp_path / "nowhere", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


CHILD = """
import os, sys
from pathlib import Path
from shiftconv import files

def held():
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # that of the listing itself
            pass
    return sum(files.SUFFIX in link for link in links)

with files.replacing(Path(sys.argv[1])) as file:
    child = os.fork()
    if child == 0:
        os._exit(held())
    print(held(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not show open files")
def test_children_hold_no_file_that_is_being_written(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "0"], done.stderr
