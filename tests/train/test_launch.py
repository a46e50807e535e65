"""Launching, with a small program in the place of ``python -m shiftconv``."""

import json
import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from shiftconv.train.launch import STOPPED, ProcessFailed, _status, launch

# Does what its first argument names; imports no torch, so that it starts at once.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

folder, rank, restart = Path(sys.argv[2]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]


def tell():
    (folder / f"{rank}.{restart}").write_text(json.dumps([sys.argv[3:], dict(os.environ)]))


def break_off():
    tell()
    if rank == "1" and restart == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def end(first, other):
    sys.exit(first if rank == "0" else other)


def save():
    def note(number, frame):
        time.sleep(0.3)  # it writes a checkpoint
        (folder / f"{rank}.saved").write_text(str(number))
        sys.exit(75)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    tell()
    time.sleep(60)


match sys.argv[1].split("-"):
    case ["tell"]: tell()
    case ["break"]: break_off()
    case ["end", first, other]: end(int(first), int(other))
    case ["killed"]: os.kill(os.getpid(), signal.SIGKILL) if rank == "1" else time.sleep(60)
    case ["save"]: save()
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A folder that is written to; launched processes find the program first."""
    home = tmp_path / "program" / "shiftconv"
    home.mkdir(parents=True)
    (home / "__init__.py").touch()
    (home / "__main__.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(home.parent))
    for name in ("LOGLEVEL", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def told(folder, name):
    return json.loads((folder / name).read_text())


def test_each_process_knows_its_place_and_gets_the_arguments_whole(program, capfd):
    arguments = ["--a b", "$HOME ${local_rank} $$ $", ""]
    before, handlers = dict(os.environ), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    assert launch(2, ["tell", str(program), *arguments]) == 0
    for rank in ("0", "1"):
        given, env = told(program, f"{rank}.0")
        assert given == arguments
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (rank, rank, "2")
        assert env["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))
        assert env["MASTER_ADDR"] == "localhost" and env["TORCHELASTIC_RUN_ID"]
    assert dict(os.environ) == before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    assert capfd.readouterr() == ("", "")


def test_threads_that_are_set_stay(program, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch(1, ["tell", str(program)]) == 0
    assert told(program, "0.0")[1]["OMP_NUM_THREADS"] == "7" == os.environ["OMP_NUM_THREADS"]


def test_all_start_anew_when_one_is_killed(program, capfd):
    assert launch(2, ["break", str(program)], max_restarts=1) == 0
    assert sorted(path.name for path in program.glob("?.?")) == ["0.0", "0.1", "1.0", "1.1"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("does", "text", "status"),
    [
        ("end-0-3", r"process 1 of the 2 .* ended with exit status 3$", 3),
        ("killed", r"process 1 of the 2 .* was killed by SIGKILL; most often memory ran out$", 137),
    ],
)
def test_the_process_that_broke_off_is_named(program, capfd, does, text, status):
    with pytest.raises(ProcessFailed, match=text) as caught:
        launch(2, [does, str(program)])
    assert caught.value.status == status
    assert capfd.readouterr() == ("", "")


def test_processes_that_were_asked_to_stop_are_no_failure(program):
    assert launch(2, ["end-75-75", str(program)]) == STOPPED == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_all_and_they_have_time(program, capfd, number):
    def send():
        end = time.monotonic() + 30
        while len(list(program.glob("?.0"))) < 2:  # torch handles the signal from before it starts them
            if time.monotonic() > end:
                return
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    status = launch(2, ["save", str(program)])
    sender.join()
    assert status == 128 + number
    assert [(program / f"{rank}.saved").read_text() for rank in (0, 1)] == [str(int(number))] * 2
    assert told(program, "0.0")[1]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "120"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([75, 75], "75"),
        ([75, -15], "75"),  # it stopped, too, and was on its way out
        ([75, 3], "process 1 .* exit status 3"),
        ([75, -9], "process 1 .* SIGKILL"),
        ([2, -9], "process 1 .* SIGKILL"),  # the first one only noticed
        ([-15, -15], "process 0 .* SIGTERM"),
        ([2, -15, 2], "process 0 .* exit status 2"),
        ([-11, 2], "process 0 .* SIGSEGV$"),
    ],
)
def test_of_several_ends_the_one_that_explains_the_others_is_told(ends, said):
    try:
        found = str(_status({rank: SimpleNamespace(exitcode=end) for rank, end in enumerate(ends)}, len(ends)))
    except ProcessFailed as error:
        found = str(error)
    assert re.search(said, found), found


def test_counts_are_checked():
    with pytest.raises(ValueError, match="number of processes must be at least 1, got 0"):
        launch(0, [])
    with pytest.raises(TypeError, match="max_restarts must be a whole number"):
        launch(1, [], max_restarts=1.5)  # pyright: ignore[reportArgumentType]
