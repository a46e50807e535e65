"""Reading on when workers die or images cannot be read: what loaders of all kinds have in common."""

import signal
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from shiftconv.train.data.images import BadImage
from shiftconv.train.data.pixels import Patch
from shiftconv.train.data.share import ALL, Share

Batch = tuple[Tensor, Tensor]
RESTARTS = 3  # in an epoch
BAD_SHARE, BAD_READ = 0.1, 100  # more unreadable images stop a run, once so many were read
PREFETCH = 64  # images that a worker reads ahead, about


class MicroBatch(NamedTuple):
    """What a process computes at a time.

    Attributes:
        images: float32 ``[B, 3, H, W]``.
        labels: int64 ``[B]``.
        share: share of the images of the whole update, over all ranks; summed over ranks and micro-batches, share times
            mean loss is the mean loss of the update.
        ends: whether it is the last one of an update on this rank.
    """

    images: Tensor
    labels: Tensor
    share: float
    ends: bool


class Served(NamedTuple):
    """What a worker hands over.

    Attributes:
        batch: images, as a rule uint8, and labels; none if no image of them can be read.
        bad: what could not be read.
        erased: what is still to be erased of each image.
    """

    batch: Batch | None
    bad: list[BadImage]
    erased: Sequence[list[Patch]] = ()


class Serving(ABC):
    """Serves batches whatever becomes of the workers.

    A worker that dies is replaced, at most three times in an epoch; no number changes by it.

    Args:
        batch_size: images per update on all ranks together, at least 1.
        workers: processes that read and transform; 0: this one.
        device: where the images go; for a GPU they are served from pinned memory, or on it; none: the CPU.
        share: the part of this process.
        skip_bad: whether an image that cannot be read is passed over; otherwise it is an error.

    Attributes:
        restarts: how often workers died and were started anew.
        bad: files that could not be read and were skipped, and why.
        tell: called with a sentence about each of both; none: nobody is told.

    Raises:
        ValueError: for a batch size below 1.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        workers: int = 0,
        device: torch.device | None = None,
        share: Share = ALL,
        skip_bad: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.workers, self.share, self.skip_bad = batch_size, workers, share, skip_bad
        self.device, self.pin = device, device is not None and device.type == "cuda"
        self.epoch = self.restarts = 0
        self.bad: dict[Path, str] = {}
        self.tell: Callable[[str], None] | None = None
        self._read = self._unread = 0

    @property
    @abstractmethod
    def images_per_epoch(self) -> int:
        """Images of an epoch, on all ranks together."""

    @property
    def updates(self) -> int:
        """Updates of an epoch."""
        return -(-self.images_per_epoch // self.batch_size)

    def __len__(self) -> int:
        return self.updates

    def start_epoch(self, epoch: int) -> None:
        """From the next iteration on serve the order and the random transforms of this epoch."""
        self.epoch = epoch

    @abstractmethod
    def steps(self, first: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of this rank in this epoch.

        Args:
            first: updates that are done.

        Raises:
            ValueError: if an image cannot be read and must be; if a micro-batch has no readable image, or more than a
                tenth of all cannot be read; for ``first`` outside of 0..updates.
            RuntimeError: if workers die again and again.
        """

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Serve every image once, over all ranks.

        Raises:
            ValueError: if an image cannot be read; names the file.
            RuntimeError: if workers die again and again.
        """

    @abstractmethod
    def finish(self, images: Tensor, erased: Sequence[list[Patch]]) -> Tensor:
        """What is handed over as the network sees it."""

    @property
    def micro_batch(self) -> int:
        """Images of this rank that are computed at a time, at most."""
        return min(-(-self.batch_size // self.share.world), self.share.micro_batch_size or self.batch_size)

    def check_first(self, first: int) -> None:
        if not 0 <= first <= self.updates:
            raise ValueError(f"first must be in 0..{self.updates}, the updates of an epoch, got {first}")

    def serve(self, start: Callable[[int], DataLoader[Any]], cut: Callable[..., Iterator[Served]]) -> Iterator[Batch]:
        """The batches of a DataLoader.

        Args:
            start: makes the DataLoader that goes on after so many batches.
            cut: from what it serves, and that number, to the batches that follow.
        """
        done, deaths = 0, 0
        while True:
            with _quiet_death():
                iterator = iter(start(done))
            try:
                for served in cut(iterator, done):
                    done += 1
                    yield self._good(served)
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not (self.workers and _is_death(error)):
                    raise
                deaths += 1
                self._restart(deaths, error)
            finally:
                if self.workers:  # at once: a traceback may keep the iterator, and the next fork would copy it
                    iterator._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]

    def _good(self, served: Served) -> Batch:
        if served.bad and not self.skip_bad:
            bad = served.bad[0]
            raise ValueError(f"cannot read the image {bad.path}: {bad.reason}; replace or remove it")
        self._unread += len(served.bad)
        self._read += len(served.bad) if served.batch is None else len(served.batch[1])
        for bad in served.bad:
            if bad.path not in self.bad:
                self._say(f"cannot read the image {bad.path}: {bad.reason}; another one takes its place")
            self.bad[bad.path] = bad.reason
        names = ", ".join(str(bad.path) for bad in served.bad[:3])
        if served.batch is None:
            raise ValueError(f"not one image of a micro-batch can be read: {names}; replace or remove them")
        if self._unread > BAD_SHARE * self._read and self._read >= BAD_READ:
            what = f"{self._unread} of the {self._read} images read so far cannot be read"
            raise ValueError(f"{what}, more than {BAD_SHARE:.0%}; the last are {names}")
        images, labels = served.batch
        return self.finish(images, served.erased), labels

    def _restart(self, deaths: int, error: BaseException) -> None:
        if deaths > RESTARTS:
            raise RuntimeError(
                f"processes that read images died {deaths} times in this epoch ({_line(error)}); most often memory, or "
                f"shared memory (/dev/shm; docker: --shm-size), ran out: set data.workers below {self.workers}"
            ) from None
        self.restarts += 1
        self._say(f"a process that reads images died ({_line(error)}); it is started anew, and no number changes")

    def _say(self, text: str) -> None:
        if self.tell is not None:
            self.tell(text)


def _is_death(error: BaseException) -> bool:
    """Whether a worker was killed; what it raised itself says so and is none of it.

    What a dead worker had still to hand over cannot be fetched, an OSError or EOFError of its socket.
    """
    text = str(error)
    if "in DataLoader worker process" in text:
        return False
    return isinstance(error, OSError | EOFError) or text.startswith("DataLoader worker (pid")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet_death() -> Iterator[None]:
    """Keep torch from raising in the midst of whatever the main thread does when a worker dies.

    Its handler of SIGCHLD would; without it the loader finds out when it waits for that worker.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main and hasattr(signal, "SIGCHLD") else None
    # Python >= 3.12 warns of every fork beside threads; a worker only reads images, in one thread.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        yield
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
