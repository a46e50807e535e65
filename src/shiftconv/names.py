"""Floor 0: one sentence for every name that is not known. Imports nothing, so every floor may use it."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for ``name``, which is not among the ``known`` names of its ``kind``; to be raised by the caller.

    >>> raise unknown("padding_mode", "zero", ["zeros", "reflect"])
    ValueError: unknown padding_mode 'zero'; did you mean 'zeros'? Known: reflect, zeros
    """
    known = sorted(known)
    close = get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}")
