"""Network, optimiser and schedules of a run, and what has come of them so far: one epoch at a time."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from shiftconv.nn import normalize_offset_gradients
from shiftconv.train import parallel
from shiftconv.train.checkpoint import Checkpoint, CheckpointError
from shiftconv.train.data import DataSets, Split
from shiftconv.train.data.loader import MicroBatch
from shiftconv.train.data.share import Share
from shiftconv.train.device import Compute
from shiftconv.train.endings import ElsewhereError
from shiftconv.train.evaluation import Meter, Metrics, figures, measure
from shiftconv.train.events import Note, Progress, Step, silent
from shiftconv.train.mixing import Mixer
from shiftconv.train.network import create_network, model_args, try_network
from shiftconv.train.optim import Schedules, create_optimizer
from shiftconv.train.ranks import Ranks, peers, sum_over
from shiftconv.train.recipe import Recipe
from shiftconv.train.seed import Stream, derive, reseed, seeded
from shiftconv.train.sparsity import create_sparse
from shiftconv.train.task import Classification, Task

MakeTask = Callable[[Recipe, nn.Module], Task]
LOOK_EVERY = 50  # updates between two moments at which several processes agree on what each sees by itself


class Diverged(RuntimeError):
    """The loss is no finite number any more. The last good checkpoint is untouched."""


class Trainer:
    """A run between two moments of rest.

    Args:
        recipe: what to do.
        data: the images.
        compute: where and how exactly.
        tell: told what goes on.
        ranks: this process among those that train together.
        make_task: what the network learns; none: the recipe's classification, with its teacher if it has one.
        resumes: the weights and masks are going to be loaded.

    Attributes:
        history: one row per finished epoch.
        best_epoch: whose row is the best, counted from 1; 0: there is none.
        step: updates that are done in the unfinished epoch.
        bad: images that were skipped because they cannot be read, and why; of all processes after each epoch.
        after_update: called after each update but the last of an epoch; may ask for a checkpoint, or raise.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: DataSets,
        compute: Compute,
        tell: Progress = silent,
        ranks: Ranks | None = None,
        make_task: MakeTask | None = None,
        resumes: bool = False,
    ) -> None:
        self.recipe, self.data, self.compute, self.tell = recipe, data, compute, tell
        self.ranks, self.device = ranks or Ranks(), compute.device
        self.history: list[dict[str, Any]] = []
        self.best_epoch = self.step = 0
        self.after_update: Callable[[], None] = lambda: None
        self._meter_before: dict[str, Any] = {}
        self.bad: dict[str, str] = {}
        self.model_args = model_args(recipe, data.num_classes)
        start = replace(recipe, weights=None) if resumes else recipe  # the file is needed once
        self.model = create_network(start, self.model_args).to(self.device)
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if make_task is None:
            try_network(self.model, recipe.model, data.image_size, data.num_classes, compute)
        self.task = (make_task or self._classification)(recipe, self.model).to(self.device)
        self.model = self.task.network  # of another task the recipe's network may be a part
        self.ema = None if recipe.ema_decay is None else self._average(recipe.ema_decay)
        self.net = self._prepare()
        self._pieces = parallel.in_pieces(self.net)
        self.optimizer = create_optimizer(self.model, recipe.optim, self.task.beside.values())
        self.loader = self._loader("train")
        self.schedules = Schedules(self.optimizer, recipe.optim, recipe.epochs, len(self.loader))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.mixer = Mixer(recipe, data.num_classes, self.ranks.rank) if recipe.mix.on else None
        first = None if resumes or recipe.sparse.density == 1 else self._first_images()
        self.sparse = create_sparse(self.model, self.optimizer, recipe, len(self.loader), first)

    def _classification(self, recipe: Recipe, network: nn.Module) -> Task:
        if recipe.distill.teacher is None:
            return Classification(network, recipe.loss, recipe.label_smoothing)
        from shiftconv.train.distillation import FromTeacher, create_teacher

        teacher = create_teacher(recipe, self.data.num_classes, self.data.normalisation, self.compute)
        return FromTeacher(network, teacher, recipe, self.data.image_size)

    def _average(self, decay: float) -> ModelEmaV3:
        average = ModelEmaV3(self.model, decay=decay, foreach=self.recipe.parallel == "ddp")
        return average.requires_grad_(False)

    def _prepare(self) -> nn.Module:
        """The task as it trains: synchronised, compiled, on several devices; the network keeps its names."""
        if self.recipe.sync_batch_norm and self.ranks.world > 1:
            self.task.network = self.model = parallel.synchronise_norms(self.model, self.device)
        averaged = [] if self.ema is None else [self.ema.module]
        if self.recipe.compile:
            for network in (self.model, *averaged):
                network.compile()
        if self.recipe.parallel == "fsdp" and self.ranks.world > 1:
            for module in (self.model, *self.task.beside.values(), *averaged):
                parallel.shard(module, self.ranks, self.device)
            return self.task
        return parallel.wrap(self.task, self.ranks, self.device)

    def _loader(self, split: Split) -> Any:
        recipe, ranks = self.recipe, self.ranks
        mixed = split == "train" and recipe.mix.on
        share = Share(ranks.rank, ranks.world, recipe.micro_batch_size, mirrored=mixed)
        loader = self.data.loader(split, recipe.batch_size, seed=recipe.seed, device=self.device, share=share)
        loader.tell = lambda text: self.tell(Note(text))
        return loader

    def _first_images(self) -> Any:
        """The same on every process, for they choose the masks; no more than one device takes at a time."""
        size = self.recipe.micro_batch_size or -(-self.recipe.batch_size // self.ranks.world)
        loader = self.data.loader("train", min(size, self.recipe.batch_size), seed=self.recipe.seed, device=self.device)
        return next(iter(loader))

    @property
    def finished(self) -> int:
        """Epochs that are done."""
        return len(self.history)

    @property
    def lr(self) -> float:
        """The rate of the head, which is the highest."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def run_epoch(self) -> dict[str, Any]:
        """Train on every image once, or what is left of it, validate, and add a row to the history.

        Raises:
            Diverged: if the loss is no finite number any more; of several processes the first one tells it.
            LostRank: if another process is gone.
        """
        epoch = self.finished
        self.loader.start_epoch(epoch)
        with seeded(derive(self.recipe.seed, Stream.STEPS, epoch), self.device):
            train, seconds = self._steps(epoch)
        row: dict[str, Any] = {"epoch": epoch + 1, "step": (epoch + 1) * len(self.loader)}
        row |= _row("train", train)
        for part, network in self._evaluated():
            metrics = self.evaluate("val", network)
            self._check(metrics.loss, "validation loss", epoch)
            row |= _row(part, metrics)
        row |= {"lr": self.lr, "images_per_second": train.images_per_second, "seconds": seconds}
        self._find_bad()
        (restarts,) = sum_over([self.loader.restarts], self.ranks)
        if self.bad or restarts:
            row |= {"skipped_images": len(self.bad), "restarted_workers": int(restarts)}
        if self.sparse is not None:
            masks = self.sparse.report()
            row |= {"density": masks.density, "explored": masks.explored}
        self.history.append(row)
        self.step = 0
        if self.best_epoch == 0 or self.rank(row) > self.rank(self.history[self.best_epoch - 1]):
            self.best_epoch = epoch + 1
        return row

    def _evaluated(self) -> list[tuple[str, nn.Module]]:
        """What is validated after each epoch, by the part of its keys in a row."""
        return [("val", self.model)] + ([] if self.ema is None else [("ema", self.ema.module)])

    def rank(self, row: dict[str, Any]) -> tuple[float, float]:
        """By what an epoch is better than another: its better weights' first score, then their loss."""
        return max(_rank(row, part, self.task) for part, _ in self._evaluated())

    def average_is_better(self, row: dict[str, Any]) -> bool:
        """Whether the averaged weights did better than the last ones in an epoch."""
        return self.ema is not None and _rank(row, "ema", self.task) > _rank(row, "val", self.task)

    def _steps(self, epoch: int) -> tuple[Metrics, float]:
        self.task.train()
        meter, updates = Meter(self.task, self.device), len(self.loader)
        if self._meter_before and self.ranks.first:
            meter.restore(self._meter_before)
        self._meter_before = {}
        self._meter, number = meter, 0
        for micro in self.loader.steps(self.step):
            if number == 0:
                self.schedules.step_update(epoch * updates + self.step)
                reseed(derive(self.recipe.seed, Stream.STEPS, epoch, self.step, self.ranks.rank), self.device)
                self.optimizer.zero_grad(set_to_none=True)
            self._backward(micro, epoch, number)
            number = 0 if micro.ends else number + 1
            if not micro.ends:
                continue
            self._update()
            self.step += 1
            if meter.due() or self.step == updates:
                now = meter.read()
                if self.ranks.world == 1:
                    self._check(now.loss, "training loss", epoch, self.step)
                self.tell(Step("train", epoch + 1, self.step, updates, *self._all(figures(now)), self.compute.memory()))
            if self.ranks.world > 1 and (self.step == updates or self.step % LOOK_EVERY == 0):
                self._check(meter.read(self._gather).loss, "training loss", epoch, self.step)
            if self.step < updates:
                self.after_update()
        return meter.read(self._gather), meter.seconds

    def _all(self, figures: tuple[float, float, float]) -> tuple[float, float, float]:
        """Loss and score of this process's images; the speed of all processes, about."""
        return figures[0], figures[1], figures[2] * self.ranks.world

    def _backward(self, micro: MicroBatch, epoch: int, number: int) -> None:
        inputs, labels = self.compute.move(micro.images), self.compute.move(micro.labels)
        targets = labels
        if self.mixer is not None:
            inputs, targets = self.mixer(inputs, labels, epoch, self.step, number)
        with peers(), parallel.gradients_stay(self.net, self._pieces, not micro.ends):
            with self.compute.autocast():
                loss, outputs = self.net(inputs, targets)
            self.scaler.scale(loss * (micro.share * self.ranks.world)).backward()
        self._meter.add(loss, outputs, labels, count=micro.share > 0)

    def _update(self) -> None:
        clip, normalize = self.recipe.clip_grad, self.recipe.optim.normalize_offsets
        if clip is not None or normalize:
            self.scaler.unscale_(self.optimizer)
        if normalize:
            normalize_offset_gradients(self.model)
        if clip is not None:
            if self.sparse is not None:
                self.sparse.mask_gradients()
            nn.utils.clip_grad_norm_(self.task.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            with nullcontext() if self.sparse is None else self.sparse.averaging(self.ema.module):
                self.ema.update(self.model)

    def _check(self, loss: float, what: str, epoch: int, step: int | None = None) -> None:
        """Raise Diverged if the loss, which all processes must have in common, is no finite number."""
        if not math.isfinite(loss):
            where = f"epoch {epoch + 1}" + (f", step {step}" if step else "")
            kept = f"the last good checkpoint, after epoch {epoch}, is untouched" if epoch else "no epoch has ended"
            text = f"the {what} became {loss} in {where} at learning rate {self.lr:.3g}; "
            text += f"lower optim.lr or set clip_grad; {kept}"
            raise Diverged(text) if self.ranks.first else ElsewhereError(text)

    def _check_state(self, weights: dict[str, Any]) -> None:
        """Raise Diverged for a state within an epoch, which no validation has looked at, that must not be saved."""
        loss = self._meter.read(self._gather).loss
        (found,) = sum_over([self.ranks.first and not parallel.finite(self.model, weights)], self.ranks)
        self._check(math.nan if found else loss, "training loss", self.finished, self.step)

    def _find_bad(self) -> None:
        """Add up what all processes could not read."""
        own = {str(path): reason for path, reason in self.loader.bad.items()}
        if sum_over([len(own.keys() - self.bad.keys())], self.ranks)[0]:
            self.bad |= parallel.merged(own, self.ranks)

    def _gather(self, values: list[float]) -> list[float]:
        return sum_over(values, self.ranks)

    def evaluate(self, part: Split, network: nn.Module | None = None) -> Metrics:
        """Loss and scores on the validation (``val``) or the test images, of all processes together."""
        loader = self._loader(part)
        rounds = 0
        if self.recipe.parallel == "fsdp" and self.ranks.world > 1:  # a forward pass is a message to all
            images = -(-len(getattr(self.data, part)) // self.ranks.world)
            rounds = -(-images // loader.micro_batch)
        with peers():
            return measure(
                self.task,
                network or self.model,
                loader,
                self.compute,
                self.tell,
                part,
                self._gather,
                rounds,
            )

    def checkpoint(self) -> Checkpoint:
        """All that the run needs to go on; every process has to ask, and the first one gets all."""
        weights = parallel.weights(self.model)
        if self.step:
            self._check_state(weights)
            self._find_bad()
        mean, std = self.data.normalisation
        about = dict(class_names=list(self.data.class_names), mean=list(mean), std=list(std))
        return Checkpoint(
            model_name=self.recipe.model,
            model_args=json.loads(json.dumps(self.model_args)),
            model=weights,
            optimizer=parallel.moments(self.task, self.optimizer),
            scheduler=self.schedules.state_dict(),
            scaler=self.scaler.state_dict(),
            epoch=self.finished,
            metrics={"history": self.history, "best_epoch": self.best_epoch, "bad_images": self.bad},
            recipe=self.recipe.to_dict(),
            sparse=self.sparse.state_dict() if self.sparse is not None else {},
            data={"name": self.data.name, "image_size": self.data.image_size, **about},
            step=self.step,
            ema={} if self.ema is None else parallel.weights(self.ema.module),
            task=parallel.weights(self.task.beside) if len(self.task.beside) else {},
            meter=self._meter.state(self._gather) if self.step else {},
            ranks=self.ranks.world,
        )

    def restore(self, start: Checkpoint, source: Path) -> None:
        """Go on where the checkpoint was written, by however many processes.

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
        with fitting(source, self.recipe.model):
            parallel.load_weights(self.model, start.model)
            if len(self.task.beside):
                parallel.load_weights(self.task.beside, start.task)
            parallel.load_moments(self.task, self.optimizer, start.optimizer)
            self.schedules.load_state_dict(start.scheduler)
            self.scaler.load_state_dict(start.scaler)
            if self.ema is not None:
                parallel.load_weights(self.ema.module, start.ema)
            if self.sparse is not None:
                self.sparse.load_state_dict(start.sparse)
        self.history, self.best_epoch = list(start.metrics["history"]), start.metrics["best_epoch"]
        self.step, self._meter_before = start.step, start.meter
        self.bad = dict(start.metrics.get("bad_images", {}))

    def load_best(self, best: Checkpoint, source: Path) -> bool:
        """Take over the weights of the best epoch; gives whether they are the averaged ones."""
        if self.sparse is not None:
            self.sparse.detach()  # the best weights may have other masks than the last ones
        average = bool(best.metrics["history"]) and self.average_is_better(best.metrics["history"][-1])
        with fitting(source, self.recipe.model):
            parallel.load_weights(self.model, best.ema if average else best.model)
        return average


@contextmanager
def fitting(source: Path, model: str) -> Iterator[None]:
    """Within the block whatever torch says of a state that does not fit is one line, which names the file."""
    try:
        yield
    except Exception as error:  # torch raises nearly anything, over many lines, for a state that does not fit
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = reason if len(reason) <= 300 else f"{reason[:300]} ..."
        raise CheckpointError(f"{source} does not fit a run of {model}: {reason}") from None


def _row(part: str, metrics: Metrics) -> dict[str, float]:
    scores = {f"{part}_{_name(name)}": value for name, value in metrics.scores.items()}
    return {f"{part}_loss": metrics.loss, **scores}


def _name(score: str) -> str:
    return "accuracy" if score == "top1" else score


def _rank(row: dict[str, Any], part: str, task: Task) -> tuple[float, float]:
    return row[f"{part}_{_name(task.scores[0])}"], -row[f"{part}_loss"]
