"""The folder of a run: what lies there, who may write there, and where to go on."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shiftconv import files
from shiftconv.train import checkpoint as ck
from shiftconv.train.checkpoint import Checkpoint, CheckpointError
from shiftconv.train.recipe import Recipe, differences

AUTO = "auto"


@dataclass
class RunFolder:
    """One run's folder.

    It holds ``config.yaml`` (the recipe), ``metrics.jsonl`` (one line per epoch), ``last.pt``, ``previous.pt`` (the one
    before it, should last.pt get damaged), ``best.pt``, ``result.json`` once the run has ended, and ``tensorboard/``.

    Attributes:
        path: the folder.
        notes: what was found damaged or missing on the way; one sentence each.
    """

    path: Path
    notes: list[str] = field(default_factory=list)
    _last_is_good: bool = False
    _source: Path | None = None  # the folder of the run that this one goes on from

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

    def open(self, recipe: Recipe, resume: str | Path | None) -> Checkpoint | None:
        """Take the folder for a run of this recipe and find where it goes on; none: at the start.

        Args:
            recipe: what is going to run.
            resume: none: the folder must not hold a run; ``auto``: go on from the newest good checkpoint in it, or
                start; a path: go on from that checkpoint, or from the newest good one in that run's folder.

        Raises:
            FileExistsError: if the folder holds a run and none is to be resumed.
            NotADirectoryError: if there is a file in its place.
            FileNotFoundError: if the checkpoint to resume is not there.
            ValueError: if what is to be resumed has another recipe.
            CheckpointError: if every checkpoint is damaged.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"the run's folder {self.path} is a file")
        found = [path for path in (self.config, self.last, self.previous, self.best, self.metrics) if path.exists()]
        if found and resume is None:
            raise FileExistsError(
                f"{self.path} already holds a run ({found[0].name}); resume it (resume 'auto') or take another folder"
            )
        start = self._start(resume)
        if start is not None:
            _same(recipe, Recipe.from_dict(start.recipe), "the checkpoint to resume")
        if self.config.exists():
            _same(recipe, read_config(self.config), f"the run in {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        files.sweep(self.path)
        files.write(self.config, yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
        if start is not None:
            self.write_metrics(start.metrics["history"])
        return start

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
        for path in dict.fromkeys((self.best, (self._source or self.path) / self.best.name)):
            try:
                found = ck.load(path)
            except FileNotFoundError:
                continue
            except CheckpointError as error:
                self.notes.append(str(error))
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
            self._source = source.parent
            return ck.load(source)
        if not source.is_dir():
            raise FileNotFoundError(f"there is no checkpoint and no run's folder {source}; resume takes one, or 'auto'")
        other, self._source = RunFolder(source), source
        start = other._newest()
        self.notes += other.notes
        if start is None:
            raise FileNotFoundError(f"{source} holds no checkpoint to resume")
        return start

    def _newest(self) -> Checkpoint | None:
        good: list[Checkpoint] = []
        for path in (self.last, self.previous, self.best):
            try:
                good += [ck.load(path)] if path.exists() else []
            except CheckpointError as error:
                self.notes.append(str(error))
            if path == self.last and good:
                self._last_is_good = True
                return good[0]
        if not good and self.notes:
            raise CheckpointError(f"{'; '.join(self.notes)}; remove the run's folder to start anew")
        return max(good, key=lambda checkpoint: checkpoint.epoch, default=None)


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
