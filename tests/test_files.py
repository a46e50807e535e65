import errno
import os

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
    def forbidden(**settings):
        raise PermissionError(errno.EACCES, "Permission denied", str(settings["dir"]))

    monkeypatch.setattr(files.tempfile, "mkstemp", forbidden)
    with pytest.raises(PermissionError, match=r"cannot write .*a.pt: Permission denied"):
        files.write(tmp_path / "a.pt", b"one")
