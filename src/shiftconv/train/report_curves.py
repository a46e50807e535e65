"""The pictures of a report: what rows of runs hold, over epochs, and receptive fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shiftconv.analysis import ERF, draw
from shiftconv.analysis.report import Picture
from shiftconv.train.record import Record
from shiftconv.train.report_facts import is_share, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNDRAWN = {"epoch", "step", "seconds"}
_FIRST = ("train_loss", "val_loss", "val_accuracy", "ema_accuracy")
_NEXT = ("lr", "density", "images_per_second")


def curve_panels(runs: Sequence[Record]) -> list[draw.Panel]:
    """A panel for each number in the rows, the losses and scores first; numbers that are 0 in all rows are left out."""
    there = dict.fromkeys(key for record in runs for row in record.rows for key in row)
    scores = [key for record in runs for key in record.scores]
    ordered = dict.fromkeys([*_FIRST, *scores, *_NEXT, *there])
    panels = [_panel(key, runs) for key in ordered if key in there and key not in _UNDRAWN]
    return [panel for panel in panels if any(value != 0 for line in panel.series for value in line.values)]


def _panel(key: str, runs: Sequence[Record]) -> draw.Panel:
    scale, lines = 100 if is_share(key) else 1, []
    for record in runs:
        epochs, values = record.series(key)
        if values:
            note = f"{values[-1]:,.0f}" if abs(values[-1]) >= 1000 else None
            lines.append(draw.Series(record.name, epochs, [scale * value for value in values], note=note))
    heading = title(key)
    heading = heading[0].upper() + heading[1:]
    if is_share(key):
        # The interesting part, once all lines are in it.
        floor = 80 if all(line.values[-1] > 85 for line in lines) else None
        return draw.Panel(f"{heading}, %", lines, floor=floor, unit=" %")
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    wide = key.endswith("loss") and bool(finite) and 0 < 10 * min(finite) < max(finite)
    return draw.Panel(heading, lines, log=wide, floor=0 if key in ("density", "images_per_second") else None)


def curve_picture(panel: draw.Panel, names: Sequence[str]) -> Picture:
    """The panel in both themes; ``names`` of all runs of the page fix the colours."""
    ends = ", ".join(
        f"{line.name} ends at {line.values[-1]:.3g}{panel.unit}" if line.note is None else f"{line.name} {line.note}"
        for line in panel.series
    )
    return _both(f"{panel.title}: {ends}", lambda mode: draw.curves([panel], mode, names))


def field_picture(name: str, field: ERF, half: str) -> Picture:
    """A receptive field in both themes, with the square that holds half of it, of which ``half`` tells the size."""
    alt = f"Effective receptive field of {name}; half of it: {half}"
    return _both(alt, lambda mode: draw.receptive_fields({name: field}, mode=mode))


def _both(alt: str, make: Callable[[draw.Mode], Figure]) -> Picture:
    return Picture(alt, draw.png(make("light")), draw.png(make("dark")))
