"""Draw the picture of docs/large_kernels.md by the operators: ``python docs/assets/draw_large_kernels.py``."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from shiftconv.nn import ShiftwiseConv2d
from shiftconv.ops import compose

HERE = Path(__file__).parent
INK = "#444444"
LONG, SMALL = 13, 3


def paint(axes: Axes, owner: Tensor, taps: Tensor, title: str) -> None:
    """A kernel whose taps have the hue of the small kernel that they are from, dark where they are large."""
    hues = plt.get_cmap("tab10")(owner.clamp_min(0).numpy() % 10)[..., :3]
    strength = (0.25 + 0.75 * taps.abs() / taps.abs().max())[..., None].numpy()
    image = np.where(owner[..., None].numpy() < 0, 1.0, 1 - strength * (1 - hues))
    axes.imshow(image)
    rows, columns = owner.shape
    for at in np.arange(-0.5, columns, SMALL):
        axes.axvline(at, color=INK, linewidth=0.6)
    for at in np.arange(-0.5, rows, SMALL):
        axes.axhline(at, color=INK, linewidth=0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)


def main() -> None:
    generator = torch.Generator().manual_seed(5)
    layer = ShiftwiseConv2d(1, LONG, SMALL)
    slots = layer.slots
    weight = torch.randn(slots, 1, SMALL, SMALL, generator=generator)
    owners = torch.arange(float(slots)).view(-1, 1, 1, 1).expand(slots, 1, SMALL, SMALL)

    def both(placement: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        kernels = [compose(kernel, placement, grid)[0, 0] for kernel in (owners, weight)]
        return kernels[0].round().long(), kernels[1]

    tall = torch.zeros(1, slots, slots).scatter(1, layer.get_buffer("tall_slots").long().transpose(1, 2), 1)
    wide = torch.zeros(1, slots, slots).scatter(1, layer.get_buffer("wide_slots").long().transpose(1, 2), 1)
    figure = plt.figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    panels = left.subplots(2, 1)
    paint(panels[0], *both(None, (1, slots)), f"the {slots} small kernels of one channel, {SMALL}x{SMALL} each")
    paint(panels[1], *both(wide, (1, slots)), "the wide kernel: the same in a random order")

    # The cross: the wide kernel over the tall one, each where its padding puts it.
    side = LONG + 6
    owner, taps = torch.full((side, side), -1), torch.zeros(side, side)
    middle = side // 2
    for placement, grid in ((tall, (slots, 1)), (wide, (1, slots))):
        which, values = both(placement, grid)
        top = middle - (LONG // 2 if grid[0] > 1 else SMALL // 2)
        start = middle - (LONG // 2 if grid[1] > 1 else SMALL // 2)
        place = (slice(top, top + values.shape[0]), slice(start, start + values.shape[1]))
        owner[place], taps[place] = which, values
    axes = right.subplots()
    paint(axes, owner, taps, f"tall and wide together: the reach of {LONG}x{LONG}")
    for line in list(axes.lines):
        line.remove()
    axes.plot(middle, middle, "o", color="white", markeredgecolor=INK, markersize=6)
    figure.savefig(HERE / "large_kernels_compose.png", dpi=110)


if __name__ == "__main__":
    main()
