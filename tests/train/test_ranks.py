"""One process among others: who it is, what it hears from them, when all stop. Pairs of processes talk on localhost."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from shiftconv.train import ranks as module
from shiftconv.train.ranks import (
    LAUNCHER_GONE,
    TIMEOUT_S,
    LostRank,
    Ranks,
    StopRequest,
    barrier,
    broadcast_object,
    environment_ranks,
    hosts,
    joined,
    lost,
    own_device,
    peers,
    sum_over,
    timeout,
)

CPU = torch.device("cpu")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "5", "SLURM_JOB_ID": "4711"}

# Both processes of a pair talk, then one leaves; what each has heard is printed as two lines of JSON.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

import torch
import torch.distributed as dist

from shiftconv.train import ranks as module
from shiftconv.train.ranks import LostRank, StopRequest, barrier, broadcast_object, joined, peers, sum_over

folder, CPU = Path(sys.argv[1]), torch.device("cpu")
torch.set_num_threads(1)


def wait_for(name):
    end = time.monotonic() + 20
    while not (folder / name).exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def talk():
    with joined(CPU) as ranks:
        told = {"ranks": [ranks.rank, ranks.world, ranks.local_rank]}
        told["sums"] = sum_over([ranks.rank + 0.1, 2.0**60 + 256 * ranks.rank], ranks)
        told["object"] = broadcast_object({"a": [1, None]} if ranks.first else Path("unused"), ranks)
        start = time.monotonic()
        time.sleep(0.3 * ranks.rank)
        barrier(ranks)
        told["waited"] = time.monotonic() - start
        with StopRequest() as stop:
            answers = []
            for update in range(60):
                if ranks.rank == 1 and update == 40:
                    os.kill(os.getpid(), signal.SIGUSR1)
                if ranks.rank == 0 and update == 41:
                    os.kill(os.getpid(), signal.SIGINT)
                answers.append(stop.asked(ranks))
                sum_over([1.0], ranks)
            told["answers"] = answers
    told["left"] = not dist.is_initialized()
    return told


def leave():
    module._LEAVE_S = 0.5
    with joined(CPU) as ranks, StopRequest() as stop:
        barrier(ranks)
        if ranks.first:
            stop.asked(ranks)  # a message that the other one does not answer
            (folder / "raised").write_text(str(time.time()))
            raise ValueError("mine")
        wait_for("ended")
        try:
            for _ in range(3):
                sum_over([1.0], ranks)
        except LostRank as error:
            return str(error)


print(json.dumps(talk()), flush=True)
os.environ["MASTER_PORT"] = os.environ["NEXT"]
print(json.dumps(leave()))
"""


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(folder, *envs):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC")) and k not in TORCHRUN}
    clean["OMP_NUM_THREADS"] = "1"
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)],
            env=clean | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for env in envs
    ]


@pytest.fixture
def pair():
    """Start a pair of processes, which live no longer than the test."""
    started = []

    def run(*arguments):
        started.extend(start(*arguments))
        return started

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "TORCHELASTIC", "MASTER")) or name in (*TORCHRUN, TIMEOUT_S):
            monkeypatch.delenv(name)
    return monkeypatch


