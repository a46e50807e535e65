"""The demo: a shift network and a residual network of its size learn to read real digits, offline, in two minutes.

It leaves a folder with both runs, pictures, ``results.json`` and ``report.html``. The networks train at the same time,
each in a process and on a thread of its own: threads that share one small network wait for each other, above all on
busy cores, and the numbers would depend on how many there are.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftconv import recipes
from shiftconv.recipes import demo_folder
from shiftconv.recipes.demo_folder import FORMAT
from shiftconv.train.recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from shiftconv.analysis import ERF
    from shiftconv.train.data import DataSets
    from shiftconv.train.events import Progress
    from shiftconv.train.loop import Result

# The folder of a run, and its recipe; the first is the shift network.
NETWORKS: dict[str, str] = dict(zip(demo_folder.RUNS, ("shiftresnet20_digits", "resnet20_reduced_digits"), strict=True))
ERF_IMAGES = 128
SPEED_BATCH = 64


@dataclass(frozen=True)
class Network:
    """One line of the demo's table. ``accuracy`` is of the test images, 0..1; ``macs`` of one image."""

    name: str
    recipe: str
    accuracy: float
    parameters: int
    macs: int
    images_per_second: float
    relative_speed: float
    epochs: int
    best_epoch: int
    train_seconds: float
    erf_half_side: int | None


@dataclass(frozen=True)
class DemoResult:
    """What came of the demo.

    Attributes:
        folder: where everything lies.
        networks: the lines of the table; the first is the shift network.
        seed: seed of both runs.
        seconds: how long all of it took.
    """

    folder: Path
    networks: tuple[Network, ...]
    seed: int
    seconds: float

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def columns(self) -> tuple[str, ...]:
        """What the cells of :meth:`rows` are."""
        return "network", "test accuracy", "parameters", "MACs", "images / s", "speed"

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text."""
        return [
            (
                network.name,
                f"{network.accuracy:.2%}",
                f"{network.parameters:,}",
                f"{network.macs:,}",
                f"{network.images_per_second:,.0f}",
                f"{network.relative_speed:.2f}x",
            )
            for network in self.networks
        ]

    def table(self) -> Table:
        """The table, to be printed by rich."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title="Handwritten digits", title_style="bold", title_justify="left")
        for column in self.columns():
            first = column == "network"
            table.add_column(column, justify="left" if first else "right", style="bold" if first else None)
        for row in self.rows():
            table.add_row(*row)
        return table

    def commands(self) -> dict[str, str]:
        """What to type next, by what it does."""
        folder = shlex.quote(str(self.folder))
        best = shlex.quote(str(self.folder / self.networks[0].name / "best.pt"))
        return {
            "Test the trained shift network again": f"shiftconv eval --checkpoint {best}",
            "Watch the curves in TensorBoard": f"tensorboard --logdir {folder}",
            "Train it yourself, for longer": f"shiftconv train {NETWORKS['shiftresnet20']} --epochs 50",
            "Train on CIFAR-10; downloads 170 MB": "shiftconv train shiftresnet20_cifar10",
            "See all networks, recipes and data sets": "shiftconv list",
        }

    def next_steps(self) -> list[str]:
        """The lines to print below the table."""
        width = max(map(len, self.commands().values()))
        steps = [f"  {command:<{width}}   {what}" for what, command in self.commands().items()]
        return [f"Report: {self.report}  (open it in a browser; {self.seconds:.0f} s in all)", "", "Go on:", *steps]


