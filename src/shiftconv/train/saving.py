"""Saving while training goes on: a copy of the state is taken at once, and written by a thread of its own."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Thread

import numpy as np
import torch
from torch import Tensor, nn
from torch.storage import UntypedStorage

from shiftconv.train.checkpoint import Checkpoint

_SLAB = 1 << 27  # bytes; torch rounds pinned memory up to a power of two
_PIECE = 1 << 24  # bytes that a thread copies at a time
_ALIGNMENT = 64
_THREADS = min(4, os.cpu_count() or 1)  # more gain nothing, for memory is no faster
_Key = tuple[torch.device, int, int]
_Batch = list[tuple[np.ndarray, np.ndarray]]


class Memory:
    """The CPU's memory for one snapshot at a time; kept, for new pages cost several times what the copying does."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._pinned = False

    def take(self, sizes: Sequence[int], pinned: bool = False) -> list[Tensor]:
        """Bytes (uint8, [size]) for each size, as a storage of its own; what was taken before is given up.

        Args:
            sizes: numbers of bytes.
            pinned: whether CUDA devices are to copy into it without waiting.
        """
        if pinned != self._pinned:
            self._slabs, self._pinned = [], pinned
        left, used, number = sum(map(_aligned, sizes)), 0, -1
        pieces: list[Tensor] = []
        for size in sizes:
            if size and (number < 0 or used + size > len(self._slabs[number])):
                number, used = number + 1, 0
                self._fit(number, max(size, min(_SLAB, left)))
            pieces.append(self._piece(number, used, size))
            used, left = used + _aligned(size), left - _aligned(size)
        del self._slabs[number + 1 :]
        return pieces

    def reserve(self, sizes: Sequence[int], pinned: bool = False) -> None:
        """Have the system give the memory now that ``take`` with these arguments is going to need."""
        self.take(sizes, pinned)
        for slab in [] if pinned else self._slabs:
            for start in range(0, len(slab), _PIECE):
                slab.numpy()[start : start + _PIECE].fill(0)

    def _fit(self, number: int, size: int) -> None:
        if number < len(self._slabs) and len(self._slabs[number]) >= size:
            return
        if self._pinned:
            slab = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            slab = torch.from_numpy(np.empty(size, np.uint8))  # NumPy asks for huge pages, whose first use is cheaper
        self._slabs[number : number + 1] = [slab]

    def _piece(self, number: int, start: int, size: int) -> Tensor:
        if size == 0:  # torch.save takes storages at one address for one
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_numpy(self._slabs[number].numpy()[start : start + size])


def snapshot(checkpoint: Checkpoint, memory: Memory | None = None) -> Checkpoint:
    """A copy of all that a checkpoint holds, its tensors on the CPU; what shares memory goes on sharing it.

    Args:
        checkpoint: of plain values and dense tensors on any devices.
        memory: where the tensors go; the snapshot that was taken there before is overwritten. None: new memory.

    Raises:
        TypeError: if it holds tensors of other kinds.
    """
    tensors = list(_tensors(vars(checkpoint)))
    storages = {_key(tensor): tensor.untyped_storage() for tensor in tensors}
    pieces = (memory or Memory()).take(*_needs(storages.values()))
    _copy(list(zip(map(_bytes, storages.values()), pieces, strict=True)))
    there = dict(zip(storages, pieces, strict=True))
    memo = {id(tensor): _like(tensor, there[_key(tensor)]) for tensor in tensors}  # deepcopy takes these as they are
    return Checkpoint(**deepcopy(vars(checkpoint), memo))


def needs(checkpoint: Checkpoint) -> tuple[list[int], bool]:
    """What ``Memory`` is going to be asked for a snapshot: sizes in bytes, and whether pinned."""
    return _needs({_key(tensor): tensor.untyped_storage() for tensor in _tensors(vars(checkpoint))}.values())


