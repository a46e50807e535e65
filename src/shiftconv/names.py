"""Floor 0: one sentence for every name that is not known. Imports nothing of ours, so every floor may use it."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

_SHOWN = 12


def closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that was probably meant, if any; of equally close ones that with the longest common start."""
    name = name.lower()
    close = get_close_matches(name, list(known), n=8, cutoff=cutoff)
    return max(close, key=lambda match: _alike(match, name), default=None)


def _alike(one: str, other: str) -> tuple[float, int]:
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return SequenceMatcher(None, one, other).ratio(), start


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for ``name``, which is not among the ``known`` names of its ``kind``; to be raised by the caller.

    >>> raise unknown("padding_mode", "zero", ["zeros", "reflect"])
    ValueError: unknown padding_mode 'zero'; did you mean 'zeros'? Known: reflect, zeros
    """
    known = sorted(known)
    close = closest(str(name), known)
    hint = f"; did you mean {close!r}?" if close else "."
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known[:_SHOWN])}{more}")
