"""What the arguments of the losses must be, and the precision that they are computed in."""

import math

import torch
from torch import Tensor


def exact_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 if one is, else in float32; the teacher without its gradient."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def check_floating(name: str, value: object, layout: str) -> None:
    """Raise unless ``value`` is a floating-point tensor with the axes of ``layout``, such as ``[N, K]``, and a row."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.ndim != layout.count(",") + 1 or 0 in value.shape:
        raise ValueError(f"{name} must have shape {layout}, none of them 0, got {tuple(value.shape)}")


def check_logits(student: object, teacher: object) -> None:
    """Raise unless both are logits ``[N, K]`` of the same images and classes."""
    check_floating("student", student, "[N, K]")
    check_floating("teacher", teacher, "[N, K]")
    assert isinstance(student, Tensor)
    assert isinstance(teacher, Tensor)
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher must have the same shape [N, K], got {shapes}")


def check_target(target: object, rows: int, classes: int) -> None:
    """Raise unless ``target`` is labels int64 ``[N]`` or soft labels ``[N, K]`` for logits of that shape.

    The range of labels is looked at on a CPU only: a GPU would have to be waited for.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, labels [N] or soft labels [N, K], got {type(target).__name__}")
    if target.ndim == 1:
        if target.dtype != torch.int64:
            raise TypeError(f"target must be int64 if it is labels [N], got {target.dtype}")
    elif not target.is_floating_point():
        raise TypeError(f"target must be floating-point if it is soft labels [N, K], got {target.dtype}")
    if target.shape not in ((rows,), (rows, classes)):
        shapes = f"({rows},) or ({rows}, {classes})"
        raise ValueError(f"target must have shape {shapes} for these logits, got {tuple(target.shape)}")
    if target.ndim == 1 and target.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(end) for end in target.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"target must be labels from 0 to {classes - 1}, got {low if low < 0 else high}")


def number(name: str, value: object, *, above: float | None = None, below: float = math.inf) -> float:
    """A finite number of at least 0, or above ``above``, and below ``below``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (value >= 0 if above is None else above < value) or not value < below:
        low = "at least 0" if above is None else f"above {above:g}"
        high = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be {low} and {high}, got {value!r}")
    return value


def count(name: str, value: object) -> int:
    """A whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