def without(values, *names):
    return {k: v for k, v in values.items() if k not in names}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Ranks()),
        (TORCHRUN, Ranks(3, 8, 1, 2)),
        (without(TORCHRUN, "TORCHELASTIC_RESTART_COUNT") | SLURM, Ranks(3, 8, 1)),
        (SLURM, Ranks(5, 16, 5)),
        (SLURM | {"SLURM_RESTART_COUNT": "3"}, Ranks(5, 16, 5, 3)),
        (without(SLURM, "SLURM_STEP_ID"), Ranks()),  # the sbatch script itself
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, Ranks()),  # a shell in an allocation of 16 tasks
        (SLURM | {"SLURM_NTASKS": "1"}, Ranks()),
    ],
)
def test_the_launcher_says_who_a_process_is(env, expected):
    assert environment_ranks(env) == expected
    assert expected.first == (expected.rank == 0)


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (without(TORCHRUN, "LOCAL_RANK"), "RANK, WORLD_SIZE set, but LOCAL_RANK not"),
        ({"WORLD_SIZE": "2"}, "but RANK, LOCAL_RANK not"),
        (TORCHRUN | {"RANK": "x"}, "RANK must be a whole number, got 'x'"),
        (TORCHRUN | {"RANK": ""}, "RANK must be a whole number, got ''"),
        (TORCHRUN | {"RANK": "8"}, "expected LOCAL_RANK <= RANK < WORLD_SIZE, got RANK=8, WORLD_SIZE=8, LOCAL_RANK=1"),
        (without(SLURM, "SLURM_LOCALID"), "not set: SLURM_LOCALID"),
        (SLURM | {"SLURM_PROCID": "16"}, "SLURM_PROCID=16"),
    ],
)
def test_an_environment_that_no_launcher_makes_is_told(env, text):
    with pytest.raises(ValueError, match=text):
        environment_ranks(env)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("login1", ["login1"]),
        ("node[03-05,9],other1", ["node03", "node04", "node05", "node9", "other1"]),
        ("a1,b[098-101]", ["a1", "b098", "b099", "b100", "b101"]),
        ("rack[1-2]n[0,7]-ib", ["rack1n0-ib", "rack1n7-ib", "rack2n0-ib", "rack2n7-ib"]),
        ("gpu-a-[7]", ["gpu-a-7"]),
    ],
)
def test_hosts(nodes, expected):
    assert hosts(nodes) == expected


@pytest.mark.parametrize("nodes", ["", "a[1-2", "a[x]", "a[1-]b[", "a[]"])
def test_what_is_no_list_of_nodes_is_told(nodes):
    with pytest.raises(ValueError, match=r"expected .* of nodes"):
        hosts(nodes)


def test_slurm_processes_meet_at_the_first_host():
    env = SLURM | {"SLURM_JOB_NODELIST": "node[3-4]"}
    assert module._meeting_point(env) == f"tcp://node3:{20000 + 31 * 4711 % 12000}"
    assert module._meeting_point(env | {"SLURM_STEP_NODELIST": "node4"}).startswith("tcp://node4:")
    assert module._meeting_point(env | {"SLURM_STEP_ID": "1"}) != module._meeting_point(env)
    assert module._meeting_point(env | {"MASTER_ADDR": "a", "MASTER_PORT": "7"}) == "tcp://a:7"
    with pytest.raises(ValueError, match="need MASTER_PORT, which torchrun sets"):
        module._meeting_point(TORCHRUN | {"MASTER_ADDR": "a"})


def test_how_long_others_are_waited_for():
    assert timeout({}).total_seconds() == 600
    assert timeout({TIMEOUT_S: "1.5"}).total_seconds() == 1.5
    for wrong in ("", "0", "-1", "nan", "inf", "ten"):
        with pytest.raises(ValueError, match="SHIFTCONV_TIMEOUT_S must be a number of seconds above 0"):
            timeout({TIMEOUT_S: wrong})


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3131",
        "[../gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:3: Connection reset by peer",
        "[../gloo/transport/tcp/pair.cc:534] writev [127.0.0.1]:3: Broken pipe",
        "[/pytorch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, NCCL version 2.27",
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_what_torch_says_of_a_lost_process_is_one_error(text):
    assert lost(RuntimeError(text)) and lost(dist.DistBackendError(text))
    told = r"gone or hangs \((?!\[)[^\n]*\); start again with --resume auto, [^\n]*$"
    with pytest.raises(LostRank, match=told), peers():
        raise RuntimeError(text + ". This is typically caused by ...\nC++ CapturedCallStack:\n#1 ...")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("Expected all tensors to be on the same device"),
        dist.DistBackendError("NCCL error: invalid usage. Duplicate GPU detected : rank 0 and rank 1"),
        ConnectionResetError("Connection reset by peer"),
        ValueError("Connection closed by peer"),
        LostRank("timed out waiting"),
    ],
)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, peers():
        raise error
    assert caught.value is error and not lost(error)


def test_a_process_alone_makes_no_group(environment):
    with joined(CPU) as ranks:
        assert ranks == Ranks() and not dist.is_initialized()
        assert sum_over([1.5, 2], ranks) == [1.5, 2] and broadcast_object(environment, ranks) is environment
        barrier(ranks)
        assert own_device(torch.device("cuda", 3), ranks) == torch.device("cuda", 3)


