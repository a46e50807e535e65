"""The pictures and the page of the demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shiftconv._version import __version__
from shiftconv.analysis import draw
from shiftconv.analysis.report import Block, Commands, Facts, Picture, Pictures, Report, Section, Table, write_report
from shiftconv.nn import GroupShift2d
from shiftconv.ops import backend
from shiftconv.train.data.images import MemoryImages

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from shiftconv.analysis import ERF
    from shiftconv.recipes.demo import DemoResult
    from shiftconv.train.data import DataSets
    from shiftconv.train.loop import Result


@dataclass(frozen=True)
class Findings:
    """What the page shows, by network where there are several."""

    runs: Mapping[str, Result]
    models: Mapping[str, nn.Module]
    fields: Mapping[str, ERF]
    data: DataSets


def write(folder: Path, result: DemoResult, findings: Findings) -> None:
    """Write curves.png, receptive_field.png and report.html."""
    panels = _panels(findings.runs)
    weights = {name: _first_filters(model) for name, model in findings.models.items()}
    offset = _first_offset(findings.models[result.networks[0].name])
    draw.save(draw.curves(panels), folder / "curves.png")
    draw.save(draw.anatomy(weights, offset, findings.fields), folder / "receptive_field.png")
    sections = [
        Section("Side by side", [_table(result)]),
        Section("Learning", [_curves(panels)]),
        Section("What one output sees", [*_fields(result, findings.fields)]),
        Section("Inside", [*_inside(weights, offset)]),
        Section("Reading", [*_reading(findings.models[result.networks[0].name], findings.data)]),
        Section("Go on from here", [Commands(result.commands())]),
        Section("Made with", [Facts(_environment(result, findings.data))]),
    ]
    write_report(Report(*_title(result), sections=sections, footer=f"shiftconv {__version__}"), folder / "report.html")


def _title(result: DemoResult) -> tuple[str, str, list[tuple[str, str]]]:
    shift, other = result.networks
    lead = (
        f"{shift.name} has no spatial convolution after its first layer: it moves channels by one pixel, which costs "
        f"no arithmetic, and mixes them with 1 x 1 convolutions. Here it learnt to read real handwritten digits beside "
        f"{other.name}, a residual network cut down to the same number of parameters."
    )
    headline = [
        (f"{shift.accuracy:.1%}", f"of test images read rightly by {shift.name}"),
        (f"{other.accuracy:.1%}", f"by {other.name} of equal size"),
        (f"{shift.parameters:,}", f"parameters of {shift.name}"),
        (f"{result.seconds:.0f} s", "to train and measure both"),
    ]
    return "A shift network reads digits", lead, headline


def _table(result: DemoResult) -> Table:
    caption = (
        "Accuracy is on test images that chose nothing. MACs are the exact multiply-accumulates of convolutions and "
        "matrix products for one image; a shift has none. Images per second: inference in float32 on one thread, in "
        "batches of 64; median of rounds in which the networks took turns. Speed: relative to the slower one."
    )
    return Table(result.columns(), result.rows(), caption, coloured=True)


def _panels(runs: Mapping[str, Result]) -> list[draw.Panel]:
    def lines(key: str, scale: float = 1, solid: bool = True) -> list[draw.Series]:
        return [
            draw.Series(
                name,
                [int(row["epoch"]) for row in run.history],
                [scale * float(row[key]) for row in run.history],
                solid,
            )
            for name, run in runs.items()
        ]

    accuracy = lines("val_accuracy", 100)
    best = max(max(line.values) for line in accuracy)
    floor = 80.0 if best > 90 else None  # the interesting part, once there is one
    loss = lines("val_loss") + lines("train_loss", solid=False)
    return [
        draw.Panel("Loss", loss, log=True),
        draw.Panel("Validation accuracy, %", accuracy, floor=floor, unit=" %"),
    ]


def _curves(panels: list[draw.Panel]) -> Pictures:
    loss, accuracy = panels
    pictures = [
        _picture(f"Loss over epochs: {_ends(loss)}", lambda mode: draw.curves([loss], mode)),
        _picture(f"Validation accuracy over epochs: {_ends(accuracy)}", lambda mode: draw.curves([accuracy], mode)),
    ]
    caption = (
        "Solid lines are on the validation images. Dotted ones are the loss in training, which stays higher because "
        "the targets are smoothed and the images cropped at random."
    )
    return Pictures(pictures, caption)


def _ends(panel: draw.Panel) -> str:
    return ", ".join(f"{s.name} ends at {s.values[-1]:.3g}{panel.unit}" for s in panel.series if s.solid)


def _fields(result: DemoResult, fields: Mapping[str, ERF]) -> list[Block]:
    text = (
        "The effective receptive field: how much each pixel of the image changes the centre of the last feature map, "
        "on a logarithmic scale."
    )
    sides = {network.name: network.erf_half_side for network in result.networks}

    def one(name: str) -> Picture:
        where = f"half of it within {sides[name]} x {sides[name]} pixels" if sides[name] else "spread over the image"
        alt = f"Effective receptive field of {name}: {where}"
        return _picture(alt, lambda mode: draw.receptive_fields({name: fields[name]}, mode=mode))

    caption = "The square holds half of all contributions."
    return [text, Pictures([one(name) for name in fields], caption)]


def _inside(weights: Mapping[str, Tensor], offset: Tensor) -> list[Block]:
    text = (
        "Both begin with 3 x 3 filters on the image. From there on the shift network sees its surroundings only by the "
        "pattern of arrows: each group of channels is moved by one pixel in its own direction."
    )
    pictures = [
        _picture("The 3 x 3 filters of both first layers", lambda mode: draw.filters(weights, mode)),
        _picture("Arrows: where the first shift moves its channels", lambda mode: draw.offsets(offset, mode)),
    ]
    caption = "Filters: red, green and blue are the input channels, and gray is zero. Shift: that of the first block."
    return [text, Pictures(pictures, caption)]


def _reading(model: nn.Module, data: DataSets) -> list[Block]:
    """A few test images that the network reads rightly, of different digits, and some of those that it does not."""
    import torch

    assert isinstance(data.test, MemoryImages)
    device = next(model.parameters()).device
    with torch.inference_mode():
        guesses = torch.cat([model(images.to(device)).argmax(1).cpu() for images, _ in data.loader("test", 256)])
    pictures, labels = data.test.images, data.test.labels
    wrong = (guesses != labels).nonzero().flatten()
    right = [int((labels == digit).logical_and(guesses == labels).nonzero()[:1].sum()) for digit in range(8)]
    shown = [(right, "Some test images that were read rightly")]
    if len(wrong):
        shown.append(
            ([int(i) for i in wrong[:8]], "Test images that were not read rightly, with the reading and the truth")
        )

    def one(index: list[int], alt: str) -> Picture:
        pairs = [(data.class_names[guesses[i]], data.class_names[labels[i]]) for i in index]
        captions = [guess if guess == truth else f"{guess}, is {truth}" for guess, truth in pairs]
        same = [guess == truth for guess, truth in pairs]
        return _picture(alt, lambda mode: draw.gallery(pictures[index, 0], captions, same, mode))

    missed = f"{len(wrong)} of {len(labels)} test images were misread" if len(wrong) else "No test image was misread"
    text = f"{missed}; an image is 8 x 8 pixels, enlarged to 32 x 32."
    return [text, Pictures([one(*group) for group in shown])]


def _environment(result: DemoResult, data: DataSets) -> dict[str, str]:
    facts = {name: value for name, value in backend.environment().items() if name not in ("cache folder", "compiled")}
    choice = backend.explain("shift", "cpu")[0]
    images = ", ".join(f"{len(part or ())} {name}" for name, part in _parts(data).items())
    return {
        "data": f"{data.name} of scikit-learn: {images} images",
        "training": f"{result.networks[0].epochs} epochs each, seed {result.seed}",
        "shift on the CPU": f"{choice.backend} kernel",
        **facts,
    }


def _parts(data: DataSets) -> dict[str, MemoryImages | None]:
    parts = {"training": data.train, "validation": data.val, "test": data.test}
    return {name: part for name, part in parts.items() if isinstance(part, MemoryImages)}


def _first_filters(model: nn.Module) -> Tensor:
    return next(parameter for parameter in model.parameters() if parameter.ndim == 4)


def _first_offset(model: nn.Module) -> Tensor:
    return next(module.offset for module in model.modules() if isinstance(module, GroupShift2d))


def _picture(alt: str, make: Callable[[draw.Mode], Figure]) -> Picture:
    return Picture(alt, draw.png(make("light")), draw.png(make("dark")))
