"""The pictures of a report, light or dark, drawn with matplotlib without touching its global state.

The first four colours are Okabe and Ito's (2008); the others were chosen so that any two are 10 apart in CIELAB with
every kind of colour vision, as Machado et al. (2009) simulate it. Series carry their name at the line's end, so that no
legend has to be matched. Names are drawn as they are, without TeX.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shiftconv import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from shiftconv.analysis.receptive_field import ERF


@dataclass(frozen=True)
class Theme:
    """Colours of one picture."""

    paper: str
    ink: str
    muted: str
    faint: str
    series: tuple[str, ...]


_ON_LIGHT = ("#0072b2", "#c14f00", "#007a5a", "#9c4f80", "#1a1a5e", "#8f3fff", "#5c1010", "#808080")
_ON_DARK = ("#56b4e9", "#e69f00", "#2fc79a", "#d98fbb", "#7d6bf0", "#f0475f", "#ffffa6", "#b8fff4")
THEMES = {
    "light": Theme("#ffffff", "#1b1f24", "#57606a", "#d8dee4", _ON_LIGHT),
    "dark": Theme("#161b22", "#e6edf3", "#9aa4af", "#30363d", _ON_DARK),
}
Mode = Literal["light", "dark"]
FLOOR = 1e-3  # of the strongest pixel: what the receptive field's picture still shows


@dataclass(frozen=True)
class Series:
    """One line of a panel: ``values`` over ``epochs``; a line that is not ``solid`` is a companion without label.

    The label is the name and the last number, or ``note`` in its place.
    """

    name: str
    epochs: Sequence[float]
    values: Sequence[float]
    solid: bool = True
    note: str | None = None


@dataclass(frozen=True)
class Panel:
    """Lines over epochs, or what ``along`` says; lines of the same name have the same colour.

    ``unit`` follows the labels' numbers; ``dots`` marks each value, where those between two values mean nothing.
    """

    title: str
    series: Sequence[Series]
    log: bool = False
    floor: float | None = None
    unit: str = ""
    along: str = "epoch"
    dots: bool = False


def figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure, in inches; a missing matplotlib is one clear error."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "shiftconv[demo]"') from error
    fig = Figure(figsize=(width, height), dpi=160, facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def png(fig: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of names; they get boxes
        fig.savefig(buffer, format="png", facecolor=fig.get_facecolor())
    return buffer.getvalue()


def save(fig: Figure, path: str | Path) -> Path:
    """Write the figure in the format of the path's suffix; the file appears whole or not at all.

    Raises:
        ValueError: if matplotlib cannot write files of this suffix.
        FileNotFoundError: if the folder does not exist.
    """
    path = Path(path)
    known = fig.canvas.get_supported_filetypes()
    suffix = path.suffix[1:].lower()
    if suffix not in known:
        raise ValueError(f"the picture's name must end in one of {', '.join(sorted(known))}, got {path.name!r}")
    buffer = io.BytesIO()
    fig.savefig(buffer, format=suffix, facecolor=fig.get_facecolor())
    files.write(path, buffer.getvalue())
    return path


def curves(panels: Sequence[Panel], mode: Mode = "light", names: Sequence[str] = ()) -> Figure:
    """Panels side by side; each line is labelled at its end with its name and its last number.

    Args:
        panels: what to draw.
        mode: of the page.
        names: these have the first colours, in this order; so a line has one colour in all pictures of a page.
    """
    theme = THEMES[mode]
    fig = figure(4.9 * len(panels), 3.4, theme)
    names = list(dict.fromkeys([*names, *(line.name for panel in panels for line in panel.series)]))
    colours = {name: theme.series[i % len(theme.series)] for i, name in enumerate(names)}
    for i, panel in enumerate(panels):
        axes = _axes(fig, (1, len(panels), i + 1), theme)
        axes.set_title(
            panel.title, loc="left", color=theme.ink, fontsize=11, fontweight="bold", pad=10, parse_math=False
        )
        axes.set_xlabel(panel.along, color=theme.muted, fontsize=9)
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if panel.log and any(value > 0 for line in panel.series for value in line.values):
            axes.set_yscale("log")
            _plain_decades(axes)
        for line in panel.series:
            values = [value if value > 0 or not panel.log else math.nan for value in line.values]
            style: dict[str, Any] = dict(lw=2.0) if line.solid else dict(lw=1.2, ls=(0, (1.5, 1.5)), alpha=0.9)
            axes.plot(line.epochs, values, color=colours[line.name], solid_capstyle="round", **style)
            if panel.dots:
                axes.plot(line.epochs, values, "o", color=colours[line.name], ms=3.5)
            if line.solid:  # also shows a line of one epoch
                axes.plot(line.epochs[-1:], values[-1:], "o", color=colours[line.name], ms=4.5, clip_on=False)
        if panel.floor is not None:
            axes.set_ylim(bottom=panel.floor)
        _end_labels(axes, panel, colours)
    return fig


def receptive_fields(fields: Mapping[str, ERF], thresholds: Sequence[float] = (0.5,), mode: Mode = "light") -> Figure:
    """Receptive fields side by side, each over its own strongest pixel, with the squares of the thresholds."""
    theme = THEMES[mode]
    fig = figure(3.9 * len(fields) + 1.0, 4.2, theme)
    _draw_fields(fig, fields, thresholds, theme)
    return fig


def filters(weights: Mapping[str, Tensor], mode: Mode = "light") -> Figure:
    """First-layer weights ``[O, I, kh, kw]`` of some networks as pictures, one network below the other."""
    theme = THEMES[mode]
    rows = sum(math.ceil(len(weight) / 8) for weight in weights.values())
    fig = figure(4.9, 0.3 * len(weights) + 0.7 * rows, theme)
    _stack_filters(fig, weights, theme)
    return fig


def offsets(offset: Tensor, mode: Mode = "light") -> Figure:
    """Where a 2-D shift moves its channels; ``offset`` is ``[C, 2]`` integers, as ``GroupShift2d.offset``."""
    fig = figure(4.9, 3.4, THEMES[mode])
    _draw_offsets(fig, offset, THEMES[mode])
    return fig


def anatomy(weights: Mapping[str, Tensor], offset: Tensor, fields: Mapping[str, ERF], mode: Mode = "light") -> Figure:
    """What two networks have learnt, in one picture: :func:`filters`, :func:`offsets` and :func:`receptive_fields`."""
    theme = THEMES[mode]
    fig = figure(10.4, 8.6, theme)
    top, bottom = fig.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.18), hspace=0.05).flat
    left, right = top.subfigures(1, 2, squeeze=False, width_ratios=(1.25, 1)).flat
    for part in (top, bottom, left, right):
        part.set_facecolor(theme.paper)
    _stack_filters(left, weights, theme)
    _draw_offsets(right, offset, theme)
    _draw_fields(bottom, fields, (0.5,), theme)
    return fig


def gallery(images: Tensor, captions: Sequence[str], right: Sequence[bool], mode: Mode = "light") -> Figure:
    """Gray pictures ``[N, H, W]`` in rows of four with a caption under each; those that are not ``right`` stand out."""
    theme = THEMES[mode]
    rows = math.ceil(len(images) / 4)
    fig = figure(4.9, 1.45 * rows, theme)
    for i, (image, caption, good) in enumerate(zip(images, captions, right, strict=True)):
        axes = fig.add_subplot(rows, 4, i + 1)
        axes.imshow(image.numpy(), cmap="gray", interpolation="nearest")
        colour = theme.muted if good else theme.series[1]
        axes.set_xlabel(caption, color=colour, fontsize=9, fontweight="normal" if good else "bold")
        _bare(axes, None if good else colour)
    return fig


def _axes(fig: Any, position: tuple[int, int, int], theme: Theme) -> Axes:
    axes = fig.add_subplot(*position, facecolor=theme.paper)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0, which="both")
    axes.grid(axis="y", color=theme.faint, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    return axes


def _bare(axes: Axes, frame: str | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(frame is not None)
        if frame is not None:
            spine.set(color=frame, linewidth=2)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=6, min_n_ticks=1)


def _plain_decades(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _end_labels(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    """Names at the ends of the solid lines, moved apart where they would touch."""
    lines = [line for line in panel.series if line.solid and len(line.values)]
    axes.autoscale_view()
    low, high = axes.get_ylim()
    scale = math.log10 if axes.get_yscale() == "log" else float
    ends = [line.values[-1] if math.isfinite(line.values[-1]) else low for line in lines]
    heights = [(scale(min(max(end, low), high)) - scale(low)) / (scale(high) - scale(low)) for end in ends]
    crowded = len(lines) > 3
    for line, y in zip(lines, apart(heights, 0.085 if crowded else 0.13), strict=True):
        note = f"{line.values[-1]:.3g}{panel.unit}" if line.note is None else line.note
        axes.annotate(
            f"{note} {_short(line.name)}" if crowded else f"{_short(line.name)}\n{note}",
            (1.0, y),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            color=colours[line.name],
            fontsize=9,
            fontweight="bold",
            va="center",
            linespacing=1.1,
            parse_math=False,
        )
    axes.margins(x=0)


def _short(name: str, most: int = 20) -> str:
    """The name, or its start and its end, which tell runs of one family apart."""
    return name if len(name) <= most else f"{name[: most // 2]}\u2026{name[1 - most // 2 :]}"


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, 0..1, moved as little as it takes to be ``gap`` apart and at most 0.96."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    ceiling = 0.96
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _stack_filters(fig: Any, weights: Mapping[str, Tensor], theme: Theme) -> None:
    parts = fig.subfigures(len(weights), 1, squeeze=False).flat
    for part, (name, weight) in zip(parts, weights.items(), strict=True):
        part.set_facecolor(theme.paper)
        _draw_filters(part, name, weight, theme)


def _draw_filters(fig: Any, name: str, weight: Tensor, theme: Theme) -> None:
    """Each filter as a picture; three input channels are its red, green and blue, others are averaged to gray."""
    weight = weight.detach().float().cpu()
    fig.suptitle(f"First filters of {name}", x=0.01, ha="left", color=theme.ink, fontsize=11, fontweight="bold")
    columns = min(8, len(weight))
    bound = weight.abs().max().clamp_min(1e-12)
    for i, kernel in enumerate(weight):
        axes = fig.add_subplot(math.ceil(len(weight) / columns), columns, i + 1)
        if len(kernel) == 3:
            axes.imshow((kernel / bound / 2 + 0.5).permute(1, 2, 0).numpy(), interpolation="nearest")
        else:
            axes.imshow(kernel.mean(0).numpy(), cmap="gray", vmin=-float(bound), vmax=float(bound))
        _bare(axes, None)


def _draw_offsets(fig: Any, offset: Tensor, theme: Theme) -> None:
    """Where each group of channels goes: an arrow from the pixel that is read to the pixel that is written."""
    moves, counts = offset.detach().cpu().unique(dim=0, return_counts=True)
    reach = max(1, int(moves.abs().max()))
    fig.suptitle("Where the shift moves channels", x=0.02, ha="left", color=theme.ink, fontsize=11, fontweight="bold")
    axes = fig.add_subplot(facecolor=theme.paper)
    for (dy, dx), count in zip(moves.tolist(), counts.tolist(), strict=True):
        moved = dy or dx
        if moved:
            # The ends stay clear of the two labels by the same distance in every direction.
            start, end = 0.27 / math.hypot(dy, dx), 1 - 0.16 / math.hypot(dy, dx)
            arrow = dict(arrowstyle="-|>,head_width=0.28,head_length=0.5", color=theme.series[0], lw=1.6)
            axes.annotate("", (dx * end, dy * end), (dx * start, dy * start), arrowprops=arrow)
        text = f"{count}" if moved else f"{count}\nstay"
        axes.text(dx, dy, text, ha="center", va="center", color=theme.ink, fontsize=10, linespacing=1.05)
    axes.set(xlim=(-reach - 0.45, reach + 0.45), ylim=(reach + 0.35, -reach - 0.35), aspect="equal")
    axes.set_xlabel("channels by the direction that their content moves in", color=theme.muted, fontsize=9)
    _bare(axes, None)


def _draw_fields(fig: Any, fields: Mapping[str, ERF], thresholds: Sequence[float], theme: Theme) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle as Box
    from matplotlib.patheffects import Normal, Stroke

    picture, places = None, []
    for i, (name, field) in enumerate(fields.items()):
        axes = fig.add_subplot(1, len(fields), i + 1, facecolor=theme.paper)
        places.append(axes)
        peak = float(field.matrix.max())
        relative = (field.matrix / peak if peak else field.matrix).clamp_min(FLOOR)
        picture = axes.imshow(relative.numpy(), cmap="viridis", norm=LogNorm(FLOOR, 1), interpolation="nearest")
        height, width = field.matrix.shape
        for threshold in thresholds:
            square = field.rectangle(threshold)
            if square is None:
                continue
            left, top = width // 2 - square.side / 2, height // 2 - square.side / 2
            axes.add_patch(Box((left, top), square.side, square.side, fill=False, ec="white", lw=1.6))
            label = f"{threshold:.0%} in {square.side} x {square.side}"
            text = axes.text(left, top - height / 60, label, color="white", fontsize=9, fontweight="bold", va="bottom")
            text.set_path_effects([Stroke(linewidth=2.5, foreground="#20242a"), Normal()])
        axes.set_title(_short(name, 34), loc="left", color=theme.ink, fontsize=11, fontweight="bold", parse_math=False)
        axes.set_xlabel(f"{width} x {height} pixels, {field.images} images", color=theme.muted, fontsize=9)
        _bare(axes, None)
    if picture is None:
        raise ValueError("there is no receptive field to draw")
    bar = fig.colorbar(picture, ax=places, shrink=0.86, pad=0.02)
    bar.set_label("effect on the centre, relative to the strongest pixel", color=theme.muted, fontsize=9)
    bar.ax.tick_params(colors=theme.muted, labelsize=9, length=0, which="both")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bar.outline.set_visible(False)
