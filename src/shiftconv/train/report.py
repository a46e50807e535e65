"""Runs side by side on one page: what they were, how they learnt, what they cost and what came of them.

The page is one HTML file without scripts that loads nothing from elsewhere; see ``shiftconv.analysis.report``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from shiftconv._version import __version__
from shiftconv.analysis import draw
from shiftconv.analysis.report import Block, Facts, Pictures, Section, Table, write_report
from shiftconv.analysis.report import Report as Page
from shiftconv.train import report_facts as facts
from shiftconv.train.record import Record, gather
from shiftconv.train.report_curves import curve_panels, curve_picture, field_picture
from shiftconv.train.trained import Probes, Trained, look

SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contributions, as the papers' tables have them
FILE = "report.html"
DENSE = 0.999  # a trained dense network may have a few zeros, too


@dataclass(frozen=True)
class Report:
    """What was compared.

    Attributes:
        path: the page.
        runs: what the folders told.
        trained: what the networks are like, in the same order.
    """

    path: Path
    runs: tuple[Record, ...]
    trained: tuple[Trained, ...]

    @property
    def notes(self) -> list[str]:
        """What was damaged or missing; one sentence each."""
        lines = [(record.name, note) for record in self.runs for note in record.notes]
        for record, trained in zip(self.runs, self.trained, strict=True):
            lines += [(record.name, f"no {what}: {reason}") for what, reason in _failures(trained).items()]
        return [f"{name}: {note}" for name, note in lines]

    def __str__(self) -> str:
        lines = [f"{record.name}: {facts.summary(record)}" for record in self.runs]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), f"page  {self.path}"])


def report(runs: Sequence[str | Path], out: str | Path, *, erf_images: int = 8) -> Report:
    """Compare runs on one page.

    Args:
        runs: 1 to 8 folders that ``train`` has written, of runs that have ended or not.
        out: the page's file, which is replaced if it is there; of a folder, ``report.html`` in it.
        erf_images: how many images the receptive fields are measured on: validation images of the run's own data where
            they are on this machine, else noise. 0 leaves the receptive fields out.

    Raises:
        ModuleNotFoundError: without matplotlib; says how to install it.
        TypeError: if ``runs`` is no list of folders, or ``erf_images`` no whole number.
        ValueError: if there are none or more than 8, a folder holds no run, or ``erf_images`` is below 0.
        FileNotFoundError: if there is no folder for the page.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError('a report needs matplotlib: pip install "shiftconv[demo]"', name="matplotlib")
    if isinstance(erf_images, bool) or not isinstance(erf_images, int):
        raise TypeError(f"erf_images must be a whole number, got {erf_images!r}")
    if erf_images < 0:
        raise ValueError(f"erf_images must be at least 0, got {erf_images}")
    path = Path(out).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    records = gather(runs)
    probes = Probes(erf_images) if erf_images else None
    done = Report(path, tuple(records), tuple(look(record, probes) for record in records))
    write_report(_page(done), path)
    return done


def _page(done: Report) -> Page:
    runs = done.runs
    sections = [
        Section("Side by side" if len(runs) > 1 else "In numbers", _numbers(done)),
        Section("Recipes" if len(runs) > 1 else "Recipe", _recipes(runs)),
        Section("Learning", _curves(runs)),
    ]
    if blocks := _densities(done):
        sections.append(Section("Density by layer", blocks))
    if any(trained.erf is not None or "erf" in trained.failed for trained in done.trained):
        sections.append(Section("What one output sees", _fields(done)))
    sections.append(Section("Environment", _environment(runs)))
    title, lead, headline = _title(done)
    return Page(title, lead, headline, sections, f"shiftconv {__version__}")


def _title(done: Report) -> tuple[str, str, list[tuple[str, str]]]:
    """The page's name, its first sentence, and the few numbers to remember."""
    runs = done.runs
    if len(runs) > 1:
        data = ", ".join(dict.fromkeys(record.recipe.data.name for record in runs))
        lead = f"{len(runs)} runs on {data}, compared. Each has one colour on the whole page."
        return f"{len(runs)} runs side by side", lead, _winners(runs)
    record, trained = next(zip(runs, done.trained, strict=True))
    numbers = [(facts.value(key, best[1]), facts.title(key)) for key in record.scores if (best := record.best(key))]
    numbers += [(f"{record.test['top1']:.2%}", "test accuracy")] if "top1" in record.test else []
    numbers += [(facts.short(trained.count.parameters), "parameters")] if trained.count else []
    numbers += [(facts.duration(sum(record.series("seconds")[1])), "in all")] if record.rows else []
    lead = f"{facts.network(record, runs)} on {record.recipe.data.name}: {record.state}."
    return f"Run {record.name}", lead, numbers


def _winners(runs: Sequence[Record]) -> list[tuple[str, str]]:
    """The best run by each score, the first one of equals."""
    numbers = []
    for key in dict.fromkeys(key for record in runs for key in record.scores if not key.startswith("ema_")):
        found = {record.name: best[1] for record in runs if (best := record.best(key))}
        if found:
            name = max(found, key=found.__getitem__)
            numbers.append((facts.value(key, found[name]), f"best {facts.title(key)}: {name}"))
    tests = {record.name: record.test["top1"] for record in runs if "top1" in record.test}
    if tests:
        name = max(tests, key=tests.__getitem__)
        numbers.append((f"{tests[name]:.2%}", f"best test accuracy: {name}"))
    return numbers


