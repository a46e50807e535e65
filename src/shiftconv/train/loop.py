"""The one loop: a recipe goes in, a folder with the trained network comes out.

All that is random follows from the recipe's seed and the epoch's number, so a run that was killed and resumed gives the
very numbers of an uninterrupted one: on a CPU with as many threads, and on a GPU with ``deterministic``.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shiftconv import files
from shiftconv.train.checkpoint import Checkpoint, CheckpointError
from shiftconv.train.checkpoint import load as load_checkpoint
from shiftconv.train.curves import Curves
from shiftconv.train.data import DataSets, Split, open_data
from shiftconv.train.data.loader import to_device
from shiftconv.train.device import autocast, check_amp, determinism, pick_device
from shiftconv.train.evaluation import Meter, Metrics, evaluate
from shiftconv.train.events import Ended, EpochDone, Note, Progress, Started, Step, silent
from shiftconv.train.network import create_network, model_args, try_network
from shiftconv.train.optim import create_optimizer, create_scheduler
from shiftconv.train.recipe import Recipe
from shiftconv.train.run import RunFolder
from shiftconv.train.seed import Stream, derive, seeded
from shiftconv.train.sparsity import create_sparse


class Diverged(RuntimeError):
    """The loss is no finite number any more. The last good checkpoint is untouched."""


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        folder: the run's folder.
        checkpoint: the best network's file, by validation accuracy.
        best_epoch: when it was best, counted from 1.
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

    def __str__(self) -> str:
        lines = [f"best epoch {self.best_epoch} of {len(self.history)}: {self.checkpoint}", f"val   {self.val}"]
        return "\n".join(lines + ([f"test  {self.test}"] if self.test else []))


def train(
    recipe: Recipe,
    out: str | Path,
    resume: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Result:
    """Train a network, keep the last and the best checkpoint, and test the best one.

    Args:
        recipe: what to do.
        out: the run's folder; see ``RunFolder`` for what it holds.
        resume: none: a new run in a folder without one; ``auto``: go on from the newest good checkpoint in the folder,
            or start; a path: go on from that checkpoint or that run's folder.
        device: cpu, cuda, cuda:1 ...; none: a GPU if there is one.
        progress: told what goes on; see ``shiftconv.train.events``.

    Raises:
        ValueError: for a recipe, a device, data or a checkpoint that cannot be used.
        FileNotFoundError: if the data set or the checkpoint is not there.
        FileExistsError: if the folder holds a run and ``resume`` is none or names another one.
        BlockingIOError: if another process is at the run in the folder.
        Diverged: if the loss is no finite number any more.
    """
    tell, error = progress or silent, None
    try:
        picked = pick_device(device)
        check_amp(recipe.amp, picked)
        with RunFolder(Path(out)) as folder:
            start = folder.open(recipe, resume)
            data = open_data(recipe.data)
            with determinism(recipe.deterministic), seeded(derive(recipe.seed, Stream.WEIGHTS), picked):
                trainer = Trainer(recipe, data, picked, tell, resumes=start is not None)
                if start is not None:
                    trainer.restore(start, folder.source)
                folder.begin(recipe, start)
                if start is not None:
                    trainer.best_epoch = folder.restore_best(start)
                for text in folder.notes:
                    tell(Note(text))
                return _run(trainer, folder, tell)
    except BaseException as caught:
        error = caught
        raise
    finally:
        tell(Ended(error))


class Trainer:
    """Network, optimiser and schedule of a run, and what has come of them so far."""

    def __init__(
        self, recipe: Recipe, data: DataSets, device: torch.device, progress: Progress, resumes: bool = False
    ) -> None:
        self.recipe, self.data, self.device, self.progress = recipe, data, device, progress
        self.model_args = model_args(recipe, data.num_classes)
        self.model = create_network(recipe, self.model_args).to(device)
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        try_network(self.model, recipe, data.image_size, data.num_classes, device)
        self.net: nn.Module = torch.compile(self.model) if recipe.compile else self.model  # pyright: ignore
        self.loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self.optimizer = create_optimizer(self.model, recipe.optim)
        self.loader = data.loader("train", recipe.batch_size, seed=recipe.seed, device=device)
        self.scheduler = create_scheduler(self.optimizer, recipe.optim, recipe.epochs, len(self.loader))
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        first = None if resumes or recipe.sparse.density == 1 else next(iter(self.loader))
        self.sparse = create_sparse(self.model, self.optimizer, recipe, len(self.loader), first)
        self.history: list[dict[str, Any]] = []
        self.best_epoch = 0

    @property
    def finished(self) -> int:
        """Epochs that are done."""
        return len(self.history)

    def run_epoch(self) -> dict[str, Any]:
        """Train on every image once, validate, and add a row to the history.

        Raises:
            Diverged: if the loss is no finite number any more.
        """
        epoch = self.finished
        self.loader.start_epoch(epoch)
        with seeded(derive(self.recipe.seed, Stream.STEPS, epoch), self.device):
            train, seconds = self._steps(epoch)
        val = self.evaluate("val")
        self._check(val.loss, "validation loss", epoch)
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * len(self.loader),
            "train_loss": train.loss,
            "train_accuracy": train.top1,
            "val_loss": val.loss,
            "val_accuracy": val.top1,
            "lr": self.lr,
            "images_per_second": train.images_per_second,
            "seconds": seconds,
        }
        if self.sparse is not None:
            masks = self.sparse.report()
            row |= {"density": masks.density, "explored": masks.explored}
        self.history.append(row)
        if self.best_epoch == 0 or _rank(row) > _rank(self.history[self.best_epoch - 1]):
            self.best_epoch = epoch + 1
        return row

    def _steps(self, epoch: int) -> tuple[Metrics, float]:
        self.net.train()
        meter, steps = Meter(self.device), len(self.loader)
        for step, batch in enumerate(self.loader, start=1):
            self.scheduler.step_update(epoch * steps + step - 1)
            images, labels = to_device(batch, self.device, self.recipe.channels_last)
            with autocast(self.recipe.amp, self.device):
                logits = self.net(images)
                loss = self.loss(logits, labels)
            self._update(loss)
            meter.add(logits.detach(), labels, loss)
            if meter.due() or step == steps:
                now = meter.read()
                self._check(now.loss, "training loss", epoch, step)
                self.progress(Step("train", epoch + 1, step, steps, now.loss, now.top1, now.images_per_second))
        return meter.read(), meter.seconds

    def _update(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            if self.sparse is not None:
                self.sparse.mask_gradients()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _check(self, loss: float, what: str, epoch: int, step: int | None = None) -> None:
        if not math.isfinite(loss):
            where = f"epoch {epoch + 1}" + (f", step {step}" if step else "")
            kept = f"the last good checkpoint, after epoch {epoch}, is untouched" if epoch else "there is no checkpoint"
            raise Diverged(
                f"the {what} became {loss} in {where} at learning rate {self.lr:.3g}; lower optim.lr or set clip_grad; "
                f"{kept}"
            )

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def evaluate(self, part: Split) -> Metrics:
        """Loss and accuracy on the validation (``val``) or the test images."""
        return evaluate(
            self.net,
            self.data.loader(part, self.recipe.batch_size, device=self.device),
            device=self.device,
            amp=self.recipe.amp,
            channels_last=self.recipe.channels_last,
            progress=self.progress,
            part=part,
        )

    def checkpoint(self) -> Checkpoint:
        mean, std = self.data.normalisation
        about = dict(class_names=list(self.data.class_names), mean=list(mean), std=list(std))
        return Checkpoint(
            model_name=self.recipe.model,
            model_args=json.loads(json.dumps(self.model_args)),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=self.scaler.state_dict(),
            epoch=self.finished,
            metrics={"history": self.history, "best_epoch": self.best_epoch},
            recipe=self.recipe.to_dict(),
            sparse=self.sparse.state_dict() if self.sparse is not None else {},
            data={"name": self.data.name, "image_size": self.data.image_size, **about},
        )

    def restore(self, start: Checkpoint, source: Path) -> None:
        """Go on where the checkpoint was written.

        Args:
            start: the checkpoint.
            source: its file, for messages.

        Raises:
            ValueError: if it was trained on other classes.
            CheckpointError: if its states are not those of this network, this optimiser or this schedule.
        """
        there, here = start.data.get("class_names"), list(self.data.class_names)
        if there is not None and there != here:
            number = next((i for i, pair in enumerate(zip(there, here, strict=False)) if pair[0] != pair[1]), None)
            what = f"{len(there)} classes there, {len(here)} here"
            if number is not None:
                what = f"class number {number} is {there[number]!r} there and {here[number]!r} here"
            raise ValueError(f"the data has other classes than those that {source} was trained on: {what}")
        with _fitting(source, self.recipe.model):
            self.model.load_state_dict(start.model)
            self.optimizer.load_state_dict(start.optimizer)
            self.scheduler.load_state_dict(start.scheduler)
            self.scaler.load_state_dict(start.scaler)
            if self.sparse is not None:
                self.sparse.load_state_dict(start.sparse)
        self.history, self.best_epoch = list(start.metrics["history"]), start.metrics["best_epoch"]


@contextmanager
def _fitting(source: Path, model: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch raises nearly anything, over many lines, for a state that does not fit
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = reason if len(reason) <= 300 else f"{reason[:300]} ..."
        raise CheckpointError(f"{source} does not fit a run of {model}: {reason}") from None


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return row["val_accuracy"], -row["val_loss"]  # small validation sets have many ties


def _run(trainer: Trainer, folder: RunFolder, tell: Progress) -> Result:
    recipe, data = trainer.recipe, trainer.data
    parameters = sum(p.numel() for p in trainer.model.parameters())
    counts = [len(part) if part is not None else 0 for part in (data.train, data.val, data.test)]
    tell(Started(recipe, folder.path, str(trainer.device), parameters, *counts, finished=trainer.finished))
    curves = Curves(folder.tensorboard, trainer.finished) if recipe.tensorboard else None
    try:
        while trainer.finished < recipe.epochs:
            row = trainer.run_epoch()
            is_best = trainer.best_epoch == trainer.finished
            folder.save(trainer.checkpoint(), is_best=is_best)
            if curves:
                curves.add(row)
            tell(EpochDone(row, recipe.epochs, is_best))
    finally:
        if curves:
            curves.close()
    return _finish(trainer, folder)


def _finish(trainer: Trainer, folder: RunFolder) -> Result:
    best = load_checkpoint(folder.best)
    if trainer.sparse is not None:
        masks = trainer.sparse.report()
        files.write(folder.sparsity, f"{masks}\n".encode())
        if find_spec("matplotlib") is not None:
            masks.plot(folder.sparsity.with_suffix(".png"))
        trainer.sparse.detach()  # the best weights may have other masks than the last ones
    with _fitting(folder.best, trainer.recipe.model):
        trainer.model.load_state_dict(best.model)
    val = trainer.evaluate("val")
    test = None if trainer.data.test is None else trainer.evaluate("test")
    result = Result(folder.path, folder.best, best.epoch, val, test, trainer.history)
    values = {"best_epoch": result.best_epoch, "val": asdict(val), "test": test and asdict(test)}
    files.write(folder.result, (json.dumps(values, indent=2) + "\n").encode())
    return result
