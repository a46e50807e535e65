"""Whether a setting is what it should be; each of these raises one clear line if it is not."""

import math
from typing import Any, get_args

from shiftconv.names import unknown


def one_of(kind: str, value: object, names: Any) -> None:
    if value not in get_args(names):
        raise unknown(kind, value, get_args(names))


def integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def number(
    name: str,
    value: object,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    wants = [
        (low, "at least", lambda limit: value >= limit),
        (above, "above", lambda limit: value > limit),
        (high, "at most", lambda limit: value <= limit),
        (below, "below", lambda limit: value < limit),
    ]
    wants = [want for want in wants if want[0] is not None]
    if not math.isfinite(value) or not all(holds(limit) for limit, _, holds in wants):
        text = " and ".join(f"{words} {limit:g}" for limit, words, _ in wants)
        raise ValueError(f"{name} must be {text}, got {value!r}")


def flags(owner: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{owner}.{name} must be true or false, got {value!r}")


def text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {value!r}")


def optional(check: Any, name: str, value: object, *arguments: Any, **limits: Any) -> None:
    """The check, unless there is no value."""
    if value is not None:
        check(name, value, *arguments, **limits)


def rising(name: str, value: object) -> tuple[float, float] | None:
    """Two rising numbers as a tuple, for YAML has lists only; none stays none."""
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    if (
        len(pair) != 2
        or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in pair)
        or pair[0] >= pair[1]
    ):
        raise ValueError(f"{name} must be two rising numbers, got {value!r}")
    return pair
