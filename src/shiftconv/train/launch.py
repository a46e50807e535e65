"""Start a run as several processes of this machine, by the parts of torchrun. Imports no torch before it launches."""

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shiftconv.train.checks import integer
from shiftconv.train.endings import STOPPED

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
_SHUTDOWN_S = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # before torch 2.12 it is always 30 seconds


class ProcessFailed(RuntimeError):
    """A process of the run broke off, and could not be started anew.

    Attributes:
        status: its exit status, or 128 and the number of the signal that killed it.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def launch(processes: int, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Run ``python -m shiftconv ARGUMENTS`` in so many processes that find each other, and wait for them.

    Each computes with its share of the cores, unless OMP_NUM_THREADS is set. A signal to this process goes on to
    them, and they have 120 seconds to write a checkpoint (TORCH_ELASTIC_SHUTDOWN_TIMEOUT sets another time). They write
    to this process's output themselves.

    Args:
        processes: how many, at least 1; on GPUs at most one for each.
        arguments: what follows ``shiftconv`` on the command line.
        max_restarts: how often all are started anew if one breaks off.

    Returns:
        The exit status: 0; STOPPED if the processes were asked to stop; 128 and the number of the signal that this
        process got.

    Raises:
        ValueError, TypeError: for a number of processes or restarts that cannot be.
        ProcessFailed: if a process broke off once too often.
    """
    integer("the number of processes", processes, 1)
    integer("max_restarts", max_restarts, 0)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    heeded = [name for name in _SIGNALS if _heeded(name)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    with (
        tempfile.TemporaryDirectory(prefix="shiftconv-") as logs,
        _environment({"OMP_NUM_THREADS": str(threads), _SHUTDOWN_S: "120"}),
        _signals_put_back(heeded),
        _quiet(),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",  # not each machine's own name leads anywhere
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle=",".join(heeded),
        )
        command = ["-m", "shiftconv", *(argument.replace("$", "$$") for argument in arguments)]  # torch fills in $NAMEs
        try:
            elastic_launch(config, sys.executable)(*command)
        except SignalException as stopped:
            return 128 + stopped.sigval
        except ChildFailedError as error:
            return _status(error.failures, processes)
    return 0


def _status(failures: dict[int, Any], processes: int) -> int:
    """STOPPED if that is what all ended with; else the error that tells of the first one."""
    ends = {rank: failure.exitcode for rank, failure in failures.items()}
    if all(end in (STOPPED, -signal.SIGTERM) for end in ends.values()) and STOPPED in ends.values():
        return STOPPED
    # All that noticed the loss of another one ended too, perhaps within the same second; torch then sends SIGTERM.
    order = sorted(ends, key=lambda rank: (ends[rank] in (STOPPED, -signal.SIGTERM), ends[rank] >= 0, rank))
    rank, end = order[0], ends[order[0]]
    what = f"process {rank} of the {processes} of this run (counted from 0)"
    if end >= 0:
        raise ProcessFailed(f"{what} ended with exit status {end}", end)
    known = {int(number): number.name for number in signal.Signals}
    hint = "; most often memory ran out" if end == -signal.SIGKILL else ""
    raise ProcessFailed(f"{what} was killed by {known.get(-end, f'signal {-end}')}{hint}", 128 - end)


def _heeded(name: str) -> bool:
    number = signal.Signals.__members__.get(name)  # Windows has not all of them
    return number is not None and signal.getsignal(number) != signal.SIG_IGN  # nohup ignores SIGHUP


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Within the block these variables are set, for processes that start in it; those that are set already stay."""
    before = dict(os.environ)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _signals_put_back(names: Sequence[str]) -> Iterator[None]:
    """Torch leaves its own handlers, and installs none outside of the main thread."""
    main = threading.current_thread() is threading.main_thread()
    before = {name: signal.getsignal(signal.Signals[name]) for name in names if main}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], signal.SIG_DFL if handler is None else handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's launcher warns of each signal and failure, which we tell in one line; LOGLEVEL brings it back."""
    if "LOGLEVEL" in os.environ:
        yield
        return
    logger = logging.getLogger("torch.distributed.elastic")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(logger.name)]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
