"""What this process is among those that train together, how they talk, and when they stop.

Messages between the CPUs go over gloo, those between GPUs over NCCL. Of a multi-machine run without InfiniBand the
variables GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface, should the first one be the wrong one.
"""

import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

TIMEOUT_S = "SHIFTCONV_TIMEOUT_S"  # environment: seconds that a process waits for the others; 600 unless set
LAUNCHER_GONE = "the launcher is gone"
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
_GONE_NUMBER = 1000  # among the numbers of signals
_LEAVE_S = 3.0  # after an error

# What gloo, the store and NCCL say of a peer that died, left or hangs; they raise RuntimeError for all else as well.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed out waiting|socket timeout|pair closure|"
    r"connect(ion)? time(d )?out|wait timeout|ncclRemoteError|remote process exited|ncclSystemError|"
    r"NCCL communicator (was )?aborted|watchdog caught collective|recvValue failed|failed to recv",
    re.IGNORECASE,
)


class LostRank(RuntimeError):
    """Another process of the run is gone, or does not answer any more."""


@dataclass(frozen=True)
class Ranks:
    """One process among ``world``.

    Attributes:
        rank: its number, 0..world-1.
        world: how many there are, on all machines.
        local_rank: its number among those of its machine, which is that of its GPU.
        restarts: how often all have been started anew, by torchrun or by Slurm.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    restarts: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0


def environment_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """What torchrun, or else Slurm's srun, says that this process is; alone if neither started it.

    An sbatch script and an interactive shell of Slurm are one process, whatever number of tasks was asked for.

    Raises:
        ValueError: for variables that are set in part, are no numbers or contradict each other.
    """
    given = [name for name in _TORCHRUN if name in env]
    if given:
        missing = [name for name in _TORCHRUN if name not in env]
        if missing:
            what = f"{', '.join(given)} set, but {', '.join(missing)} not"
            raise ValueError(f"a launcher sets all of {', '.join(_TORCHRUN)}; found {what}")
        return _ranks(env, *_TORCHRUN, "TORCHELASTIC_RESTART_COUNT")
    world = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if "SLURM_STEP_ID" not in env or world not in env or _whole(env, world) <= 1:
        return Ranks()
    names = ("SLURM_PROCID", world, "SLURM_LOCALID")
    missing = [name for name in names if name not in env]
    if missing:
        raise ValueError(f"srun sets all of {', '.join(names)}; not set: {', '.join(missing)}")
    return _ranks(env, *names, "SLURM_RESTART_COUNT")


def _ranks(env: Mapping[str, str], rank: str, world: str, local_rank: str, restarts: str) -> Ranks:
    ranks = Ranks(_whole(env, rank), _whole(env, world), _whole(env, local_rank), _whole(env, restarts, "0"))
    if not ranks.local_rank <= ranks.rank < ranks.world:
        what = f"{rank}={ranks.rank}, {world}={ranks.world}, {local_rank}={ranks.local_rank}"
        raise ValueError(f"expected {local_rank} <= {rank} < {world}, got {what}")
    return ranks


def _whole(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default) or ""
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def launcher(env: Mapping[str, str] = os.environ) -> str | None:
    """What is the same for all that one torchrun, or one job of Slurm, starts, and starts anew; none: nobody did."""
    if "TORCHELASTIC_RUN_ID" in env:
        name = env["TORCHELASTIC_RUN_ID"]
        return f"torchrun {os.getppid() if name == 'none' else name}"  # none: one was not asked for
    return f"slurm {env['SLURM_JOB_ID']}" if "SLURM_STEP_ID" in env and "SLURM_JOB_ID" in env else None


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """Where this process computes: on the CPU, or on the GPU that has its local rank's number.

    Raises:
        ValueError: if there are more processes than GPUs on this machine, or all were to take one GPU.
    """
    if device.type != "cuda" or ranks.world == 1:
        return device
    if device.index is not None:
        raise ValueError(f"each of {ranks.world} processes takes its own GPU: expected device cuda, got {device}")
    count = torch.cuda.device_count()
    if count == 1 and "LOCAL_RANK" not in os.environ:
        return torch.device("cuda", 0)  # Slurm may show each task its own GPU only
    if ranks.local_rank >= count:
        what = f"process {ranks.local_rank} of this machine (counted from 0) finds {count}"
        raise ValueError(f"each process needs a GPU of its own, but {what}; start fewer processes or use device cpu")
    return torch.device("cuda", ranks.local_rank)


def hosts(nodes: str) -> list[str]:
    """The names in a list of nodes as Slurm writes it, such as ``node[03-05,9],login1``.

    Raises:
        ValueError: if it is no such list.
    """
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes):
        begun = [""]
        for plain, inner in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item):
            begun = [start + end for start in begun for end in ([plain] if plain else _numbers(inner, nodes))]
        names += begun
    if not names or nodes.count("[") != nodes.count("]"):
        raise ValueError(f"expected a list of nodes such as node[03-05,9],login1, got {nodes!r}")
    return names


def _numbers(inner: str, nodes: str) -> list[str]:
    numbers: list[str] = []
    for part in inner.split(","):
        low, _, high = part.partition("-")
        if not low.isdecimal() or (high and not high.isdecimal()):
            raise ValueError(f"expected numbers such as 03-05,9 in the brackets of a list of nodes, got {nodes!r}")
        numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
    return numbers


def _meeting_point(env: Mapping[str, str]) -> str:
    """Where all processes find the first one, as an address that torch knows."""
    if "RANK" in env:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise ValueError(
                f"RANK and WORLD_SIZE need {' and '.join(missing)}, which torchrun sets; start by torchrun"
            )
        return "env://"  # torchrun's own store, which outlives a restart, is found by more variables than two
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    host = env.get("MASTER_ADDR") or hosts(nodes)[0]
    # Jobs and steps that share a node need ports of their own; those from 32768 on are given to anybody.
    port = 20000 + (31 * _whole(env, "SLURM_JOB_ID") + _whole(env, "SLURM_STEP_ID")) % 12000
    return f"tcp://{host}:{env.get('MASTER_PORT') or port}"


def timeout(env: Mapping[str, str] = os.environ) -> timedelta:
    """How long a process waits for the others before it takes them for lost: SHIFTCONV_TIMEOUT_S seconds, or 600.

    Raises:
        ValueError: if that is no number above 0.
    """
    text = env.get(TIMEOUT_S, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise ValueError(f"{TIMEOUT_S} must be a number of seconds above 0, got {text!r}")
    return timedelta(seconds=seconds)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Within the block this process and the others are a group, torch's default one, and ``own_device`` is current.

    A default group that is there already is used, and stays. A process alone makes none.

    Args:
        device: kind of device that all compute on.

    Raises:
        ValueError: for an environment that no launcher makes, or too few GPUs.
        LostRank: if the others do not come.
    """
    ranks = environment_ranks()
    if dist.is_available() and dist.is_initialized():
        yield _of_group(ranks)
        return
    if ranks.world == 1:
        yield ranks
        return
    if device.type == "cuda":
        torch.cuda.set_device(own_device(device, ranks))
    where, wait = _meeting_point(os.environ), timeout()
    try:
        store, *_ = next(rendezvous(where, ranks.rank, ranks.world, timeout=wait))
        # A restart finds the same store of torchrun again, with the addresses of the processes before it.
        store = distributed_c10d.PrefixStore(f"shiftconv/{ranks.restarts}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=wait)
    except RuntimeError as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if where == "env://" else where
        limit = f"each waits {wait.total_seconds():g} s, which {TIMEOUT_S} sets"
        raise LostRank(f"{ranks.world} processes did not meet at {at} ({_reason(error)}); {limit}") from error
    try:
        yield ranks
    except BaseException:
        _leave()
        raise
    dist.destroy_process_group()


def _of_group(ranks: Ranks) -> Ranks:
    """What this process is in the default group, which somebody has made."""
    backends = distributed_c10d.get_backend_config()
    if "cpu:" not in backends:
        raise ValueError(
            f"the default process group needs a backend of the CPU, as cpu:gloo,cuda:nccl; it has {backends}"
        )
    rank, world = dist.get_rank(), dist.get_world_size()
    local = ranks.local_rank if (ranks.rank, ranks.world) == (rank, world) else rank
    return Ranks(rank, world, local, ranks.restarts)


def _leave() -> None:
    """Leave the group without the others: torch waits for messages under way, which may never come."""

    def destroy() -> None:
        with suppress(Exception):  # the error that made us leave is the one to tell
            dist.destroy_process_group()

    thread = threading.Thread(target=destroy, daemon=True)
    thread.start()
    thread.join(_LEAVE_S)


@contextmanager
def peers() -> Iterator[None]:
    """Within the block the many errors by which torch tells of a lost process are one, LostRank; others pass."""
    try:
        yield
    except RuntimeError as error:
        if lost(error):
            advice = "start again with --resume auto, or let torchrun do it with --max-restarts"
            raise LostRank(f"another process of this run is gone or hangs ({_reason(error)}); {advice}") from error
        raise


def lost(error: BaseException) -> bool:
    """Whether an error of torch says that another process is gone or hangs."""
    return isinstance(error, RuntimeError) and not isinstance(error, LostRank) and bool(_LOST.search(str(error)))


def _reason(error: BaseException) -> str:
    """What torch says, without its files, stack and advice."""
    text = re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", str(error)).partition("\n")[0]
    text = " ".join(text.partition(" This is typically")[0].split())
    return text if len(text) <= 160 else f"{text[:160]} ..."


def sum_over(values: Sequence[float], ranks: Ranks) -> list[float]:
    """The sum of each number over all processes, in float64; the same bits on all of them.

    Raises:
        LostRank: if another process is gone.
    """
    if ranks.world == 1 or not values:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with peers():
        dist.all_reduce(sums)
    return sums.tolist()


def broadcast_object(value: Any, ranks: Ranks) -> Any:
    """The first process's value, on all of them; it must be one that pickle takes. Others may give anything.

    Raises:
        LostRank: if another process is gone.
    """
    if ranks.world == 1:
        return value
    held = [value if ranks.first else None]
    with peers():
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]


