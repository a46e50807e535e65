"""What sparse training has made of a model, as a table and a picture."""

# matplotlib does not type everything it takes.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shiftconv.sparse.group import SparseGroup


@dataclass(frozen=True)
class LayerSparsity:
    """One mask.

    Attributes:
        name: of the group.
        entries: that can be active.
        active: that are.
        unreachable: that never can be.
        explored: the share of the entries that were active at any time, 0..1 (ITOP's exploration rate).
        churn: the share of the active entries that the last update brought, 0..1.
        dead_kernels: whole kernels that are zero; of a linear layer, or a 1x1 convolution, whole outputs.
        kernels: how many there are.
    """

    name: str
    entries: int
    active: int
    unreachable: int
    explored: float
    churn: float
    dead_kernels: int
    kernels: int

    @property
    def density(self) -> float:
        return self.active / max(self.entries, 1)


@dataclass(frozen=True)
class SparsityReport:
    """All masks after ``steps`` of the optimiser and ``updates`` of the masks."""

    layers: tuple[LayerSparsity, ...]
    steps: int
    updates: int

    @property
    def density(self) -> float:
        """Active entries of all that can be active."""
        return sum(layer.active for layer in self.layers) / max(sum(layer.entries for layer in self.layers), 1)

    @property
    def explored(self) -> float:
        """The share of all entries that were active at any time."""
        entries = sum(layer.entries for layer in self.layers)
        return sum(layer.explored * layer.entries for layer in self.layers) / max(entries, 1)

    def __str__(self) -> str:
        columns = ("layer", "entries", "active", "density", "explored", "churn", "dead kernels")
        rows = [
            (
                layer.name,
                f"{layer.entries:,}",
                f"{layer.active:,}",
                f"{layer.density:.4f}",
                f"{layer.explored:.4f}",
                f"{layer.churn:.4f}",
                f"{layer.dead_kernels:,} of {layer.kernels:,}",
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in (columns, *rows)
        ]
        unreachable = sum(layer.unreachable for layer in self.layers)
        beyond = f"; {unreachable:,} more that no output can reach" if unreachable else ""
        total = f"density {self.density:.4f}, explored {self.explored:.4f}, after {self.updates} updates"
        return "\n".join([*lines, f"{total} in {self.steps} steps{beyond}"])

    def plot(self, path: str | Path) -> Path:
        """Draw density, exploration and churn of each layer into a PNG, SVG or PDF file.

        Raises:
            ImportError: matplotlib is missing; says what brings it.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('pictures need matplotlib: pip install "shiftconv[demo]"') from error
        path, layers = Path(path), self.layers[::-1]  # the first layer on top
        figure = Figure(figsize=(9, 1.4 + 0.2 * len(layers)), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        panels = (
            ("density", "#0072b2", [layer.density for layer in layers]),
            ("explored", "#007a5a", [layer.explored for layer in layers]),
            ("churn", "#c14f00", [layer.churn for layer in layers]),
        )
        axes = figure.subplots(1, len(panels), sharey=True)
        for axis, (title, colour, values) in zip(axes, panels, strict=True):
            axis.barh([layer.name for layer in layers], values, color=colour, height=0.7)
            axis.set_title(title, fontsize=9, loc="left")
            axis.set_xlim(0, 1 if values is not panels[-1][2] else 1.1 * max(*values, 0.01))
            axis.margins(y=0.01)
            axis.tick_params(labelsize=7, length=0)
            axis.spines[["top", "right", "left"]].set_visible(False)
        figure.suptitle(str(self).splitlines()[-1], fontsize=9, x=0.01, ha="left")
        figure.savefig(path)
        return path


def report(groups: Sequence[SparseGroup], steps: int, updates: int) -> SparsityReport:
    """Look at the masks."""
    return SparsityReport(tuple(map(_layer, groups)), steps, updates)


def _layer(group: SparseGroup) -> LayerSparsity:
    active, capacity = group.active, group.capacity
    mask = group.mask.movedim(-1, 1) if group.members[0].inputs_last else group.mask
    kernels = mask.flatten(2).any(2) if len(group.shape) > 2 else mask
    if len(group.shape) > 1 and group.members[0].weight[0, 0].numel() == 1:
        kernels = kernels.any(1)
    explored = int(group.explored.sum()) / max(capacity, 1)
    dead = int((~kernels).sum())
    return LayerSparsity(
        group.name,
        capacity,
        active,
        group.size - capacity,
        explored,
        group.exchanged / max(active, 1),
        dead,
        kernels.numel(),
    )