def _numbers(done: Report) -> list[Block]:
    runs = done.runs
    rows = facts.numbers(runs, done.trained)
    caption = (
        "Scores are the best of any epoch, on validation images; test images chose nothing. MACs are the exact "
        "multiply-accumulates of convolutions and matrix products for one image. Images per second: in training, the "
        "median of the epochs. Density: share of the weights with a mask that are active."
    )
    notes = [f"Note: {note}" for note in done.notes]
    return [*_by_run(runs, rows, caption), *notes]


def _recipes(runs: Sequence[Record]) -> list[Block]:
    """What differs as a table, of one run from the defaults; the main settings that all share as one line."""
    names = facts.different(runs)
    shared = facts.shared(runs)
    if len(runs) == 1:
        rows = facts.changed(runs[0])
        table = Table(["setting", "default", "here"], rows, "Settings that are not the defaults.", folded=True)
        return [f"{shared[0].upper()}{shared[1:]}", *([table] if rows else [])]
    if not names:
        return [f"All runs have the same recipe: {shared}"]
    rows = [[name, *(facts.setting(record, name) for record in runs)] for name in names]
    columns = ["setting", *(record.name for record in runs)]
    return [Table(columns, rows, "Settings that differ.", coloured_columns=True), f"The same in all runs: {shared}"]


def _curves(runs: Sequence[Record]) -> list[Block]:
    panels = curve_panels(runs)
    if not panels:
        return ["No run has finished an epoch yet."]
    names = [record.name for record in runs]
    caption = "One point per epoch. Accuracy is shown from 80% on where all runs end above 85%."
    return [Pictures([curve_picture(panel, names) for panel in panels], caption)]


def _densities(done: Report) -> list[Block]:
    """A picture and a table for all sparse runs of one network; a network of another depth has its own."""
    sparse = [pair for pair in zip(done.runs, done.trained, strict=True) if pair[1].density < DENSE]
    if not sparse:
        return []
    networks: dict[tuple[str, ...], list[tuple[Record, Trained]]] = {}
    for record, trained in sparse:
        networks.setdefault((record.recipe.model, *trained.densities), []).append((record, trained))
    names = [record.name for record in done.runs]
    pictures, tables = [], []
    for (model, *weights), group in networks.items():
        lines = [
            draw.Series(record.name, range(1, len(weights) + 1), [*one.densities.values()], note=f"{one.density:.3g}")
            for record, one in group
        ]
        along = "weight, from the image to the classes"
        pictures.append(curve_picture(draw.Panel(f"Density of {model}", lines, floor=0, along=along, dots=True), names))
        rows = [[weight, *(f"{one.densities[weight]:.3f}" for _, one in group)] for weight in weights]
        columns = ["weight", *(record.name for record, _ in group)]
        tables.append(Table(columns, rows, f"The numbers of {model}", folded=True))
    text = (
        "The share of the numbers in each weight that are not 0, with biases and norms left out; at the end of a line "
        "that of all of them together."
    )
    return [text, Pictures(pictures), *tables]


def _fields(done: Report) -> list[Block]:
    text = (
        "The effective receptive field: how much each pixel of the image changes the centre of the last feature map. "
        "The smaller the squares, the fewer pixels around the centre hold most of it."
    )
    pictures, rows, failed = [], [], []
    for record, trained in zip(done.runs, done.trained, strict=True):
        if trained.erf is None:
            reason = trained.failed.get("erf", trained.failed.get("weights", ""))
            failed.append(f"{record.name}: not measured: {reason}")
            rows.append([record.name, *(facts.DASH for _ in SHARES), facts.DASH])
            continue
        squares = [trained.erf.rectangle(share) for share in SHARES]
        cells = [f"{one.side} px, {one.area:.1%}" if one else "whole image" for one in squares]
        rows.append([record.name, *cells, trained.images])
        pictures.append(field_picture(record.name, trained.erf, cells[2]))
    columns = ["", *(f"{share:.0%}" for share in SHARES), "measured on"]
    caption = (
        "Side of the smallest centred square that holds this share of all contributions, and its share of the image. "
        "The pictures show contributions on a logarithmic scale, and the square of 50%."
    )
    blocks: list[Block] = [text]
    blocks += [Pictures(pictures)] if pictures else []
    return [*blocks, Table(columns, rows, caption, coloured=len(done.runs) > 1), *failed]


def _environment(runs: Sequence[Record]) -> list[Block]:
    rows = facts.environment(runs)
    if not rows:
        return ["Where the runs ran was not recorded."]
    missing = [record.name for record in runs if not record.starts]
    text = [f"Not recorded: {', '.join(missing)}."] if missing else []
    resumed = any(len(record.starts) > 1 for record in runs)
    caption = "An arrow leads from the first value to the last where a resumed run has several." if resumed else ""
    return [*_by_run(runs, rows, caption), *text]


def _by_run(runs: Sequence[Record], rows: list[list[str]], caption: str) -> list[Block]:
    """A column for each run; of a single run a list."""
    if len(runs) > 1:
        return [Table(["", *(record.name for record in runs)], rows, caption, coloured_columns=True)]
    return [Facts({row[0]: row[1] for row in rows}, caption)]


def _failures(trained: Trained) -> Mapping[str, str]:
    """Why something is missing, by what it is."""
    words = {"weights": "weights", "count": "count", "erf": "receptive field", "best.pt": "weights of best.pt"}
    words["images"] = "validation images for the receptive field"
    return {words[what]: reason for what, reason in trained.failed.items()}
