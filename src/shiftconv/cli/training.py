"""The verb ``train``: a recipe gives the defaults, and the rest of the line says where and how often it runs."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftconv.cli.verbs import line
from shiftconv.options import parse, spell
from shiftconv.train.endings import FAILED
from shiftconv.train.launch import ProcessFailed, launch
from shiftconv.train.slurm import Job, submit

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from shiftconv.train.recipe import Recipe

_SHORT = ("teacher", "teacher_args", "teacher_checkpoint")  # of distill
_LAUNCH = ("gpus", "max_restarts", "slurm")  # options that are not those of each process


def train(
    recipe: "Recipe",
    name: str,
    out: Path | None = None,
    resume: str | None = None,
    device: str | None = None,
    gpus: int | None = None,
    max_restarts: int = 0,
    slurm: bool = False,
) -> None:
    """Train by a recipe's name or a YAML file; every field of the recipe is an option.

    Args:
        recipe: what to do.
        name: what the run is called.
        out: folder of the run; runs/NAME unless given.
        resume: "auto" goes on from the newest good checkpoint in the folder, or starts; a path goes on from that file.
            A run's folder alone, without a recipe, goes on with that run.
        device: cpu, cuda, cuda:1 ...; the GPU when there is one unless given.
        gpus: processes on this machine that train together, each on a GPU of its own; with --device cpu on the cores.
        max_restarts: with gpus, how often all are started anew, from the newest checkpoint, if one breaks off.
        slurm: write job.sbatch into the run's folder and submit it; the job's own settings are --job.nodes and so on.
    """
    from shiftconv.train.loop import train as run
    from shiftconv.train.progress import RichProgress
    from shiftconv.train.ranks import environment_ranks

    del gpus, max_restarts, slurm  # whoever started this process has heeded them
    result = run(recipe, out or Path("runs") / name, resume=resume, device=device, progress=RichProgress())
    if environment_ranks().first:
        line(str(result))


def summary(function: Callable[..., None]) -> str:
    """The first line of a verb's help."""
    return (function.__doc__ or "").partition("\n")[0]


def verb_parser(verb: str, function: Callable[..., None], skip: set[str | int] | None = None) -> "ArgumentParser":
    """A parser with the options of a verb's function, but those to skip."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"shiftconv {verb}", description=summary(function), exit_on_error=False, allow_abbrev=False
    )
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=skip)
    return parser


def run_train(argv: list[str]) -> None:
    """A recipe gives the defaults of its own fields; what follows on the line, or a YAML file, overrides them."""
    from shiftconv.train.recipe import Recipe

    parser = verb_parser("train", train, {"recipe", "name"})
    parser.usage = "shiftconv train RECIPE|FILE.yaml [options]"
    parser.add_argument("--config", action="config", help="YAML file of fields to set, as --print_config writes it.")
    parser.add_class_arguments(Job, "job")
    parser.add_class_arguments(Recipe, as_group=True)
    name, argv, given = _defaults(parser, argv)
    parsed = parse(parser, spell([_whole(word) for word in given], "train", train))
    _start(parsed, Recipe(**{f.name: parsed[f.name] for f in fields(Recipe)}), name, argv)


def _start(parsed: Any, recipe: "Recipe", name: str, argv: list[str]) -> None:
    """Train here, in several processes, or in a job."""
    out = parsed.out or Path("runs") / name
    if parsed.slurm:
        kept = _without(argv, ("out", "resume", "job"))
        line(f"submitted job {submit(parsed.job, ['train', *kept], out)}; its output is in {out}")
    elif parsed.gpus is not None and "RANK" not in os.environ:
        status = _launched(parsed.gpus, ["train", *_without(argv, ())], parsed.max_restarts)
        if status:
            sys.exit(status)
    else:
        train(recipe, name, out=out, resume=parsed.resume, device=parsed.device)


def _launched(processes: int, arguments: list[str], max_restarts: int) -> int:
    """The exit status; what a process has told itself is not told again."""
    try:
        return launch(processes, arguments, max_restarts)
    except ProcessFailed as failed:
        if failed.status != FAILED:
            raise
        return failed.status


def _defaults(parser: "ArgumentParser", argv: list[str]) -> tuple[str, list[str], list[str]]:
    """Set what the recipe says; gives the run's name, the whole line, and the options for the parser."""
    from shiftconv import recipes

    if argv and not argv[0].startswith("-"):
        name, *rest = argv
        file = Path(name)
        if file.suffix not in (".yaml", ".yml"):
            parser.set_defaults(asdict(recipes.get(name)))
            return name, argv, rest
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {name}")
        try:
            parse(parser, ["--config", name])  # alone first, so that its mistakes are told as the file's
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return file.parent.name if file.stem == "config" else file.stem, argv, ["--config", name, *rest]
    if argv and argv[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    run = _value(argv, "resume")
    if run is None or run == "auto":
        raise ValueError(
            "train needs the name of a recipe or a YAML file first, or --resume RUN alone; `shiftconv list recipes` "
            "shows the recipes"
        )
    from shiftconv.train.run import resume_target

    recipe, folder = resume_target(Path(run))
    parser.set_defaults({**asdict(recipe), "out": folder})
    return folder.name, argv, argv


def _whole(word: str) -> str:
    """A short option as the parser has it."""
    name, equals, value = word.partition("=")
    bare = name.removeprefix("--").replace("-", "_")
    return f"--distill.{bare}{equals}{value}" if name.startswith("--") and bare.partition(".")[0] in _SHORT else word


def _value(argv: list[str], option: str) -> str | None:
    """What an option says on the line, before the parser is ready."""
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        if word == f"--{option}":
            return following
        if word.startswith(f"--{option}="):
            return word.partition("=")[2]
    return None


def _without(argv: list[str], more: tuple[str, ...]) -> list[str]:
    """The line without what launches processes, and without the options ``more`` and what is below them."""
    kept: list[str] = []
    dropping = False
    for word in argv:
        if word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            dropping = name.replace("-", "_").partition(".")[0] in (*_LAUNCH, *more)
            if not dropping:
                kept.append(word)
            dropping = dropping and not equals
        elif not dropping:
            kept.append(word)
        else:
            dropping = False
    return kept
