"""Learning from a teacher: a classifier whose loss looks at the outputs, and the feature maps, of a trained one."""

from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from shiftconv.analysis.mode import evaluating
from shiftconv.distill import MGD, FeatureLoss, dist, kd, nkd
from shiftconv.models import create_model
from shiftconv.models.convert import load_checkpoint
from shiftconv.train.device import Compute
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Distillation
from shiftconv.train.task import Classification

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation per channel, of values in 0..1


class Teacher:
    """A trained network, frozen: in evaluation mode, so with the statistics that its norms have learnt; no gradients.

    It is no module, so that what it holds is neither trained nor saved with a run.

    Args:
        network: gives logits ``[N, K]``.
        compute: where, and how exactly.
        normalisation: of the images that it gets.
    """

    def __init__(self, network: nn.Module, compute: Compute, normalisation: Normalisation | None = None) -> None:
        self.network = network.eval().requires_grad_(False).to(compute.device)
        self.compute = compute
        self._change = _renormalise(network, normalisation, compute.device)

    @torch.no_grad()
    def look(self, images: Tensor, with_map: bool) -> tuple[Tensor, Tensor | None]:
        """Logits ``[N, K]``, and the last feature map ``[N, C, H, W]`` if it is wanted."""
        if self._change is not None:
            scale, shift = self._change
            images = images * scale + shift
        with torch.autocast(images.device.type, enabled=False), self.compute.autocast():
            return _look(self.network, images, with_map)


class FromTeacher(Classification):
    """A classifier that learns from a teacher, too; it is validated without.

    Args:
        network: gives logits ``[N, K]``.
        teacher: gives as many.
        recipe: its ``distill`` has the losses and their weights.
        image_size: of the images; the teacher is tried with one, and it tells how many channels feature maps have.

    Raises:
        ValueError: if the teacher cannot take such images, or a network has no feature maps where they are wanted.
    """

    def __init__(self, network: nn.Module, teacher: Teacher, recipe: Recipe, image_size: int) -> None:
        super().__init__(network, recipe.loss, recipe.label_smoothing)
        self._teacher, self._settings, self._gathers = teacher, recipe.distill, False
        _try(teacher, image_size)
        if recipe.distill.features != "none":
            device = teacher.compute.device
            channels = [_channels(each, image_size, device) for each in (network, teacher.network)]
            self.beside["features"] = _feature_loss(recipe.distill, *channels).to(device)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with_map = self._settings.features != "none"
        if with_map and isinstance(self.network, FSDPModule) and not self._gathers:
            for name in ("forward_intermediates", "forward_head"):  # else only a call of the network gathers its pieces
                register_fsdp_forward_method(self.network, name)
            self._gathers = True
        known, wanted = self._teacher.look(inputs, with_map)
        logits, found = _look(self.network, inputs, with_map)
        loss = self._on_logits(logits, known, targets)
        if with_map:
            loss = loss + self._settings.feature_weight * self.beside["features"](found, wanted)
        return loss, logits

    def _on_logits(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        how, task_loss = self._settings, self.loss(student, targets)
        if how.logits == "none":
            return task_loss
        if how.logits == "kd":
            taught = kd(student, teacher, temperature=how.temperature, hard=how.hard, standardize=how.standardize)
            return how.alpha * taught + (1 - how.alpha) * task_loss
        if how.logits == "nkd":
            taught = nkd(
                student,
                teacher,
                targets,
                temperature=how.temperature,
                alpha=how.alpha,
                standardize=how.standardize,
            )
        else:
            taught = dist(
                student,
                teacher,
                temperature=how.temperature,
                beta=how.beta,
                gamma=how.gamma,
                standardize=how.standardize,
            )
        return taught + task_loss if how.keep_task_loss else taught


def create_teacher(recipe: Recipe, classes: int, normalisation: Normalisation, compute: Compute) -> Teacher:
    """The teacher of a recipe.

    Raises:
        ValueError: if its checkpoint does not fit it, it has other classes, or its precision needs another device.
        FileNotFoundError: if its checkpoint is not there.
        RuntimeError: if timm has no pretrained weights of it, or they cannot be had.
    """
    settings = recipe.distill
    assert settings.teacher is not None
    amp = compute.amp if settings.teacher_amp == "same" else settings.teacher_amp
    if amp == "fp16" and compute.device.type != "cuda":
        raise ValueError(f"distill.teacher_amp 'fp16' needs a CUDA device, got {compute.device}; use 'bf16' or 'none'")
    exact = replace(compute, amp=amp)
    args: dict[str, Any] = {"num_classes": classes, **settings.teacher_args}
    if settings.logits != "none" and args["num_classes"] != classes:
        asked, data = args["num_classes"], recipe.data.name
        raise ValueError(f"distill.teacher_args.num_classes is {asked}, but the data {data} has {classes} classes")
    if settings.teacher_checkpoint is not None:
        network = load_checkpoint(create_model(settings.teacher, **args), settings.teacher_checkpoint)
        return Teacher(network, exact, None)  # it has seen images as ours are
    return Teacher(_pretrained(settings, args, classes), exact, normalisation)


def _pretrained(settings: Distillation, args: dict[str, Any], classes: int) -> nn.Module:
    """The teacher with timm's weights."""
    name = settings.teacher
    assert name is not None
    registered = None if ":" in name else timm.get_pretrained_cfg(name)
    if registered is not None and registered.has_weights:  # before they are downloaded
        _check_classes(settings, registered.num_classes, classes)
    try:
        network = create_model(name, pretrained=True, **args)
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"the teacher {name} has no weights here ({' '.join(str(error).split())[:160]}); name a file "
            "with --teacher-checkpoint"
        ) from None
    _check_classes(settings, getattr(network, "pretrained_cfg", {}).get("num_classes"), classes)
    return network


