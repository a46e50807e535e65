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
from shiftconv.train.saving import Saver

AUTO = "auto"


@dataclass
class RunFolder:
    """One run's folder.

    It holds ``config.yaml`` (the recipe), ``environment.json`` (what it ran on, once per start), ``metrics.jsonl`` (one
    line per epoch), ``last.pt``, ``previous.pt`` (the one before it, should last.pt get damaged), ``best.pt``,
    ``tensorboard/`` and ``loggers.json`` if there are such logs, ``bad_images.txt`` if there are such images, and once
    the run has ended ``result.json`` and, of a sparse network, ``sparsity.txt`` and its picture.

    Attributes:
        path: the folder.
        notes: what was found damaged or missing on the way, and could not be written; one sentence each.
        source: the file that the run goes on from, once ``open`` has found one.

    It is a context: after it all is written, the folder is free for other processes, and what a run that failed before
    its first checkpoint has left is gone.
    """

    path: Path
    notes: list[str] = field(default_factory=list)
    source: Path = Path()
    _last: Checkpoint | None = None  # what last.pt holds, if it is good
    _last_is_good: bool = False
    _found: bool = False  # whether the folder held a run when it was opened
    _lock: int | None = None
    _made: list[Path] = field(default_factory=list)  # what is new since ``begin``, the innermost first

    def __post_init__(self) -> None:
        self._saver = Saver(self._write, lambda text: self.notes.append(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
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
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def loggers(self) -> Path:
        return self.path / "loggers.json"

    @property
    def bad_images(self) -> Path:
        return self.path / "bad_images.txt"

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are there. Without one there is no run, whatever else lies here."""
        return [path for path in (self.last, self.previous, self.best) if path.exists()]

    def holds(self, path: Path) -> bool:
        """Whether this is the folder, or a file in it."""
        return self.path.resolve() == (path if path.is_dir() else path.parent).resolve()

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
        if found and not (resume == AUTO or (resume is not None and self.holds(Path(resume)))):
            other = "" if resume is None else f", and {resume} is no checkpoint of it"
            raise FileExistsError(
                f"{self.path} already holds a run ({found[0].name}){other}; resume it (resume 'auto') or take another "
                "folder"
            )
        start = self._start(resume)
        if start is not None:
            _same(recipe, Recipe.from_dict(start.recipe), "the checkpoint to resume")
        if found and self.config.exists():
            self._check_config(recipe)
        return start

    def begin(self, recipe: Recipe, start: Checkpoint | None) -> None:
        """Make the folder that of this run, which goes on from what ``open`` gave.

        Raises:
            BlockingIOError: if another process has made a run of it since then.
        """
        files_of_ours = (self.config, self.environment, self.metrics, self.tensorboard, self.loggers, self.bad_images)
        ours = (*files_of_ours, self.path, *self.path.parents)
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

    def write_environment(self, facts: dict[str, Any]) -> None:
        """Add what this start of the run runs on to environment.json, a list; a new run begins a new one.

        Args:
            facts: values that JSON can hold.
        """
        starts: list[Any] = []
        if self._found and self.environment.exists():
            try:
                starts = list(json.loads(self.environment.read_text()))
            except (TypeError, ValueError) as error:
                self.notes.append(f"{self.environment} is damaged and begun anew: {error}")
        files.write(self.environment, (json.dumps([*starts, facts], indent=2) + "\n").encode())

    def prepare(self, checkpoint: Checkpoint) -> None:
        """Take memory for checkpoints like this one, in the background, so that the first save is as short as any."""
        self._saver.prepare(checkpoint)

    def save(self, checkpoint: Checkpoint, *, is_best: bool) -> None:
        """Copy a checkpoint, and write the copy in the background: as the last one, and as the best, if it is.

        What was the last one becomes the previous one. A save that has not ended is waited for. If the disk takes none,
        the files stay as they were, a note tells it, and the run can go on; see ``Saver``.

        Raises:
            TypeError: if it holds tensors that cannot be kept.
        """
        self._saver.save(checkpoint, is_best=is_best)

    def _write(self, checkpoint: Checkpoint, best: Checkpoint | None) -> None:
        ck.save(checkpoint, self.last, keep=self.previous if self._last_is_good else None)
        self._last_is_good = True
        if best is checkpoint:
            files.copy(self.last, self.best)
        elif best is not None:
            ck.save(best, self.best)
        self.write_metrics(checkpoint.metrics["history"])

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._saver.busy

    def take_notes(self) -> list[str]:
        """The notes since the last call; waits for nothing."""
        self._saver.look()
        notes, self.notes = self.notes, []
        return notes

    def wait(self) -> None:
        """Wait until the newest state is on the disk.

        Raises:
            OSError: if it could not be written.
        """
        self._saver.wait()

    def close(self) -> None:
        """Wait until all is written; let others have the folder; remove what ``begin`` made if no checkpoint came."""
        try:
            self._saver.close()
        finally:
            self._leave()

    def _leave(self) -> None:
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

    def restore_best(self, start: Checkpoint) -> int:
        """See that best.pt is there and return its epoch; what a run goes on from stands in for a lost one.

        Returns:
            The epoch; 0 if the run goes on within its first one, when nothing is best yet.
        """
        epoch = start.metrics["best_epoch"]
        if epoch == 0:
            return 0
        there = self.source.parent
        places = [self.best, there / self.best.name]
        if start.age != (epoch, 0):  # else the start itself is as good
            places += [self.previous, there / self.previous.name]
        for path in dict.fromkeys(places):
            try:
                found = ck.load(path)
            except FileNotFoundError:
                continue
            except CheckpointError as error:
                self.notes += [str(error)] * (str(error) not in self.notes)
                continue
            # A later one was written just before the kill; its epoch is going to be run again.
            later = path.name == self.best.name and found.epoch > start.epoch
            if found.age == (epoch, 0) or later:
                if path != self.best:
                    ck.save(found, self.best)
                return epoch
        if start.age != (epoch, 0):
            when = f"epoch {start.epoch}" + (f" and {start.step} updates" if start.step else "")
            self.notes.append(f"the best weights, of epoch {epoch}, are lost; those of {when} are kept")
        ck.save(start, self.best)
        return start.epoch

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write all rows anew, so that a resumed run has each epoch once."""
        files.write(self.metrics, "".join(json.dumps(row) + "\n" for row in history).encode())

    def _check_config(self, recipe: Recipe) -> None:
        try:
            there = read_config(self.config)
        except ValueError as error:  # the checkpoint has the recipe, too
            self.notes.append(f"{error}; it is written anew")
        else:
            _same(recipe, there, f"the run in {self.path}")

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
        if self.holds(source):
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
        self.source = max(good, key=lambda path: good[path].age)
        return good[self.source]


def read_config(path: Path) -> Recipe:
    """The recipe in a run's ``config.yaml``.

    Raises:
        ValueError: if it holds no recipe; names the file.
    """
    try:
        return Recipe.from_dict(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no recipe: {error}") from None


def resume_target(path: Path) -> tuple[Recipe, Path]:
    """What ``shiftconv train --resume RUN`` goes on with. Reads only.

    Args:
        path: a run's folder, or a checkpoint in it.

    Returns:
        The recipe, of config.yaml or, if that is no good, of the newest good checkpoint; and the folder.

    Raises:
        FileNotFoundError: if there is no run.
        CheckpointError: if config.yaml is no good, and no checkpoint either.
    """
    run = RunFolder(path if path.is_dir() else path.parent)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; resume takes a run's folder or a checkpoint in it")
    if path.is_file() and path.name not in [checkpoint.name for checkpoint in run.checkpoints]:
        names = "last.pt, previous.pt or best.pt"
        raise FileNotFoundError(f"{path} is no run's checkpoint ({names}); resume takes one in its folder, or that")
    try:
        return read_config(run.config), run.path
    except (FileNotFoundError, ValueError) as error:
        newest, reason = run._newest(), error
    if newest is None:
        raise FileNotFoundError(f"{path} holds no run: there is no checkpoint, and no recipe: {reason}")
    return Recipe.from_dict(newest.recipe), run.path


def _same(recipe: Recipe, other: Recipe, what: str) -> None:
    facts = differences(other, recipe)
    if facts:
        raise ValueError(f"{what} has another recipe: {'; '.join(facts)} (there / asked for)")
