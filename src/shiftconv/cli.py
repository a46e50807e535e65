"""The command line: ``shiftconv VERB [options]``. Each verb is one function below; its signature is its options.

Nothing heavy is imported before a verb runs, so ``--help`` and mistakes are answered at once.
"""

import fnmatch
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shiftconv._version import __version__
from shiftconv.names import closest, unknown
from shiftconv.options import parse, spell

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from shiftconv.train.recipe import Recipe

ModelArgs = dict[str, Any]


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
    _show(result.table())
    _line(*result.next_steps())


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
            _line(f"{kind}    ({names[kind][1]})", *(f"  {name}" for name in matching))


def train(
    recipe: "Recipe", name: str, out: Path | None = None, resume: str | None = None, device: str | None = None
) -> None:
    """Train by a recipe's name or a YAML file; every field of the recipe is an option.

    Args:
        recipe: what to do.
        name: what the run is called.
        out: folder of the run; runs/NAME unless given.
        resume: "auto" goes on from the newest good checkpoint in the folder, or starts; a path goes on from that file.
        device: cpu, cuda, cuda:1 ...; the GPU when there is one unless given.
    """
    from shiftconv.train.loop import train as run
    from shiftconv.train.progress import RichProgress

    result = run(recipe, out or Path("runs") / name, resume=resume, device=device, progress=RichProgress())
    _line(str(result))


def evaluate(
    checkpoint: Path,
    data: str | None = None,
    folder: Path | None = None,
    image_size: int | None = None,
    split: Literal["train", "val", "test"] = "test",
    batch_size: int = 256,
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
    model = load_checkpoint(None, checkpoint).to(picked)
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
    _line(f"{split}  {metrics}")


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
        _line(*readme_count(model, convention, **model_args).lines())
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
    _line(", ".join([str(counted), *note]) if by == "model" else "\n".join([counted.table(), *note]))


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
    _line(str(run(source, target, names, ema, model, model_args)))


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
    _show(machine, "", kernels)
    if op in backend.SHARED:
        paths = Table("float32 on the CPU", "takes", "because", box=SIMPLE, show_edge=False)
        for call, path in depthwise_paths.explain("cpu"):
            paths.add_row(call, path.name, path.reason)
        _show("", paths)


# list_, count_ and convert_ share no name with a public function, which jsonargparse would import to compare the two.
VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "list": list_,
    "train": train,
    "eval": evaluate,
    "count": count_,
    "convert": convert_,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; a user's mistake ends in one line on stderr and exit status 2."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `shiftconv list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # a person sees one line, whatever it was
        if os.environ.get("SHIFTCONV_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, ValueError | TypeError | ImportError | OSError | RuntimeError):
            text = f"{type(error).__name__}: {text} (unexpected; SHIFTCONV_TRACEBACK=1 shows where)"
        sys.stderr.write(f"shiftconv: error: {text}\n")
        sys.exit(2)


def _run(argv: list[str]) -> None:
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        _line(_usage())
    elif verb == "--version":
        _line(f"shiftconv {__version__}")
    elif verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    elif verb == "train":
        _train(argv[1:])
    else:
        VERBS[verb](**vars(parse(_parser(verb), spell(argv[1:], verb, VERBS[verb]))))


def _usage() -> str:
    verbs = (f"  {name:<9}{_summary(function)}" for name, function in VERBS.items())
    return "\n".join(["usage: shiftconv VERB [options]", "", *verbs, "", "shiftconv VERB --help tells the options."])


def _summary(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def _parser(verb: str) -> "ArgumentParser":
    """The parser of a verb, made from the signature and docstring of its function."""
    from jsonargparse import ArgumentParser

    function = VERBS[verb]
    parser = ArgumentParser(
        prog=f"shiftconv {verb}", description=_summary(function), exit_on_error=False, allow_abbrev=False
    )
    skip: dict[str, set[str | int]] = {"train": {"recipe", "name"}, "list": {"what"}, "count": {"model"}}
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=skip.get(verb))
    if verb == "list":
        parser.add_argument("what", nargs="*", help="models, recipes or data, and patterns such as 'slak*'.")
    if verb == "count":
        parser.add_argument(
            "model", nargs="?", type=str | None, help="network name; found in the checkpoint if absent."
        )
    return parser


def _train(argv: list[str]) -> None:
    """A recipe gives the defaults of its own fields; what follows on the line, or a YAML file, overrides them."""
    from shiftconv import recipes
    from shiftconv.train.recipe import Recipe

    parser = _parser("train")
    parser.usage = "shiftconv train RECIPE|FILE.yaml [options]"
    parser.add_argument("--config", action="config", help="YAML file of fields to set, as --print_config writes it.")
    parser.add_class_arguments(Recipe, as_group=True)
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            parser.parse_args(["--help"])
        raise ValueError("train needs the name of a recipe or a YAML file first; `shiftconv list recipes` shows them")
    name, *argv = argv
    file = Path(name)
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {name}")
        try:
            parse(parser, ["--config", name])  # alone first, so that its mistakes are told as the file's
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        argv, name = ["--config", name, *argv], file.parent.name if file.stem == "config" else file.stem
    else:
        parser.set_defaults(asdict(recipes.get(name)))
    parsed = parse(parser, spell(argv, "train", train))
    recipe = Recipe(**{f.name: parsed[f.name] for f in fields(Recipe)})
    train(recipe, name, out=parsed.out, resume=parsed.resume, device=parsed.device)


def _line(*lines: str) -> None:
    """Plain lines on stdout, exactly as they are."""
    sys.stdout.writelines(f"{line}\n" for line in lines)


def _show(*renderables: Any) -> None:
    """Tables and styled text on stdout; without colour and boxes' colours when it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    for renderable in renderables:
        console.print(renderable)
