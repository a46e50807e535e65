"""Losses on feature maps, with small modules of their own that make the student's map comparable to the teacher's."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftconv.distill.arguments import check_floating, count, exact_pair, number
from shiftconv.names import unknown

Kind = Literal["smooth_l1", "mse"]
Hide = Literal["channels", "pixels"]


class FeatureLoss(nn.Module):
    """Mean difference of two feature maps: smooth L1 or squared.

    The student's map is resized to the size of the teacher's; a 1x1 convolution, ``align``, gives it as many channels
    if it has others. Source: Romero et al., "FitNets", arXiv:1412.6550, equation 3; smooth L1 with a ``beta`` of 2 is
    that of the SLaK authors' code (Liu et al., arXiv:2305.19412)::

        smooth_l1(d) = d^2 / (2 * beta) if |d| < beta else |d| - beta / 2

    Args:
        student_channels: ``C``.
        teacher_channels: ``C'``.
        kind: ``smooth_l1`` or ``mse``.
        beta: where smooth L1 turns from a square into a line, above 0.

    Raises:
        TypeError: channels that are no whole number, a ``beta`` that is no number.
        ValueError: channels below 1, an unknown kind, a ``beta`` that is not above 0; in a call, other shapes.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, kind: Kind = "smooth_l1", beta: float = 2.0
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise unknown("kind", kind, get_args(Kind))
        self.student_channels = count("student_channels", student_channels)
        self.teacher_channels = count("teacher_channels", teacher_channels)
        self.kind = kind
        self.beta = number("beta", beta, above=0)
        self.align = _align(student_channels, teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps ``[N, C, H, W]`` and ``[N, C', H', W']``, a scalar; the teacher's gets no gradient."""
        student, teacher = _maps(student, teacher, self.student_channels, self.teacher_channels)
        with _whole_precision(student):
            aligned = _apply(self.align, _resized(student, teacher))
        if self.kind == "mse":
            return F.mse_loss(aligned, teacher)
        return F.smooth_l1_loss(aligned, teacher, beta=self.beta)

    def extra_repr(self) -> str:
        return f"kind={self.kind}" + (f", beta={self.beta:g}" if self.kind == "smooth_l1" else "")


class MGD(nn.Module):
    """Masked generative distillation: the teacher's map must be found from a part of the student's.

    ::

        weight / N * sum of (generation(mask * align(student)) - teacher)^2

    where ``align`` is a 1x1 convolution if the channels differ, and ``generation`` is a 3x3 convolution, ReLU and
    another 3x3 convolution. The student's map is resized to the size of the teacher's first. The mask is 0 where a
    uniform random number is below ``mask_share``, else 1.

    Source: Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv:2205.01529, section 3. The paper hides
    pixels; the SLaK authors' code hides whole channels.

    Args:
        student_channels: ``C``.
        teacher_channels: ``C'``.
        mask_share: the expected share that is hidden, in [0, 1).
        weight: what the loss is multiplied by, at least 0.
        hide: what is hidden, different in each image: ``channels`` or ``pixels``.

    Raises:
        TypeError: channels that are no whole number, a share or weight that is no number.
        ValueError: channels below 1, a share outside [0, 1), a negative weight, something else to hide; in a call,
            other shapes.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        mask_share: float = 0.5,
        weight: float = 7e-5,
        hide: Hide = "channels",
    ) -> None:
        super().__init__()
        if hide not in get_args(Hide):
            raise unknown("hide", hide, get_args(Hide))
        self.student_channels = count("student_channels", student_channels)
        self.teacher_channels = count("teacher_channels", teacher_channels)
        self.mask_share = number("mask_share", mask_share, below=1)
        self.weight = number("weight", weight)
        self.hide = hide
        self.align = _align(student_channels, teacher_channels)
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The loss of maps ``[N, C, H, W]`` and ``[N, C', H', W']``, a scalar; the teacher's gets no gradient.

        The mask is one ``torch.rand`` of shape ``[N, C', 1, 1]`` or ``[N, 1, H', W']`` on the device of the maps, from
        the ``generator``, or else from torch's own, as in dropout.
        """
        student, teacher = _maps(student, teacher, self.student_channels, self.teacher_channels)
        n, channels, height, width = teacher.shape
        shape = (n, channels, 1, 1) if self.hide == "channels" else (n, 1, height, width)
        # Always of float32, so that the same seed hides the same in every precision.
        random = torch.rand(shape, generator=generator, device=student.device, dtype=torch.float32)
        with _whole_precision(student):
            aligned = _apply(self.align, _resized(student, teacher))
            made = aligned * (random >= self.mask_share).to(aligned.dtype)
            for layer in self.generation:
                made = _apply(layer, made)
        return F.mse_loss(made, teacher, reduction="sum") * (self.weight / n)

    def extra_repr(self) -> str:
        return f"mask_share={self.mask_share:g}, weight={self.weight:g}, hide={self.hide}"


def _align(student_channels: int, teacher_channels: int) -> nn.Module:
    return nn.Identity() if student_channels == teacher_channels else nn.Conv2d(student_channels, teacher_channels, 1)


def _maps(student: Tensor, teacher: Tensor, student_channels: int, teacher_channels: int) -> tuple[Tensor, Tensor]:
    """Both maps checked, in the precision of the loss, the teacher's detached."""
    for name, value, channels in (("student", student, student_channels), ("teacher", teacher, teacher_channels)):
        check_floating(name, value, "[N, C, H, W]")
        if value.shape[1] != channels:
            raise ValueError(f"{name} must have {channels} channels, got shape {tuple(value.shape)}")
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher must be maps of as many images, got {len(student)} and {len(teacher)}")
    return exact_pair(student, teacher)


def _whole_precision(x: Tensor) -> AbstractContextManager:
    """Autocast off on the device of ``x``: it would compute the convolutions in half precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` in the precision of ``x``, whatever that of the layer's weights."""
    if not isinstance(layer, nn.Conv2d) or layer.weight.dtype == x.dtype:
        return layer(x)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.conv2d(x, layer.weight.to(x.dtype), bias, padding=layer.padding)


def _resized(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's map in the height and width of the teacher's: averaged if these divide its own, else bilinear."""
    (height, width), size = student.shape[-2:], teacher.shape[-2:]
    if (height, width) == tuple(size):
        return student
    if height % size[0] == 0 and width % size[1] == 0:  # bilinear would skip pixels; adaptive pooling is not repeatable
        return F.avg_pool2d(student, (height // size[0], width // size[1]))
    return F.interpolate(student, size=tuple(size), mode="bilinear", align_corners=False)
