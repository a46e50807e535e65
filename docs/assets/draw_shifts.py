"""Draw the pictures of docs/shifts.md with the operators themselves: ``python docs/assets/draw_shifts.py``."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import Tensor

from shiftconv import ops

HERE = Path(__file__).parent
PADDINGS: tuple[ops.PaddingMode, ...] = ("zeros", "replicate", "circular", "reflect", "symmetric")
ACTIVE, SPARSE, INK = "#1b6ca8", "#e08e45", "#444444"


def cells(axes: Axes, row: Tensor, text: list[str], at: int, colours: ListedColormap) -> None:
    """A row of coloured cells with letters, at height ``at``; zero is an empty cell."""
    for i, value in enumerate(row.tolist()):
        face = "white" if value == 0 else colours(int(value))
        axes.add_patch(plt.Rectangle((i, at), 1, 0.8, facecolor=face, edgecolor=INK, linewidth=0.8))
        axes.text(i + 0.5, at + 0.38, text[int(value)], ha="center", va="center", color=INK)


def sign() -> None:
    """A map, and what an offset of (1, 2) makes of it."""
    image = torch.zeros(1, 1, 7, 8)
    image[0, 0, 1:5, 1] = image[0, 0, 4, 1:4] = 1.0
    image[0, 0, 1, 6] = 0.55
    offset = torch.tensor([[1, 2]])
    maps = {
        "x": image,
        "shift(x, (1, 2)): 1 down, 2 to the right": ops.shift(image, offset),
        "active_shift(x, (0.5, 2))": ops.active_shift(image, torch.tensor([[0.5, 2.0]])),
    }
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.4), layout="constrained")
    for axes, (title, y) in zip(panels, maps.items(), strict=True):
        axes.imshow(y[0, 0], cmap="Blues", vmin=0, vmax=1.15)
        axes.set_xticks(np.arange(-0.5, 8), minor=True)
        axes.set_yticks(np.arange(-0.5, 7), minor=True)
        axes.grid(which="minor", color=INK, linewidth=0.4)
        axes.tick_params(which="minor", length=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("w, offset[:, 1]")
    panels[0].set_ylabel("h, offset[:, 0]")
    figure.savefig(HERE / "shifts_sign.png", dpi=110)


def paddings() -> None:
    """The row a b c d e moved by +2 and by -3 under each padding mode."""
    row = torch.arange(1.0, 6).view(1, 1, 5)
    colours = ListedColormap(["white", *[plt.get_cmap("Spectral")(v) for v in np.linspace(0.15, 0.85, 5)]])
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.4), layout="constrained")
    extended, moved = [(-4, -4)], {1: 2, 2: -3}
    for at, mode in enumerate(reversed(PADDINGS)):
        wide = ops.shift(row, torch.zeros(1, 1, dtype=torch.int64), mode, crop=extended)[0, 0]
        cells(panels[0], wide, ["0", *"abcde"], at, colours)
        panels[0].text(-0.3, at + 0.4, mode, ha="right", va="center")
        for panel, offset in moved.items():
            cells(panels[panel], ops.shift(row, torch.tensor([[offset]]), mode)[0, 0], ["0", *"abcde"], at, colours)
    panels[0].plot([4, 4, 9, 9, 4], [-0.1, 4.9, 4.9, -0.1, -0.1], color="#c0392b", linewidth=2)
    panels[0].set_title("the row a b c d e as each mode extends it", fontsize=10)
    for panel, offset in moved.items():
        panels[panel].set_title(f"moved by {offset:+d}", fontsize=10)
    for axes, left, right in zip(panels, (-3.6, -0.2, -0.2), (13.2, 5.2, 5.2), strict=True):
        axes.set_xlim(left, right)
        axes.set_ylim(-0.3, 5.1)
        axes.axis("off")
    figure.savefig(HERE / "shifts_paddings.png", dpi=110)


def rounding() -> None:
    """One output pixel as a function of the offset, and its derivative."""
    row = torch.tensor([0.2, 0.9, 0.4, 1.0, 0.1, 0.6, 0.3]).view(1, 1, 7)
    offset = torch.linspace(-2.999, 2.999, 1501)
    x = row.expand(1, len(offset), 7)
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.2), sharex=True, layout="constrained")
    for name, operator, colour in (
        ("active_shift", ops.active_shift, ACTIVE),
        ("sparse_shift", ops.sparse_shift, SPARSE),
    ):
        learned = offset[:, None].clone().requires_grad_()
        y = operator(x, learned)[0, :, 3]
        (slope,) = torch.autograd.grad(y.sum(), learned)
        style = "-" if name == "active_shift" else (0, (5, 4))
        above.plot(offset, broken(y.detach()), color=colour, label=name)
        below.plot(offset, broken(slope[:, 0]), color=colour, linestyle=style)
    whole = torch.arange(-2, 3)
    above.plot(whole, row[0, 0, 3 - whole], "o", color=INK, markersize=5, label="whole offsets: both agree with shift")
    halves = torch.arange(-2.5, 3)
    above.plot(halves, ops.sparse_shift(row.expand(1, 6, 7), halves[:, None])[0, :, 3], "s", color=SPARSE, markersize=5)
    above.set_ylabel("y[3]")
    above.set_title(
        "one output pixel of a row, as its channel's offset grows (squares: halves round to even)", fontsize=10
    )
    below.set_ylabel("gradient of the offset")
    below.set_xlabel("offset in pixels")
    for axes in (above, below):
        axes.grid(color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    above.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    above.set_ylim(0, 1.3)
    figure.savefig(HERE / "shifts_rounding.png", dpi=110)


def broken(curve: Tensor) -> Tensor:
    """The curve without the upright lines where it jumps."""
    return curve.where(curve.diff(prepend=curve[:1]).abs() < 0.1, torch.nan)


def smooth_image(size: int) -> Tensor:
    """A few random waves, ``[1, 1, size, size]``."""
    generator = torch.Generator().manual_seed(3)
    h, w = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = torch.zeros(size, size)
    for _ in range(6):
        a, b, phase = torch.rand(3, generator=generator).tolist()
        image += torch.sin(0.55 * (a - 0.5) * h + 0.55 * (b - 0.5) * w + 6.3 * phase)
    return image[None, None]


def gradients() -> None:
    """Recover an offset of (2, -1) by gradient descent: the paths, over the loss of the active shift."""
    x = smooth_image(32)
    target = ops.shift(x, torch.tensor([[2, -1]]), "reflect")
    grid = torch.linspace(-3, 4, 71)
    heights, widths = torch.meshgrid(grid, grid, indexing="ij")
    offsets = torch.stack((heights.flatten(), widths.flatten()), 1)
    many = x.expand(1, len(offsets), 32, 32)
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.4), sharey=True, layout="constrained")
    for axes, (name, operator, colour) in zip(
        panels,
        (("active_shift", ops.active_shift, ACTIVE), ("sparse_shift", ops.sparse_shift, SPARSE)),
        strict=True,
    ):
        loss = (operator(many, offsets, "reflect") - target).square().mean((0, 2, 3)).view(71, 71)
        axes.contourf(grid, grid, loss.sqrt(), levels=14, cmap="Greys", alpha=0.75)
        for start in ((-2.4, 2.6), (0.3, 0.2), (3.4, 3.1), (-2.2, -2.4)):
            path = descend(operator, x, target, start)
            axes.plot(path[:, 1], path[:, 0], "-", color=colour, linewidth=1.6)
            axes.plot(path[0, 1], path[0, 0], "o", color=colour, markersize=5)
        axes.plot(-1, 2, "*", color="#c0392b", markersize=13)
        axes.set_title(f"{name}: loss (grey) and four descents", fontsize=10)
        axes.set_xlabel("offset[:, 1]")
        axes.set_xlim(-3, 4)
        axes.set_ylim(4, -3)
    panels[0].set_ylabel("offset[:, 0]")
    figure.savefig(HERE / "shifts_gradients.png", dpi=110)


def descend(operator, x: Tensor, target: Tensor, start: tuple[float, float]) -> Tensor:
    """The offsets that plain SGD visits, ``[steps, 2]``."""
    offset = torch.tensor([start], requires_grad=True)
    optimizer = torch.optim.SGD([offset], lr=0.4)
    path = [offset.detach().clone()]
    for _ in range(600):
        optimizer.zero_grad()
        (operator(x, offset, "reflect") - target).square().mean().backward()
        optimizer.step()
        path.append(offset.detach().clone())
    return torch.cat(path)


if __name__ == "__main__":
    for draw in (sign, paddings, rounding, gradients):
        draw()