class Writer:
    """Does one job at a time in the background, in a thread that ends with it, so that none is left waiting."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the job before, and start this one.

        Raises:
            BaseException: what the job before raised; this one is not started then.
        """
        self.wait()
        self._thread = Thread(target=self._run, args=(job,), name="shiftconv writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the job.

        Raises:
            BaseException: what it raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # told to who asks next
            self._error = error


class Saver:
    """Keeps a run's checkpoints in the background, and the run going when the disk takes none.

    At most one snapshot is in memory. Only if the best one could not be written it stays there beside the next ones,
    until it is written with one of them or there is a better one.

    Args:
        write: writes a checkpoint, and the one to keep as the best; none: that is kept already. Called in a thread.
        tell: takes one sentence when ``write`` has raised an OSError; called in the caller's thread.
    """

    def __init__(self, write: Callable[[Checkpoint, Checkpoint | None], None], tell: Callable[[str], None]) -> None:
        self._write, self._tell = write, tell
        self._writer, self._memory = Writer(), Memory()
        self._taken: Checkpoint | None = None  # the newest snapshot, in ``_memory``
        self._owed: Checkpoint | None = None  # the best one, as long as it is not written
        self._failure: OSError | None = None  # why the newest one is not written

    def prepare(self, checkpoint: Checkpoint) -> None:
        """Take the memory for checkpoints like this one in the background."""
        sizes, pinned = needs(checkpoint)
        self._settle()
        self._writer.submit(lambda: self._memory.reserve(sizes, pinned))

    def save(self, checkpoint: Checkpoint, *, is_best: bool) -> None:
        """Wait for the save before, copy the checkpoint, and write the copy in the background."""
        self._settle()
        if self._owed is not None and self._owed is self._taken:
            self._memory = Memory()
        self._taken = self._failure = None
        taken = self._taken = snapshot(checkpoint, self._memory)
        self._writer.submit(lambda: self._job(taken, is_best))

    def _job(self, checkpoint: Checkpoint, is_best: bool) -> None:
        if is_best:
            self._owed = checkpoint
        self._write(checkpoint, self._owed)
        self._owed = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.busy

    def look(self) -> None:
        """Tell what there is to tell; waits for nothing."""
        if not self.busy:
            self._settle()

    def wait(self) -> None:
        """Wait until the newest checkpoint is written.

        Raises:
            OSError: if it could not be.
        """
        self._settle()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait, and give the memory back. An OSError is told only."""
        try:
            self._settle()
        finally:
            self._memory, self._taken, self._owed = Memory(), None, None

    def _settle(self) -> None:
        try:
            self._writer.wait()
        except OSError as error:
            self._failure = error
            epoch, step = self._taken.age if self._taken else (0, 0)
            when = f"after epoch {epoch}" + (f" and {step} updates" if step else "")
            reason = error.strerror or error
            self._tell(f"could not write the checkpoint {when}: {reason}; the one before is kept and the run goes on")


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            raise TypeError(f"a checkpoint must hold dense tensors, got {type(value).__name__}, {value.layout}")
        if value.is_meta or value.is_conj() or value.is_neg():
            raise TypeError("a checkpoint must hold tensors with values of their own, got one of a lazy kind")
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _key(tensor: Tensor) -> _Key:
    storage = tensor.untyped_storage()
    return storage.device, storage.data_ptr(), storage.nbytes()


def _needs(storages: Iterable[UntypedStorage]) -> tuple[list[int], bool]:
    storages = list(storages)
    return [storage.nbytes() for storage in storages], any(storage.device.type == "cuda" for storage in storages)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore


def _like(tensor: Tensor, piece: Tensor) -> Tensor:
    place = piece.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(*place)  # pyright: ignore


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each first into its second, both bytes."""
    devices = {source.device for source, _ in pairs if source.device.type == "cuda"}
    for source, target in pairs:
        if source.device.type != "cpu":
            target.copy_(source, non_blocking=source.device in devices)
    with ThreadPoolExecutor(_THREADS) as pool:  # torch's own threads are as many as the steps are best with
        list(pool.map(_copy_all, _batches((s, t) for s, t in pairs if s.device.type == "cpu")))
    for device in devices:
        torch.cuda.synchronize(device)


def _batches(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[_Batch]:
    """Parts of the copying, about ``_PIECE`` each."""
    batch: _Batch = []
    size = 0
    for source, target in pairs:
        old, new = source.numpy(), target.numpy()
        for at in range(0, len(old), _PIECE):
            batch.append((new[at : at + _PIECE], old[at : at + _PIECE]))
            size += len(batch[-1][0])
            if size >= _PIECE:
                yield batch
                batch, size = [], 0
    yield batch


def _copy_all(batch: _Batch) -> None:
    for target, source in batch:
        np.copyto(target, source)
