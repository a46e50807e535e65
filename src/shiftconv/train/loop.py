"""The one loop: a recipe goes in, a folder with the trained network comes out.

All that is random follows from the recipe's seed, the epoch's number and the update's, so a run that was stopped or
killed and resumed gives the very numbers of an uninterrupted one: on a CPU with as many threads, and on a GPU with
``deterministic``. Several processes share each update, and give the numbers of one up to rounding.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from shiftconv import files
from shiftconv.train.checkpoint import Checkpoint
from shiftconv.train.checkpoint import load as load_checkpoint
from shiftconv.train.curves import Curves
from shiftconv.train.data import DataSets, open_data
from shiftconv.train.device import Compute, check_amp, determinism, pick_device
from shiftconv.train.endings import Stopped
from shiftconv.train.environment import environment
from shiftconv.train.evaluation import Metrics
from shiftconv.train.events import Ended, EpochDone, Note, Progress, Started, silent
from shiftconv.train.loggers import open_loggers
from shiftconv.train.parallel import first_does
from shiftconv.train.ranks import Ranks, StopRequest, barrier, environment_ranks, joined, launcher, own_device, sum_over
from shiftconv.train.recipe import Recipe
from shiftconv.train.run import AUTO, RunFolder
from shiftconv.train.seed import Stream, derive, seeded
from shiftconv.train.trainer import LOOK_EVERY, MakeTask, Trainer

_CURVES = "the curves for TensorBoard"


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        folder: the run's folder.
        checkpoint: the best network's file, by validation score.
        best_epoch: when it was best, counted from 1.
        averaged: whether the averaged weights in that file are meant, and measured here.
        val: how good it is on the validation images.
        test: how good it is on the test images, which chose nothing; none where there are none.
        history: the rows of metrics.jsonl.
    """

    folder: Path
    checkpoint: Path
    best_epoch: int
    val: Metrics
    test: Metrics | None
    history: list[dict[str, Any]]
    averaged: bool = False

    def __str__(self) -> str:
        lines = [f"best epoch {self.best_epoch}" + " (averaged weights)" * self.averaged + f"  {self.checkpoint}"]
        lines.append(f"val   {self.val}")
        return "\n".join(lines + ([f"test  {self.test}"] if self.test else []))


def train(
    recipe: Recipe,
    out: str | Path,
    resume: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    data: DataSets | None = None,
    make_task: MakeTask | None = None,
) -> Result:
    """Train a network, keep the last and the best checkpoint, and test the best one.

    Started by torchrun or srun it is one of several processes that train together; the first one keeps the folder.

    Args:
        recipe: what to do.
        out: the run's folder; see ``RunFolder`` for what it holds.
        resume: none: a new run in a folder without one; ``auto``: go on from the newest good checkpoint in the folder,
            or start; a path: go on from that checkpoint or that run's folder. A run that torchrun or Slurm had started
            and starts anew goes on anyway.
        device: cpu, cuda, cuda:1 ...; none: a GPU if there is one.
        progress: told what goes on; see ``shiftconv.train.events``.
        data: images that are no data set by name; none: those of ``recipe.data``.
        make_task: from the recipe and its network to another task than classification.

    Raises:
        ValueError: for a recipe, a device, data or a checkpoint that cannot be used.
        FileNotFoundError: if the data set or the checkpoint is not there.
        FileExistsError: if the folder holds a run and ``resume`` is none or names another one.
        BlockingIOError: if another process is at the run in the folder.
        Diverged: if the loss is no finite number any more.
        Stopped: if a signal asked for it.
        LostRank: if another process of the run is gone.
        OSError: if the last state could not be written.
    """
    tell, error = progress or silent, None
    try:
        ranks = environment_ranks()
        tell = tell if ranks.first else silent
        compute = Compute(own_device(pick_device(device), ranks), recipe.amp, recipe.channels_last)
        check_amp(recipe.amp, compute.device)
        with ExitStack() as stack:
            ranks = stack.enter_context(joined(compute.device))
            stop = stack.enter_context(StopRequest())
            folder = stack.enter_context(RunFolder(Path(out))) if ranks.first else None
            run = _Run(recipe, compute, ranks, folder, stop, tell)
            return run.go(resume, data, make_task)
    except BaseException as caught:
        error = caught
        raise
    finally:
        tell(Ended(error))


