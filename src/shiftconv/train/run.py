"""The folder of a run: what lies there, who may write there, and where to go on."""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from shiftconv import files
from shiftconv.train import checkpoint as ck
from shiftconv.train.checkpoint import Checkpoint, CheckpointError
from shiftconv.train.lock import lock, unlock
from shiftconv.train.recipe import Recipe, differences

AUTO = "auto"


@dataclass
class RunFolder:
    """One run's folder.

    It holds ``config.yaml`` (the recipe), ``metrics.jsonl`` (one line per epoch), ``last.pt``, ``previous.pt`` (the one
    before it, should last.pt get damaged), ``best.pt``, ``tensorboard/``, and once the run has ended ``result.json``
    and, of a sparse network, ``sparsity.txt`` and its picture.

    Attributes:
        path: the folder.
        notes: what was found damaged or missing on the way; one sentence each.
        source: the file that the run goes on from, once ``open`` has found one.

    It is a context: after it the folder is free for other processes, and what a run that failed before its first
    checkpoint has left is gone.
    """

    path: Path
    notes: list[str] = field(default_factory=list)
    source: Path = Path()
    _last: Checkpoint | None = None  # what last.pt holds, if it is good
    _last_is_good: bool = False
    _found: bool = False  # whether the folder held a run when it was opened
    _lock: int | None = None
    _made: list[Path] = field(default_factory=list)  # what is new since ``begin``, the innermost first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def previous(self) -> Path:
        return self.path / "previous.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.pt"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def sparsity(self) -> Path:
        return self.path / "sparsity.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are there. Without one there is no run, whatever else lies here."""
        return [path for path in (self.last, self.previous, self.best) if path.exists()]

    def open(self, recipe: Recipe, resume: str | Path | None) -> Checkpoint | None:
        """Find where a run of this recipe goes on; none: at the start. Locks the folder, and changes nothing in it.

        Args:
            recipe: what is going to run.
            resume: none: the folder must not hold a run; ``auto``: go on from the newest good checkpoint in it, or
                start; a path: go on from that checkpoint, or from the newest good one in that run's folder.

        Raises:
            FileExistsError: if the folder holds a run and none, or another one, is to be resumed.
            BlockingIOError: if another process is at the run in the folder.
            NotADirectoryError: if there is a file in its place.
            FileNotFoundError: if the checkpoint to resume is not there.
            ValueError: if what is to be resumed has another recipe.
            CheckpointError: if every checkpoint is damaged.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"the run's folder {self.path} is a file")
        if self.path.exists():
            self._lock = lock(self.path)
        found = self.checkpoints
        self._found = bool(found)
        if found and not (resume == AUTO or (resume is not None and self._holds(Path(resume)))):
            other = "" if resume is None else f", and {resume} is no checkpoint of it"
            raise FileExistsError(
                f"{self.path} already holds a run ({found[0].name}){other}; resume it (resume 'auto') or take another "
                "folder"
            )
        start = self._start(resume)
        if start is not None:
            _same(recipe, Recipe.from_dict(start.recipe), "the checkpoint to resume")
        if found and self.config.exists():
            _same(recipe, read_config(self.config), f"the run in {self.path}")
        return start

    def begin(self, recipe: Recipe, start: Checkpoint | None) -> None:
        """Make the folder that of this run, which goes on from what ``open`` gave.

        Raises:
            BlockingIOError: if another process has made a run of it since then.
        """
        ours = (self.config, self.metrics, self.tensorboard, self.path, *self.path.parents)
        made = [path for path in ours if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = lock(self.path)
        if self.checkpoints and not self._found:
            raise BlockingIOError(f"another process has put a run into {self.path}; take another folder")
        self._made = made
        files.sweep(self.path)
        self.result.unlink(missing_ok=True)  # that of a run which goes on would be stale
        files.write(self.config, yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
        if start is not None:
            if start is not self._last:
                ck.save(start, self.last, keep=self.previous if self._last else None)
            self._last, self._last_is_good = None, True
            self.write_metrics(start.metrics["history"])

    def close(self) -> None:
        """Let others have the folder; remove what ``begin`` made if no checkpoint came of it."""
        if self._made and not self.checkpoints:
            files.sweep(self.path)
            for path in self._made:
                with suppress(OSError):  # a folder in which something else lies stays
                    if path == self.tensorboard:
                        shutil.rmtree(path)
                    elif path.is_dir():
                        path.rmdir()
                    else:
                        path.unlink()
        self._made = []
        if self._lock is not None:
            unlock(self._lock)
        self._lock = None

    def save(self, checkpoint: Checkpoint, *, is_best: bool) -> None:
        """Keep a checkpoint: as the best, if it is; as the last, after which the last becomes the previous one."""
        content = ck.encode(checkpoint)
        if is_best:
            files.write(self.best, content)
        files.write(self.last, content, keep=self.previous if self._last_is_good else None)
        self._last_is_good = True
        self.write_metrics(checkpoint.metrics["history"])

    def restore_best(self, start: Checkpoint) -> int:
        """See that best.pt is there and return its epoch; what a run goes on from stands in for a lost one."""
        epoch = start.metrics["best_epoch"]
        for path in dict.fromkeys((self.best, self.source.parent / self.best.name)):
            try:
                found = ck.load(path)
            except FileNotFoundError:
                continue
            except CheckpointError as error:
                self.notes += [str(error)] * (str(error) not in self.notes)
                continue
            # A later one was written just before the kill; its epoch is going to be run again.
            if found.epoch == epoch or found.epoch > start.epoch:
                if path != self.best:
                    ck.save(found, self.best)
                return epoch
        if epoch != start.epoch:
            self.notes.append(f"the best weights, of epoch {epoch}, are lost; those of epoch {start.epoch} are kept")
        ck.save(start, self.best)
        return start.epoch

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write all rows anew, so that a resumed run has each epoch once."""
        files.write(self.metrics, "".join(json.dumps(row) + "\n" for row in history).encode())

    def _start(self, resume: str | Path | None) -> Checkpoint | None:
        if resume is None:
            return None
        if resume == AUTO:
            return self._newest()
        source = Path(resume)
        if source.is_file():
            self.source = source
            return ck.load(source)
        if not source.is_dir():
            raise FileNotFoundError(f"there is no checkpoint and no run's folder {source}; resume takes one, or 'auto'")
        if self._holds(source):
            return self._newest()
        other = RunFolder(source)
        start = other._newest()
        self.notes, self.source = self.notes + other.notes, other.source
        if start is None:
            raise FileNotFoundError(f"{source} holds no checkpoint to resume")
        return start

    def _newest(self) -> Checkpoint | None:
        good: dict[Path, Checkpoint] = {}
        for path in (self.last, self.previous, self.best):
            if path == self.previous and self.last in good:
                continue
            try:
                if path.exists():
                    good[path] = ck.load(path)
            except CheckpointError as error:
                self.notes.append(str(error))
        if not good:
            if self.notes:
                raise CheckpointError(f"{'; '.join(self.notes)}; remove the run's folder to start anew")
            return None
        self._last = good.get(self.last)
        # A kill between the writing of the two leaves a best that is the last and one more epoch.
        best = good.get(self.best)
        if self._last and best and best.metrics["history"][:-1] != self._last.metrics["history"]:
            del good[self.best]
        self.source = max(good, key=lambda path: good[path].epoch)
        return good[self.source]

    def _holds(self, path: Path) -> bool:
        return self.path.resolve() == (path if path.is_dir() else path.parent).resolve()


def read_config(path: Path) -> Recipe:
    """The recipe in a run's ``config.yaml``.

    Raises:
        ValueError: if it holds no recipe; names the file.
    """
    try:
        return Recipe.from_dict(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no recipe: {error}") from None


def _same(recipe: Recipe, other: Recipe, what: str) -> None:
    facts = differences(other, recipe)
    if facts:
        raise ValueError(f"{what} has another recipe: {'; '.join(facts)} (there / asked for)")
