"""Draw the results of the shift and of the large kernels into ``docs/assets``: ``python -m benchmarks.plot``.

For each case and direction the newest row of a candidate counts, with one thread.
"""

import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
DIRECTIONS = ("forward", "forward+backward")
STYLES = {
    "shift": ("shiftconv shift", "#1b6ca8"),
    "slices": ("torch slice assignment", "#c7c7c7"),
    "conv": ("torch depthwise 3x3, best layout", "#e08e45"),
}


def newest(op: str = "shift") -> tuple[dict[tuple[str, str, str], float], dict[str, str]]:
    """``{(case, direction, candidate): time over the baseline's}`` of the newest rows, and one of these rows."""
    found: dict[tuple[str, str, str], float] = {}
    last: dict[str, str] = {}
    with (ROOT / f"benchmarks/results/{op}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["threads"] == "1":
                found[row["case"], row["direction"], row["candidate"]] = float(row["ratio"])
                last = row
    return found, last


def main() -> None:
    shift()
    large_kernels()


def large_kernels() -> None:
    """How many times as fast as the baseline the cross operator and the shift-wise one are, forward and in training."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=(2, 1))
    last: dict[str, str] = {}
    panels = (
        ("cross_conv", "cross_conv", "tall + wide + small against three of torch's convolutions", " batch 1 "),
        ("shiftwise", "shiftwise", "shift-wise, 4 shifts, against the original", " 1 shifts "),
    )
    for axis, (op, candidate, title, without) in zip(axes, panels, strict=True):
        found, last = newest(op)
        cases = list(
            dict.fromkeys(c for c, _, name in found if name == candidate and "float32" in c and without not in c)
        )
        for i, direction in enumerate(DIRECTIONS):
            at = [k + (i - 0.5) * 0.4 for k in range(len(cases))]
            values = [1 / found[case, direction, candidate] for case in cases]
            drawn = axis.bar(at, values, 0.37, label=direction, color=("#1b6ca8", "#7fb2d6")[i])
            axis.bar_label(drawn, fmt="%.1f" if op == "cross_conv" else "%.0f", fontsize=7, padding=1)
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(cases)), ["\n".join(case.split(" ")[:3]) for case in cases], fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("times as fast (higher is better)")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{last['machine']}, one thread, float32, torch {last['torch']}, {last['date']}", fontsize=10)
    target = ROOT / "docs/assets/benchmark_large_kernels.png"
    figure.savefig(target, dpi=110)
    print(target)


def shift() -> None:
    """The shift over a copy, beside its rivals."""
    found, last = newest()
    cases = list(dict.fromkeys(case for case, *_ in found if case.endswith(("nchw", "channels_last"))))
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), sharey="row", layout="constrained")
    for row, direction in zip(axes, DIRECTIONS, strict=True):
        for axis, layout in zip(row, ("nchw", "channels_last"), strict=True):
            shown = [case for case in cases if case.endswith(layout)]
            bars: dict[str, list[float]] = {"shift": [], "slices": [], "conv": []}
            for case in shown:
                ratio = {name: found.get((case, direction, name), float("nan")) for name in ("shift", "slices")}
                conv = [
                    found.get((case, direction, f"conv3x3 {name}"), float("nan")) for name in ("nchw", "channels_last")
                ]
                for name, value in (*ratio.items(), ("conv", min(conv))):
                    bars[name].append(value)
            draw(axis, shown, bars)
            axis.set_title(f"{direction}, {layout.replace('_', ' ')}")
        row[0].set_ylabel("time over that of copying")
    axes[0, 0].legend(frameon=False, loc="upper left")
    machine = f"{last['machine']}, one thread, float32, torch {last['torch']}, {last['date']}"
    figure.suptitle(f"Shift by the 3x3 neighbourhood: as cheap as a copy? (lower is better)\n{machine}", fontsize=12)
    target = ROOT / "docs/assets/benchmark_shift.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    print(target)


def draw(axis: Axes, cases: list[str], bars: dict[str, list[float]]) -> None:
    """Grouped bars, a line at the cost of a copy, a figure on each bar."""
    present = [name for name, values in bars.items() if any(value == value for value in values)]
    width = 0.8 / len(present)
    for i, name in enumerate(present):
        label, color = STYLES[name]
        at = [k + (i - (len(present) - 1) / 2) * width for k in range(len(cases))]
        drawn = axis.bar(at, bars[name], width * 0.92, label=label, color=color)
        axis.bar_label(drawn, fmt="%.1f", fontsize=7, padding=1)
    axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(cases)), [case.rsplit(" ", 1)[0].replace(" ", "\n") for case in cases], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