class _Run:
    """One start of a run. Of several processes only the first one has the folder; the others follow it."""

    def __init__(
        self,
        recipe: Recipe,
        compute: Compute,
        ranks: Ranks,
        folder: RunFolder | None,
        stop: StopRequest,
        tell: Progress,
    ) -> None:
        self.recipe, self.compute, self.ranks, self.folder = recipe, compute, ranks, folder
        self.stop, self.tell = stop, tell
        self.saved, self.prepared = time.monotonic(), False
        self._opened: Checkpoint | None = None  # what it goes on from, on the first process

    def go(self, resume: str | Path | None, data: DataSets | None, make_task: MakeTask | None) -> Result:
        recipe, device = self.recipe, self.compute.device
        start, source = self._start(resume)
        if data is None:
            opened: list[DataSets] = []
            first_does(self.ranks, lambda: opened.append(open_data(recipe.data)))  # it may download
            data = opened[0] if opened else open_data(recipe.data)
        with determinism(recipe.deterministic), seeded(derive(recipe.seed, Stream.WEIGHTS), device):
            trainer = Trainer(recipe, data, self.compute, self.tell, self.ranks, make_task, start is not None)
            if start is not None:
                trainer.restore(start, source)
                start = None  # the first process still has it, until it has begun
            trainer.best_epoch = first_does(self.ranks, lambda: self._begin(trainer.best_epoch))
            return self._train(trainer)

    def _start(self, resume: str | Path | None) -> tuple[Checkpoint | None, Path]:
        def opened() -> tuple[dict[str, Any] | None, str]:
            assert self.folder is not None
            self._opened = self.folder.open(self.recipe, AUTO if self._begun_before() else resume)
            return None if self._opened is None else vars(self._opened), str(self.folder.source)

        values, source = first_does(self.ranks, opened)
        if self.folder is not None:
            return self._opened, Path(source)
        return None if values is None else Checkpoint(**values), Path(source)

    def _begun_before(self) -> bool:
        """Whether the launcher has started all anew, and the run in the folder is the one that it had started."""
        assert self.folder is not None
        if not self.ranks.restarts:
            return False
        try:
            starts = json.loads(self.folder.environment.read_text())
            return starts[-1]["launcher"] == launcher()
        except (OSError, ValueError, LookupError, TypeError):  # no run, or one that nobody has launched
            return False

    def _begin(self, best_epoch: int) -> int:
        """Make the folder that of this run; gives the epoch whose weights are kept as the best."""
        folder, start = self.folder, self._opened
        assert folder is not None
        folder.begin(self.recipe, start)
        folder.write_environment({**environment(self.ranks, self.compute.device), "launcher": launcher()})
        self._opened = None
        return best_epoch if start is None else folder.restore_best(start)

    def _train(self, trainer: Trainer) -> Result:
        recipe, folder = self.recipe, self.folder
        self._tell_start(trainer)
        trainer.after_update = lambda: self._after_update(trainer)
        with self._logs(trainer) as add:
            while trainer.finished < recipe.epochs:
                row = trainer.run_epoch()
                is_best = trainer.best_epoch == trainer.finished
                self._save(trainer, is_best)
                add(row)
                self.tell(EpochDone(row, recipe.epochs, is_best))
                self._tell_notes()
                if trainer.finished < recipe.epochs:
                    self._stop_if_asked(trainer, saved=True)
            if folder is not None:
                folder.wait()
        return self._finish(trainer)

    def _tell_start(self, trainer: Trainer) -> None:
        if self.folder is None:
            return
        data, world = trainer.data, self.ranks.world
        counts = [len(part) if part is not None else 0 for part in (data.train, data.val, data.test)]
        where = str(self.compute.device) if world == 1 else f"{world} x {self.compute.device.type}"
        parameters = sum(p.numel() for p in trainer.model.parameters())
        self.tell(Started(self.recipe, self.folder.path, where, parameters, *counts, finished=trainer.finished))
        if trainer.step:
            self.tell(Note(f"going on after {trainer.step} updates of epoch {trainer.finished + 1}"))
        self._tell_notes()

    @contextmanager
    def _logs(self, trainer: Trainer) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Within the block rows go to TensorBoard and to the trackers that the recipe names."""
        if self.folder is None:
            yield lambda row: None
            return
        recipe, path, finished = self.recipe, self.folder.path, trainer.finished
        curves = Curves(self.folder.tensorboard, finished) if recipe.tensorboard else None
        config = recipe.to_dict()
        trackers = open_loggers(recipe.loggers, folder=path, run_name=path.name, config=config, finished=finished)

        def add(row: dict[str, Any]) -> None:
            if curves is not None:
                self._attempt(_CURVES, partial(curves.add, row))
            self._tell(trackers.add(row))

        failed = True
        try:
            yield add
            failed = False
        except Stopped:
            failed = False
            raise
        finally:
            if curves is not None:
                self._attempt(_CURVES, curves.close)
            self._tell(trackers.close(failed))

    def _attempt(self, what: str, write: Callable[[], object]) -> None:
        """Write what no run needs; if the disk does not take it, a note tells that."""
        try:
            write()
        except OSError as error:
            self.tell(Note(f"{what} could not be written: {error.strerror or error}"))

    def _tell(self, notes: Sequence[str]) -> None:
        for text in notes:
            self.tell(Note(text))

    def _after_update(self, trainer: Trainer) -> None:
        self._stop_if_asked(trainer, saved=False)
        if not self.prepared:
            checkpoint = trainer.checkpoint()
            if self.folder is not None:
                self.folder.prepare(checkpoint)
            self.prepared = True
        due = time.monotonic() - self.saved > 60 * self.recipe.save_minutes
        if self.ranks.world > 1:
            due = trainer.step % LOOK_EVERY == 0 and sum_over([due and self.ranks.first], self.ranks)[0] > 0
        if due:
            self._save(trainer, is_best=False)
            self._tell_notes()

    def _save(self, trainer: Trainer, is_best: bool) -> None:
        checkpoint = trainer.checkpoint()  # all processes give their part
        if self.folder is not None:
            self.folder.save(checkpoint, is_best=is_best)
            if trainer.bad:
                path, lines = self.folder.bad_images, (f"{path}: {why}\n" for path, why in trainer.bad.items())
                self._attempt("the list of unreadable images", lambda: files.write(path, "".join(lines).encode()))
        self.saved = time.monotonic()

    def _stop_if_asked(self, trainer: Trainer, saved: bool) -> None:
        reason = self.stop.asked(self.ranks)
        if reason is None:
            return
        if not saved:
            self._save(trainer, is_best=False)
        if self.folder is not None:
            self.folder.wait()
        barrier(self.ranks)  # whoever leaves first would have the launcher end the others
        where = f"epoch {trainer.finished}" if saved else f"{trainer.step} updates of epoch {trainer.finished + 1}"
        out = self.folder.path if self.folder else "RUN"
        raise Stopped(reason, f"stopped by {reason} after {where}; go on with: shiftconv train --resume {out}")

    def _tell_notes(self) -> None:
        if self.folder is not None:
            self._tell(self.folder.take_notes())

    def _finish(self, trainer: Trainer) -> Result:
        folder, data = self.folder, trainer.data
        if trainer.sparse is not None and folder is not None:
            masks = trainer.sparse.report()
            files.write(folder.sparsity, f"{masks}\n".encode())
            if find_spec("matplotlib") is not None:
                masks.plot(folder.sparsity.with_suffix(".png"))
        path = Path("best.pt") if folder is None else folder.best
        best = Checkpoint(**first_does(self.ranks, lambda: vars(load_checkpoint(path))))
        averaged = trainer.load_best(best, path)
        val = trainer.evaluate("val")
        test = None if data.test is None else trainer.evaluate("test")
        result = Result(path.parent, path, best.epoch, val, test, trainer.history, averaged)
        if folder is not None:
            values = {
                "best_epoch": result.best_epoch,
                "averaged": averaged,
                "val": val.to_dict(),
                "test": test and test.to_dict(),
            }
            files.write(folder.result, (json.dumps(values, indent=2) + "\n").encode())
        return result
