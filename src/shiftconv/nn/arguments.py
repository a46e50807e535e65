"""What the modules demand of their arguments; each check names the argument, what was expected and what came."""

import math
from collections.abc import Sequence
from typing import cast, get_args

from shiftconv.names import unknown
from shiftconv.ops.sampling import Crop, PaddingMode

Range = tuple[float, float]


def positive(name: str, value: object) -> int:
    """A whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def per_axis(name: str, value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """One positive whole number for each of ``ndim`` axes, given as that or as one for all."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (positive(name, value),) * ndim
    if len(value) != ndim:
        raise ValueError(f"{name} must be one number or {ndim}, one per spatial axis; got {value!r}")
    return tuple(positive(name, item) for item in value)


def padding(mode: str) -> PaddingMode:
    if mode not in get_args(PaddingMode):
        raise unknown("padding_mode", mode, get_args(PaddingMode))
    return cast("PaddingMode", mode)


def crops(crop: Crop | None, ndim: int) -> tuple[tuple[int, int], ...] | None:
    """The pairs as tuples; none where nothing is cut, which is the operators' fast path."""
    if crop is None:
        return None
    pairs = isinstance(crop, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in crop)
    if not pairs or len(crop) != ndim:
        raise ValueError(f"crop must be none or {ndim} pairs (lower, upper), one per spatial axis; got {crop!r}")
    if any(not isinstance(cut, int) or isinstance(cut, bool) for pair in crop for cut in pair):
        raise TypeError(f"crop must be of whole numbers, got {crop!r}")
    given = tuple((lower, upper) for lower, upper in crop)
    return given if any(lower or upper for lower, upper in given) else None


def ranges(name: str, value: float | Sequence[float | Range], ndim: int) -> tuple[Range, ...]:
    """The interval ``(low, high)`` of each axis; a number ``s`` stands for ``(-s, s)``."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * ndim
    if len(values) != ndim:
        raise ValueError(f"{name} must be one number or {ndim}, one per spatial axis; got {value!r}")
    return tuple(_range(name, item) for item in values)


def _range(name: str, value: object) -> Range:
    pair = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    numbers = [float(number) for number in pair if isinstance(number, int | float) and not isinstance(number, bool)]
    if len(pair) != 2 or len(numbers) != 2:
        raise TypeError(f"{name} must be a number or a pair (low, high) per axis, got {value!r}")
    low, high = numbers if pair is value else (-numbers[0], numbers[1])
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name} must be a finite number of at least 0 or a rising pair per axis, got {value!r}")
    return low, high