def _check_classes(settings: Distillation, known: int | None, classes: int) -> None:
    """Raise unless the teacher's weights are for these classes: timm would give it a new head, which knows nothing."""
    if settings.logits != "none" and known not in (None, classes):
        raise ValueError(
            f"timm's weights of the teacher {settings.teacher} are for {known} classes, the data has {classes}; name a "
            "file of one for these with --teacher-checkpoint, or set distill.logits to none to learn from its maps"
        )


def _look(network: nn.Module, images: Tensor, with_map: bool) -> tuple[Tensor, Tensor | None]:
    if not with_map:
        return network(images), None
    last, maps = network.forward_intermediates(images, indices=1)  # pyright: ignore[reportCallIssue]
    return network.forward_head(last), maps[-1]  # pyright: ignore[reportCallIssue]


def _try(teacher: Teacher, image_size: int) -> None:
    """Let the teacher look at one black image."""
    images = torch.zeros(1, 3, image_size, image_size, device=teacher.compute.device)
    try:
        teacher.look(images, with_map=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        name = type(teacher.network).__name__
        raise ValueError(f"the teacher {name} cannot take an image of shape {list(images.shape)}: {reason}") from error


def _channels(network: nn.Module, image_size: int, device: torch.device) -> int:
    """How many channels the last feature map has; asks the network, and leaves no trace on it."""
    if not (
        callable(getattr(network, "forward_intermediates", None)) and callable(getattr(network, "forward_head", None))
    ):
        name = type(network).__name__
        raise ValueError(f"distill.features needs networks with timm's forward_intermediates, which {name} has not")
    with evaluating(network), torch.no_grad():
        _, found = _look(network, torch.zeros(1, 3, image_size, image_size, device=device), with_map=True)
    assert found is not None
    if found.ndim != 4:
        raise ValueError(f"distill.features needs maps [N, C, H, W]; {type(network).__name__} gives {[*found.shape]}")
    return found.shape[1]


def _feature_loss(settings: Distillation, student: int, teacher: int) -> nn.Module:
    if settings.features == "mgd":
        return MGD(student, teacher, mask_share=settings.mask_share)
    return FeatureLoss(student, teacher, "mse" if settings.features == "mse" else "smooth_l1")


def _renormalise(network: nn.Module, ours: Normalisation | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """What turns images in our normalisation into those that a network of timm was trained on: a scale and a shift."""
    theirs = getattr(network, "pretrained_cfg", None)
    if ours is None or not theirs or not theirs.get("mean") or not theirs.get("std"):
        return None
    (mean, std), wanted_mean, wanted_std = ours, theirs["mean"], theirs["std"]
    if (tuple(mean), tuple(std)) == (tuple(wanted_mean), tuple(wanted_std)):
        return None
    a, b, c, d = (
        torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std, wanted_mean, wanted_std)
    )
    return b / d, (a - c) / d
