"""The verbs of the command line but ``train``: each function is one, and its signature its options.

Nothing heavy is imported before a verb runs, so ``--help`` and mistakes are answered at once.
"""

import fnmatch
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from shiftconv.names import closest

ModelArgs = dict[str, Any]


def line(*lines: str) -> None:
    """Plain lines on stdout, exactly as they are."""
    sys.stdout.writelines(f"{text}\n" for text in lines)


def show(*renderables: Any) -> None:
    """Tables and styled text on stdout; without colour and boxes' colours when it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    for renderable in renderables:
        console.print(renderable)


def demo(out: Path = Path("shiftconv-demo"), seed: int = 0, epochs: int | None = None) -> None:
    """Train a shift network beside a ResNet of equal size on real digits: offline, two minutes, with a report.

    Args:
        out: folder for the pictures, the report and both runs.
        seed: seed of both runs.
        epochs: passes over the training images; the recipes' number unless given.
    """
    from shiftconv.recipes.demo import demo as run
    from shiftconv.train.progress import RichProgress

    result = run(out, seed=seed, epochs=epochs, progress=RichProgress())
    show(result.table())
    line(*result.next_steps())


def list_(what: Sequence[str] = (), pattern: str = "*") -> None:
    """Name the networks, the recipes and the data sets.

    Args:
        what: models, recipes or data, and patterns such as 'slak*'; all unless given.
        pattern: only names that match, the same as the pattern alone.
    """
    from shiftconv import models, recipes
    from shiftconv.train import data

    names = {
        "models": (models.list_models(), "shiftconv count NAME"),
        "recipes": (recipes.names(), "shiftconv train NAME"),
        "data": (data.names(), "shiftconv train RECIPE --data.name NAME"),
    }
    kinds = [word for word in what if word in names] or [*names]
    patterns = [word for word in what if word not in (*names, "all")] or [pattern]
    known = [name for kind in kinds for name in names[kind][0]]
    for word in patterns:
        if not fnmatch.filter(known, word):
            close = closest(word, [*names, *known])
            raise ValueError(f"no name matches {word!r}" + (f"; did you mean {close}?" if close else ""))
    for kind in kinds:
        if matching := [name for name in names[kind][0] if any(fnmatch.fnmatch(name, word) for word in patterns)]:
            line(f"{kind}    ({names[kind][1]})", *(f"  {name}" for name in matching))


def evaluate(
    checkpoint: Path,
    data: str | None = None,
    folder: Path | None = None,
    image_size: int | None = None,
    split: Literal["train", "val", "test"] = "test",
    batch_size: int = 256,
    ema: bool = False,
    device: str | None = None,
) -> None:
    """Evaluate a checkpoint: ours, a released .t7, .pth or .safetensors; the network is read from the file.

    Args:
        checkpoint: the file; --checkpoint FILE does as well.
        data: digits, cifar10, cifar100, or folder; that of the checkpoint's own run unless given.
        folder: where the images are, or go to.
        image_size: side of the images in pixels; that of the checkpoint's own run, or of the data set, unless given.
        split: which part of the data set.
        batch_size: images at a time.
        ema: take the averaged weights of the file.
        device: cpu, cuda, cuda:1 ...; the GPU when there is one unless given.
    """
    from shiftconv.models.convert import load_checkpoint, read_checkpoint
    from shiftconv.train.checkpoint import load
    from shiftconv.train.data import open_data
    from shiftconv.train.device import pick_device
    from shiftconv.train.evaluation import evaluate as run
    from shiftconv.train.progress import RichProgress
    from shiftconv.train.recipe import Recipe
    from shiftconv.train.settings import Data

    picked = pick_device(device)
    run_of_ours = load(checkpoint) if read_checkpoint(checkpoint).meta["kind"] == "shiftconv" else None
    settings = Recipe.from_dict(run_of_ours.recipe).data if run_of_ours else None
    if data is not None and (settings is None or settings.name != data):
        settings, run_of_ours = Data(name=data, folder=str(folder) if folder else None), None
    if settings is None:
        names = "digits, cifar10, cifar100 or folder"
        raise ValueError(f"{checkpoint} does not say what it was trained on; name it: --data {names}")
    given = {"folder": str(folder) if folder else None, "image_size": image_size}
    given = {name: value for name, value in given.items() if value is not None}
    model = load_checkpoint(None, checkpoint, ema).to(picked)
    images = open_data(replace(settings, augment=False, **given))
    classes = getattr(model, "num_classes", images.num_classes)  # timm's networks have it, and may be others
    if classes != images.num_classes:
        raise ValueError(f"the network has {classes} classes, the data set {images.name} has {images.num_classes}")
    learnt = run_of_ours.data.get("class_names") if run_of_ours else None
    if learnt and list(images.class_names) != learnt:
        raise ValueError(f"the network was trained on the classes {learnt}, the images have {[*images.class_names]}")
    with closing(RichProgress()) as progress:
        metrics = run(
            model, images.loader(split, batch_size, shuffle=False), device=picked, progress=progress, part=split
        )
    line(f"{split}  {metrics}")


def count_(
    model: str | None = None,
    model_args: ModelArgs = {},  # noqa: B006  never changed; jsonargparse shows it
    size: int | None = None,
    convention: Literal["exact", "readme", "head"] = "exact",
    by: Literal["model", "layer"] = "model",
    checkpoint: Path | None = None,
    density: float | None = None,
) -> None:
    """Count parameters and multiply-accumulates of a network, and those that are not 0.

    Args:
        model: network name; its own arguments are options too (--expansion 3, --reduction 2.8 --reduction-mode block).
        model_args: the same as a mapping.
        size: height and width of the image in pixels; the network's own unless given.
        convention: exact, or one of the two formulas of the ShiftResNet authors' utility (their README's, their last).
        by: one line for the network, or one for each of its layers.
        checkpoint: a file whose weights are counted, zeros and all; without a name the network is read from it too.
        density: share of each kernel and matrix that is kept, at random, as if the network were as sparse, in (0, 1].
    """
    from shiftconv.analysis import count as exact
    from shiftconv.analysis.zeros import thin
    from shiftconv.models import create_model
    from shiftconv.models.convert import load_checkpoint
    from shiftconv.models.convert.readme_count import readme_count

    if model is None and (checkpoint is None or model_args):
        raise ValueError("count needs the name of a network, or --checkpoint alone to read it from a file")
    if convention != "exact":
        if model is None or (size, by, checkpoint, density) != (None, "model", None, None):
            options = "--size, --by, --checkpoint and --density"
            raise ValueError(f"the authors' conventions are for a new network and 32x32 images; leave {options} out")
        line(*readme_count(model, convention, **model_args).lines())
        return
    if checkpoint is not None and density is not None:
        raise ValueError("a checkpoint has a density of its own; leave --density or --checkpoint out")
    network = None if model is None else create_model(model, **model_args)
    if checkpoint is not None:
        network = load_checkpoint(network, checkpoint)
    assert network is not None
    if density is not None:
        thin(network, density)
    counted = exact(network, size=size)
    note = [] if density is None else [f"at density {density:g}, uniform"]
    line(", ".join([str(counted), *note]) if by == "model" else "\n".join([counted.table(), *note]))


def convert_(
    source: Path,
    target: Path,
    names: Literal["ours", "authors", "authors-merged"] = "ours",
    ema: bool = False,
    model: str | None = None,
    model_args: ModelArgs = {},  # noqa: B006  never changed; jsonargparse shows it
) -> None:
    """Turn any checkpoint, a released one among them, into .safetensors or .pth; nothing in the file is executed.

    Args:
        source: the file to read.
        target: the file to write, ending in .safetensors or .pth.
        names: whose names the weights get: ours, the authors', or the authors' of their merged form.
        ema: take the averaged weights of the file.
        model: network name, where the file does not tell; its own arguments are options too (--num_shifts 1).
        model_args: the same as a mapping.
    """
    from shiftconv.models.convert import convert as run

    if model is None and model_args:
        raise ValueError(f"arguments of a network, {', '.join(model_args)}, need its name: --model NAME")
    line(str(run(source, target, names, ema, model, model_args)))


def doctor(op: str | None = None) -> None:
    """Tell what this machine has, what was compiled, and which kernel will run for which operator, and why.

    Args:
        op: only this operator; of depthwise_conv and cross_conv it also tells which code takes typical shapes.
    """
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from shiftconv.ops import backend, depthwise_paths

    machine = Table("machine", "", box=SIMPLE, show_edge=False)
    for fact, value in backend.environment().items():
        machine.add_row(fact, Text(value, overflow="fold"))
    kernels = Table("operator", "device", "runs", "because", box=SIMPLE, show_edge=False)
    for choice in backend.explain(op):
        kernels.add_row(choice.op, choice.device, choice.backend, Text(choice.reason, overflow="fold"))
    show(machine, "", kernels)
    if op in backend.SHARED:
        paths = Table("float32 on the CPU", "takes", "because", box=SIMPLE, show_edge=False)
        for call, path in depthwise_paths.explain("cpu"):
            paths.add_row(call, path.name, path.reason)
        show("", paths)


def report_(runs: Sequence[Path] = (), out: Path = Path("report.html"), erf_images: int = 8) -> None:
    """Compare runs on one page: curves, densities, throughput, receptive fields.

    Args:
        runs: folders that train has written, up to 8.
        out: the page's file, or a folder for report.html.
        erf_images: images that the receptive fields are measured on; 0 leaves these out.
    """
    from shiftconv.train.report import report as run

    line(str(run(runs, out, erf_images=erf_images)))


def bench(
    data: str = "digits",
    model: str | None = None,
    batch_size: int = 64,
    seconds: float = 5.0,
    workers: int | None = None,
    device: str | None = None,
) -> None:
    """Measure how fast images load, and whether a network would wait for them.

    Args:
        data: a folder of images, a data set's name, or one by timm's prefix.
        model: network whose training step is measured beside; none: only the images.
        batch_size: images at a time.
        seconds: how long each measurement takes.
        workers: processes that read images; several numbers up to that of the cores unless given.
        device: cpu, cuda, cuda:1 ...; the GPU when there is one unless given.
    """
    from shiftconv.train.data_rates import data_rates
    from shiftconv.train.device import pick_device

    picked = pick_device(device)
    line(str(data_rates(data, model, batch_size=batch_size, seconds=seconds, workers=workers, device=picked)))