def demo(
    out: Path | str = Path("shiftconv-demo"),
    seed: int = 0,
    epochs: int | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Train both networks, measure them, and write the folder.

    The folder may hold an earlier demo, which is replaced once the new one is complete, and stays otherwise.

    Args:
        out: the folder.
        seed: seed of both runs.
        epochs: passes over the training images; None takes the recipes' number.
        progress: told what goes on, as by ``shiftconv.train.loop.train``.

    Raises:
        ModuleNotFoundError: without matplotlib or scikit-learn; says how to install them.
        NotADirectoryError: if ``out`` is a file.
        FileExistsError: if the folder holds anything else than an earlier demo.
        ValueError: for a seed or a number of epochs that cannot be.
    """
    start = time.perf_counter()
    _need("matplotlib", "sklearn")
    plans = {name: _plan(recipe, seed, epochs) for name, recipe in NETWORKS.items()}
    with demo_folder.replacing(Path(out)) as work:
        from shiftconv.train.events import Note, silent

        tell = progress or silent
        with _one_thread():
            runs = _train(plans, work, tell)
            tell(Note("measuring speed and receptive fields, and drawing"))
            return _finish(Path(out), work, runs, seed, start)


def _need(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        names = " and ".join("scikit-learn" if name == "sklearn" else name for name in missing)
        raise ModuleNotFoundError(f'the demo needs {names}: pip install "shiftconv[demo]"', name=missing[0])


def _plan(recipe: str, seed: int, epochs: int | None) -> Recipe:
    plan = recipes.get(recipe)
    return replace(plan, seed=seed, epochs=plan.epochs if epochs is None else epochs)


def _train(plans: dict[str, Recipe], work: Path, tell: Progress) -> dict[str, Result]:
    """The first network here, telling what goes on; the others, which tell their last line only, beside it."""
    from shiftconv.train.events import Note
    from shiftconv.train.loop import train

    first, *others = plans
    beside = {name: _start(plans[name], work / name) for name in others}
    try:
        tell(Note(f"{', '.join(others)} trains at the same time, in a process of its own"))
        runs = {first: train(plans[first], work / first, progress=tell)}
        for name, process in beside.items():
            runs[name] = _result(name, process, work / name)
            tell(Note(f"{name} is trained too; best epoch {runs[name].best_epoch}, test {runs[name].test}"))
        return runs
    finally:
        for process in beside.values():
            with process:  # waits, and closes its pipe
                process.kill()


@contextmanager
def _one_thread() -> Generator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_apart(recipe: str, folder: str) -> None:
    """Train a recipe given as JSON; what a process beside the demo runs."""
    from shiftconv.train.loop import train

    with _one_thread():
        train(Recipe.from_dict(json.loads(recipe)), folder)


def _start(plan: Recipe, folder: Path) -> subprocess.Popen[str]:
    code = f"import sys; from {__name__} import train_apart; train_apart(*sys.argv[1:])"
    command = [sys.executable, "-c", code, json.dumps(plan.to_dict()), str(folder)]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=subprocess.PIPE, text=True)


def _result(name: str, process: subprocess.Popen[str], folder: Path) -> Result:
    """Wait for a network that is trained beside the first, and read what came of it.

    Raises:
        RuntimeError: if it failed; says why.
    """
    from shiftconv.train.evaluation import Metrics
    from shiftconv.train.loop import Result

    _, errors = process.communicate()
    if process.returncode:
        reason = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise RuntimeError(f"training {name} failed: {reason}")
    values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    val, test = Metrics.from_dict(values["val"]), Metrics.from_dict(values["test"])
    return Result(folder, folder / "best.pt", values["best_epoch"], val, test, history)


def _finish(out: Path, work: Path, runs: dict[str, Result], seed: int, start: float) -> DemoResult:
    from shiftconv.recipes import demo_page
    from shiftconv.train.data import open_data

    data = open_data(recipes.get(NETWORKS["shiftresnet20"]).data)
    models = {name: _load(run) for name, run in runs.items()}
    fields = _receptive_fields(models, data)
    networks = _measure(models, runs, fields)
    result = DemoResult(out, networks, seed, time.perf_counter() - start)
    demo_page.write(work, result, demo_page.Findings(runs, models, fields, data))
    result = replace(result, seconds=time.perf_counter() - start)
    values = {"format": FORMAT, "seed": seed, "seconds": result.seconds, "networks": [asdict(n) for n in networks]}
    (work / "results.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return result


def _load(run: Result) -> nn.Module:
    from shiftconv.models import create_model
    from shiftconv.train import checkpoint
    from shiftconv.train.device import pick_device

    best = checkpoint.load(run.checkpoint)
    model = create_model(best.model_name, **best.model_args)
    model.load_state_dict(best.model)
    return model.to(pick_device()).eval()


def _receptive_fields(models: dict[str, nn.Module], data: DataSets) -> dict[str, ERF]:
    from shiftconv.analysis import erf

    images, _ = next(iter(data.loader("test", ERF_IMAGES)))
    return {name: erf(model, images, batch_size=32) for name, model in models.items()}


def _measure(models: dict[str, nn.Module], runs: dict[str, Result], fields: dict[str, ERF]) -> tuple[Network, ...]:
    from shiftconv.analysis import compare, count

    speeds = compare(models, 32, batch_size=SPEED_BATCH, seconds=2.0, rounds=9)
    slowest = min(speeds.values(), key=lambda speed: speed.images_per_second)

    def network(name: str) -> Network:
        run, cost, half = runs[name], count(models[name], 32), fields[name].rectangle(0.5)
        assert run.test is not None  # digits have test images
        return Network(
            name=name,
            recipe=NETWORKS[name],
            accuracy=run.test.top1,
            parameters=cost.parameters,
            macs=cost.macs,
            images_per_second=speeds[name].images_per_second,
            relative_speed=speeds[name].ratio(slowest),
            epochs=len(run.history),
            best_epoch=run.best_epoch,
            train_seconds=sum(_seconds(run.history)),
            erf_half_side=half.side if half else None,
        )

    return tuple(network(name) for name in models)


def _seconds(history: Sequence[dict[str, Any]]) -> list[float]:
    return [float(row["seconds"]) for row in history]
