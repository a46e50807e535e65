"""The rows of metrics.jsonl sent to experiment trackers: Weights & Biases, MLflow, Trackio. Imports none at first."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from shiftconv import files
from shiftconv.names import unknown

PROJECT = "shiftconv"  # unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID says otherwise
_MLFLOW_BATCH = 100  # parameters that an MLflow server takes at once


class Logger(Protocol):
    """One tracker; ``id`` is what finds the logged run again."""

    id: str

    def log(self, values: dict[str, float], epoch: int) -> None: ...

    def close(self, failed: bool) -> None: ...


@dataclass(frozen=True)
class Logged:
    """The run as a tracker shall know it.

    Attributes:
        folder: where files of the tracker may go.
        name: what people call it.
        config: the recipe, as plain values.
        id: of the logged run that goes on; none: a new one.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    id: str | None


class _Wandb:
    def __init__(self, wandb: Any, run: Logged) -> None:
        self.id = run.id or uuid4().hex[:12]
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(
            project=project, name=run.name, id=self.id, resume="allow", dir=str(run.folder), config=run.config
        )

    def log(self, values: dict[str, float], epoch: int) -> None:
        self._run.log(values, step=epoch)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, mlflow: Any, run: Logged) -> None:
        self._mlflow = mlflow
        if run.id is None and not ({"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys()):
            mlflow.set_experiment(PROJECT)
        self.id: str = mlflow.start_run(run_id=run.id, run_name=run.name if run.id is None else None).info.run_id
        if run.id is None:  # a parameter has one value for ever
            items = list(_flat(run.config).items())
            for start in range(0, len(items), _MLFLOW_BATCH):
                mlflow.log_params(dict(items[start : start + _MLFLOW_BATCH]))

    def log(self, values: dict[str, float], epoch: int) -> None:
        self._mlflow.log_metrics(values, step=epoch)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run(status="FAILED" if failed else "FINISHED")


class _Trackio:
    def __init__(self, trackio: Any, run: Logged) -> None:
        # It finds a run by its name alone, so that of a new one must be its own.
        self.id = run.id or f"{run.name}-{uuid4().hex[:6]}"
        self._trackio = trackio
        trackio.init(project=PROJECT, name=self.id, config=run.config, resume="never" if run.id is None else "allow")

    def log(self, values: dict[str, float], epoch: int) -> None:
        self._trackio.log(values, step=epoch)

    def close(self, failed: bool) -> None:
        self._trackio.finish()


_KINDS: dict[str, Callable[[Any, Logged], Logger]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}


class Loggers:
    """The trackers of a run. One that fails is given up, and the run goes on."""

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)

    def add(self, row: dict[str, Any]) -> list[str]:
        """Send a row, at its epoch; of each tracker that is given up a sentence comes back."""
        values = tagged(row)
        return self._each("takes no more rows", lambda logger: logger.log(values, row["epoch"]))

    def close(self, failed: bool = False) -> list[str]:
        """End the logged runs, as failed ones or not; again a sentence of each that cannot be ended."""
        notes = self._each("could not be closed", lambda logger: logger.close(failed))
        self._loggers.clear()
        return notes

    def _each(self, what: str, act: Callable[[Logger], None]) -> list[str]:
        notes: list[str] = []
        for name, logger in list(self._loggers.items()):
            try:
                act(logger)
            except Exception as error:  # trackers raise whatever their network stack does; days of training weigh more
                del self._loggers[name]
                notes.append(f"{name} {what}: {_line(error)}")
        return notes


def open_loggers(
    names: Iterable[str], *, folder: Path, run_name: str, config: dict[str, Any], finished: int
) -> Loggers:
    """Begin a logged run in each tracker, or go on with the one that ``folder/loggers.json`` names.

    Args:
        names: wandb, mlflow, trackio.
        folder: the run's folder, which exists.
        run_name: what people call the run.
        config: the recipe, as plain values.
        finished: epochs that are done; 0: the run is a new one, whatever the folder holds.

    Raises:
        ValueError: for another name.
        ModuleNotFoundError: if a tracker is not installed; none has begun a run then.
        RuntimeError: if a tracker cannot begin; says why. Those before it are ended as failed.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in _KINDS:
            raise unknown("logger", name, _KINDS)
    modules = {name: _module(name) for name in names}
    path = folder / "loggers.json"
    known = _read(path) if finished else {}
    opened: dict[str, Logger] = {}
    for name in names:
        try:
            opened[name] = _KINDS[name](modules[name], Logged(folder, run_name, config, known.get(name)))
        except Exception as error:  # trackers raise whatever their network stack does
            Loggers(opened).close(failed=True)
            raise RuntimeError(f"the logger {name} cannot begin: {_line(error)}") from error
    if opened:
        ids = known | {name: logger.id for name, logger in opened.items()}
        files.write(path, (json.dumps(ids, indent=2) + "\n").encode())
    return Loggers(opened)


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of metrics.jsonl by the names of curves: ``train_loss`` becomes ``loss/train``, ``lr`` becomes ``run/lr``.

    Epoch and step, which place the row, and what is no number are left out.
    """
    tags: dict[str, float] = {}
    for name, value in row.items():
        if name not in ("epoch", "step") and isinstance(value, int | float) and not isinstance(value, bool):
            part, _, what = name.partition("_")
            tags[f"{what}/{part}" if part in ("train", "val", "ema") else f"run/{name}"] = value
    return tags


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # it is there, and lacks something itself
            raise
        raise ModuleNotFoundError(f"the logger {name} needs its package: pip install {name}", name=name) from None


def _read(path: Path) -> dict[str, str]:
    """The ids of the logged runs; none if the file is not there or not whole, and then new ones begin."""
    try:
        ids = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in ids.items() if isinstance(v, str)} if isinstance(ids, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
