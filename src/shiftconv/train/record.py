"""What the folders of runs tell, read without changing or locking them: recipe, rows, result, and where a run ran."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shiftconv.train.recipe import Recipe
from shiftconv.train.run import RunFolder, read_config

MOST = 8  # runs beside each other: as many as there are colours


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        name: the folder's name, with as many of its parents as it takes to tell it from the other runs.
        path: the folder.
        recipe: what was to be done.
        rows: the numbers of each finished epoch, in order; an epoch stands once, as it was run last.
        result: what ``result.json`` holds; empty before the run has ended.
        starts: what ``environment.json`` holds, once for each start of the run; empty where it is missing.
        notes: what was found damaged; one sentence each.
    """

    name: str
    path: Path
    recipe: Recipe
    rows: tuple[Mapping[str, float], ...] = ()
    result: Mapping[str, Any] | None = None
    starts: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> int:
        """Epochs that are done."""
        return int(self.rows[-1]["epoch"]) if self.rows else 0

    @property
    def state(self) -> str:
        """Where the run stands. A folder does not tell whether a process is still at it."""
        if self.finished >= self.recipe.epochs:
            return "finished" if self.result else "all epochs done, not evaluated"
        if not self.rows:
            return "running or stopped, no epoch done"
        step = self.rows[-1].get("step")
        return f"running or stopped at epoch {self.finished}" + (f", step {step:,.0f}" if step is not None else "")

    @property
    def best_epoch(self) -> int | None:
        """Whose weights ``best.pt`` holds: as the result says, else that of the best first score."""
        told = (self.result or {}).get("best_epoch")
        if isinstance(told, int):
            return told
        found = next((self.best(key) for key in self.scores), None)
        return found and found[0]

    @property
    def scores(self) -> list[str]:
        """Names of the numbers on validation images that judge it, more being better, such as ``val_accuracy``."""
        keys = dict.fromkeys(key for row in self.rows for key in row)
        return [key for key in keys if key.startswith(("val_", "ema_")) and not key.endswith(("loss", "top5"))]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """The epochs that have a number of this name, and these numbers; they may be infinite or NaN."""
        rows = [row for row in self.rows if key in row]
        return [row["epoch"] for row in rows], [row[key] for row in rows]

    def best(self, key: str) -> tuple[int, float] | None:
        """The epoch with the highest number of this name, and the number; None if there is none."""
        found = [(value, -epoch) for epoch, value in zip(*self.series(key), strict=True) if math.isfinite(value)]
        return (int(-max(found)[1]), max(found)[0]) if found else None

    @property
    def test(self) -> Mapping[str, float]:
        """The numbers on the test images, such as ``top1``; empty where there are none."""
        told = (self.result or {}).get("test")
        found = {key: _number(raw) for key, raw in told.items()} if isinstance(told, dict) else {}
        return {_plain(key): value for key, value in found.items() if value is not None}


def gather(folders: Sequence[str | Path]) -> list[Record]:
    """Read 1 to 8 runs; a folder that is given twice is read once.

    Raises:
        TypeError: if ``folders`` is no list of paths.
        ValueError: if there are none or too many, or one is no run's folder; names it.
    """
    if isinstance(folders, str | Path):
        raise TypeError(f"runs must be a list of folders, got {folders!r}")
    given = [Path(folder).expanduser() for folder in folders]
    times = Counter(path.resolve() for path in given)
    if not 1 <= len(times) <= MOST:
        raise ValueError(f"a report compares 1 to {MOST} runs, got {len(times)}")
    written = {path.resolve(): path for path in given}
    records = []
    for path, name in zip(times, _names(list(times)), strict=True):
        record = read(written[path])
        twice = (f"it was given {times[path]} times and counts once",) if times[path] > 1 else ()
        records.append(replace(record, name=name, notes=(*record.notes, *twice)))
    return records


def read(folder: str | Path) -> Record:
    """Read one run.

    Raises:
        ValueError: if the folder is none that ``train`` has written; says what it is instead.
    """
    run = RunFolder(Path(folder))
    if not run.config.is_file():
        raise ValueError(f"{folder} is no run: expected a folder with a run's config.yaml, but {_instead(run.path)}")
    notes: list[str] = []
    result = _json(run.result, notes)
    starts = _json(run.path / "environment.json", notes)
    starts = [starts] if isinstance(starts, dict) else starts
    return Record(
        _plain(run.path.resolve().name),
        run.path,
        read_config(run.config),
        _rows(run.metrics, notes),
        result if isinstance(result, dict) else None,
        tuple(start for start in starts if isinstance(start, dict)) if isinstance(starts, list) else (),
        tuple(notes),
    )


def _instead(path: Path) -> str:
    if not path.exists():
        return "there is no such folder"
    if not path.is_dir():
        return "it is a file"
    inside = sorted(found.parent.name for found in path.glob("*/config.yaml"))
    more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
    return f"it holds runs, {', '.join(inside[:3])}{more}; give these" if inside else "it has none"


def _json(path: Path, notes: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        notes.append(f"{path} is damaged and left out")
        return None


def _rows(path: Path, notes: list[str]) -> tuple[Mapping[str, float], ...]:
    """The rows by their epoch; of an epoch that was run again the last one counts."""
    if not path.is_file():
        return ()
    rows: dict[int, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            row = {_plain(key): value for key, raw in values.items() if (value := _number(raw)) is not None}
            if not row["epoch"] >= 1 or not row["epoch"].is_integer():
                raise ValueError
        except (ValueError, RecursionError, AttributeError, KeyError):  # no JSON, no mapping, or no epoch
            notes.append(f"line {number} of {path} is damaged and left out")
            continue
        rows[int(row["epoch"])] = row
    return tuple(rows[epoch] for epoch in sorted(rows))


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths: one where that is enough to tell each from the others, else more."""
    names = []
    for path in paths:
        parts = 1
        while sum(other.parts[-parts:] == path.parts[-parts:] for other in paths) > 1:
            parts += 1
        names.append(_plain("/".join(path.parts[-parts:])))
    return names


def _plain(name: str) -> str:
    """On one line, and without what is no Unicode: file systems allow both."""
    return " ".join(name.encode(errors="replace").decode().split()) or "/"