def barrier(ranks: Ranks) -> None:
    """Wait until all processes are here.

    Raises:
        LostRank: if another process is gone.
    """
    sum_over([0.0], ranks)  # dist.barrier would take NCCL, and the GPU with it


class StopRequest:
    """Somebody wants this run to stop in an orderly way: by a signal, or because the launcher of all processes died.

    Within its block SIGTERM (a system that shuts down), SIGINT (Ctrl-C), SIGUSR1 (Slurm, before the time is up) and
    SIGHUP (a lost terminal, unless ignored, as under nohup) only leave a note; a second SIGINT raises
    KeyboardInterrupt. Processes that are forked within the block, as those that read images, inherit this. In another
    thread than the main one no signal is handled.
    """

    def __init__(self) -> None:
        self._first: int | None = None  # the first signal
        self._interrupts = 0
        self._agreed: int | None = None  # what all processes know
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None
        self._before: dict[int, Any] = {}
        self._parent = os.getppid()
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> Self:
        self._parent = os.getppid()
        if threading.current_thread() is threading.main_thread():
            for name in _STOP_SIGNALS:
                number = signal.Signals.__members__.get(name)  # Windows has not all of them
                if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    continue
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._under_way = None
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._first = self._first or number
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt

    def _own(self) -> int:
        if self._first is None and self._launched and os.getppid() != self._parent:
            return _GONE_NUMBER
        return self._first or 0

    def asked(self, ranks: Ranks) -> str | None:
        """Who wants the run to stop, by now: a signal's name or ``the launcher is gone``; none: nobody.

        Of several processes each calls it once per update, and all have the same answer at the same update. It is that
        to the call before, for the message travels meanwhile: nobody waits for it, nor for a GPU.

        Raises:
            LostRank: if another process is gone.
        """
        if ranks.world == 1:
            self._agreed = self._own() or None
        elif self._agreed is None:
            answer = 0
            with peers():
                if self._under_way is not None:
                    work, number = self._under_way
                    work.wait()
                    answer = int(number)
                self._agreed, self._under_way = answer or None, None
                if self._agreed is None:
                    number = torch.tensor([self._own()])
                    work = dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
                    self._under_way = (work, number) if work is not None else None
        if self._agreed is None:
            return None
        return LAUNCHER_GONE if self._agreed == _GONE_NUMBER else signal.Signals(self._agreed).name
