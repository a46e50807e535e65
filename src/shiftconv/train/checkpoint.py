"""Checkpoints: one file with all that a run needs to go on, written at once and checked before it is believed.

The file is a plain ``torch.save`` of tensors and plain values, so ``torch.load(path, weights_only=True)`` reads it
anywhere. It is a zip archive, and each of its records carries a CRC-32; these find a file that was cut or changed.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, get_origin
from zipfile import ZipFile

import torch

from shiftconv import files
from shiftconv.train.recipe import Recipe

FORMAT, VERSION = "shiftconv.checkpoint", 1


class CheckpointError(ValueError):
    """A file is no good checkpoint; the message names it and says why."""


@dataclass
class Checkpoint:
    """A run after a number of epochs and updates.

    The fields are the top-level keys of the file, beside ``format`` and ``version``.

    Attributes:
        model_name: name of the network.
        model_args: its arguments, the number of classes among them.
        model: its state dict.
        optimizer: state dict of the optimiser.
        scheduler: state dict of the learning rate's schedule.
        scaler: state dict of the gradient scaler; empty where there is none.
        epoch: finished epochs.
        metrics: ``history``, one row per finished epoch, ``best_epoch``, the epoch of the best validation score, and
            ``bad_images``, those skipped so far and why.
        recipe: ``Recipe.to_dict()``.
        data: name, class names, mean, std and image size of the data set.
        sparse: state dict of the sparse training; empty where there is none.
        step: updates of the weights in the epoch that is not finished; 0: the last epoch has ended.
        ema: state dict of the averaged network; empty where there is none.
        task: state of what trains beside the network, such as a distillation's projection; empty where nothing does.
        meter: running sums of the epoch that is not finished.
        ranks: processes that trained; to be read by people.
    """

    model_name: str
    model_args: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    epoch: int
    metrics: dict[str, Any]
    recipe: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    sparse: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    ema: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    meter: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1

    @property
    def age(self) -> tuple[int, int]:
        """Finished epochs, and updates since: the greater, the newer."""
        return self.epoch, self.step


class _Sink:
    """What torch writes to. Its C++ takes no error well: the first one is kept, and the rest of the file is dropped."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """All is flushed at the end."""


def save(checkpoint: Checkpoint, path: Path, keep: Path | None = None) -> None:
    """Write the file at once; whatever happens, ``path`` holds its old or its new content; the old goes to ``keep``.

    Nothing is gathered in memory, and other threads can work meanwhile.

    Raises:
        OSError: if it cannot be written.
    """
    with files.replacing(path, keep) as file, _checksums():
        sink = _Sink(file)
        torch.save({"format": FORMAT, "version": VERSION, **vars(checkpoint)}, sink)  # pyright: ignore
        if sink.error is not None:
            raise sink.error


@contextmanager
def _checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # a file without them could not be told from a damaged one
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def load(path: Path) -> Checkpoint:
    """Read and check a checkpoint of a run; its tensors are on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read, which does not mean that it is damaged.
        CheckpointError: if the file is damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    outer = sys.exception()
    try:
        with path.open("rb") as file:  # one file for both readings, should another take its name meanwhile
            with ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"its record {damaged} has a wrong checksum")
            file.seek(0)
            values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes zipfile and torch raise nearly anything
        system = _of_the_system(error, outer)
        if system is not None:
            raise OSError(system.errno, f"cannot read {path}: {system.strerror}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint of a shiftconv run: {reason}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of a shiftconv run: it has no format {FORMAT!r}")
    if values.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {values.get('version')!r}; this shiftconv reads {VERSION}")
    values = {key: value for key, value in values.items() if key not in ("format", "version")}
    try:
        _check(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {error}") from None
    return Checkpoint(**values)


def _of_the_system(error: BaseException | None, outer: BaseException | None) -> OSError | None:
    """The disk's error behind the one that was raised, if there is one; a damaged file is sought in at wrong places.

    What was raised before (``outer``) is none of this file's.
    """
    while error is not None and error is not outer:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            return error
        error = error.__context__
    return None


def _check(values: dict[str, Any]) -> None:
    """Raise a TypeError or a ValueError unless these are the fields of a checkpoint and agree with each other."""
    known = {f.name: f for f in fields(Checkpoint)}
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing or values.keys() - known:
        raise ValueError(f"it lacks {missing} and has the surplus {sorted(map(str, values.keys() - known))}")
    for name, value in values.items():
        _kind(name, value, get_origin(known[name].type) or known[name].type)
    epoch, step, metrics = values["epoch"], values.get("step", 0), values["metrics"]
    if step < 0 or epoch + step <= 0 or values.get("ranks", 1) < 1:
        raise ValueError(f"its epoch is {epoch}, its step {step}, and its processes are {values.get('ranks', 1)}")
    history, best = metrics.get("history"), metrics.get("best_epoch")
    _kind("metrics.history", history, list)
    _kind("metrics.best_epoch", best, int)
    if len(history) != epoch or not min(epoch, 1) <= best <= epoch:
        raise ValueError(f"its epoch is {epoch}, its history has {len(history)} rows, and its best epoch is {best}")
    for number, row in enumerate(history, start=1):
        _kind("a row of metrics.history", row, dict)
        figures = [row.get(name) for name in ("epoch", "val_loss")]
        if figures[0] != number or not all(isinstance(x, int | float) and isfinite(x) for x in figures):
            raise ValueError(f"row {number} of its history is {row}")
    _kind("data.class_names", values.get("data", {}).get("class_names", []), list)
    Recipe.from_dict(values["recipe"])


def _kind(name: str, value: object, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