def test_a_group_that_is_there_is_used_and_stays(environment):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(KeyError), joined(CPU) as ranks:
            assert ranks == Ranks()
            raise KeyError
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_who_waits_in_vain_is_told(environment):
    for name, value in (without(TORCHRUN, "RANK") | {"RANK": "1", TIMEOUT_S: "1"}).items():
        environment.setenv(name, value)
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    environment.setenv("MASTER_PORT", port())
    told = r"8 processes did not meet at 127\.0\.0\.1:\d+ \(.*\); each waits 1 s"
    with pytest.raises(LostRank, match=told), joined(CPU):
        pytest.fail("nobody is there")
    assert not dist.is_initialized()


def test_a_restart_does_not_read_what_the_processes_before_it_wrote(environment):
    shared, keys = dist.HashStore(), []  # torchrun's, which outlives them
    for name, value in (TORCHRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}).items():
        environment.setenv(name, value)
    environment.setattr(module, "rendezvous", lambda *_, **__: iter([(shared, 3, 8)]))
    environment.setattr(dist, "init_process_group", lambda *_, store, **__: store.set("key", str(len(keys))))
    environment.setattr(dist, "destroy_process_group", lambda: None)
    for restart in ("0", "1"):
        environment.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        with joined(CPU) as ranks:
            keys.append((ranks.restarts, shared.get(f"shiftconv/{restart}/key")))
    assert keys == [(0, b"0"), (1, b"1")]


def test_each_process_has_its_own_gpu(environment):
    cuda, third = torch.device("cuda"), Ranks(3, 4, 3)
    environment.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device(cuda, third) == torch.device("cuda", 3) and own_device(CPU, third) == CPU
    with pytest.raises(ValueError, match="expected device cuda, got cuda:1"):
        own_device(torch.device("cuda", 1), third)
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"process 3 of this machine \(counted from 0\) finds 2"):
        own_device(cuda, third)
    environment.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_device(cuda, third) == torch.device("cuda", 0)  # Slurm shows it no other
    environment.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match="finds 1"):
        own_device(cuda, third)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_the_first_signal_asks_to_stop_and_handlers_are_put_back(environment, name):
    number = signal.Signals[name]
    before = {n: signal.getsignal(n) for n in signal.Signals if n not in (signal.SIGKILL, signal.SIGSTOP)}
    with StopRequest() as stop:
        assert stop.asked(Ranks()) is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked(Ranks()) == name == stop.asked(Ranks())
    assert before == {n: signal.getsignal(n) for n in before}


def test_a_second_interrupt_stops_at_once(environment):
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked(Ranks()) == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it was heard")


def test_a_hang_up_that_is_ignored_stays_so(environment):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked(Ranks()) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_no_signal_is_handled(environment):
    seen = []

    def work():
        with StopRequest() as stop:
            seen.extend([stop.asked(Ranks()), signal.getsignal(signal.SIGUSR1)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, signal.getsignal(signal.SIGUSR1)]


@pytest.mark.parametrize("launched", [True, False])
def test_a_launcher_that_dies_asks_to_stop(environment, launched):
    if launched:
        environment.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopRequest() as stop:
        assert stop.asked(Ranks()) is None
        environment.setattr(os, "getppid", lambda: 1)
        assert stop.asked(Ranks()) == (LAUNCHER_GONE if launched else None)


def test_a_pair_talks_and_stops_at_the_same_update_and_who_fails_leaves_at_once(pair, tmp_path):
    slurm = SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port(), "NEXT": port()}
    first, other = pair(tmp_path, *(slurm | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in (0, 1)))
    heard, error = first.communicate(timeout=60)
    took = time.time() - float((tmp_path / "raised").read_text())
    assert error.rstrip().endswith("ValueError: mine") and took < 20, error  # it takes a second on an idle machine
    (tmp_path / "ended").touch()
    told, error = other.communicate(timeout=60)
    assert error == "" and "another process of this run is gone or hangs" in told.splitlines()[1]

    one, two = (json.loads(text.splitlines()[0]) for text in (heard, told))
    assert (one["ranks"], two["ranks"]) == ([0, 2, 0], [1, 2, 1])
    assert one["sums"] == two["sums"] == [1.2000000000000002, 2.0**61 + 256]
    assert one["object"] == two["object"] == {"a": [1, None]}
    assert one["waited"] >= 0.25 and one["left"] and two["left"]
    assert one["answers"] == two["answers"] == [None] * 41 + ["SIGUSR1"] * 19
