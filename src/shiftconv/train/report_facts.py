"""The words and numbers of a report's tables."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from shiftconv.train.recipe import Recipe, differences
from shiftconv.train.record import Record
from shiftconv.train.trained import Trained

DASH = "-"
_TITLES = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "train_top5": "training top-5 accuracy",
    "val_loss": "validation loss",
    "val_accuracy": "validation accuracy",
    "val_top5": "validation top-5 accuracy",
    "ema_loss": "averaged weights' loss",
    "ema_accuracy": "averaged weights' accuracy",
    "ema_top5": "averaged weights' top-5 accuracy",
    "lr": "learning rate",
    "top1": "accuracy",
}
_UNTOLD = {"loss", "top5", "images", "images_per_second"}  # of what was measured on the test images
_MAIN = {
    "data.name": "data {}",
    "epochs": "{} epochs",
    "batch_size": "batch size {}",
    "optim.name": "{}",
    "optim.lr": "learning rate {}",
    "optim.schedule": "{} schedule",
    "optim.weight_decay": "weight decay {}",
    "seed": "seed {}",
}


def title(key: str) -> str:
    """What a number of a row is called on the page."""
    return _TITLES.get(key, key.replace("val_", "validation ").replace("_", " "))


def is_share(key: str) -> bool:
    """Whether a number is a share of images, 0..1, which is told in per cent."""
    return key.endswith(("accuracy", "top1", "top5"))


def value(key: str, number: float) -> str:
    """The number as text, in the unit that its name asks for."""
    return f"{number:.2%}" if is_share(key) else f"{number:.4g}"


def short(number: float) -> str:
    """``95,642``, ``30.2 M``, ``4.51 G``."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """``22 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if not math.isfinite(seconds):
        return DASH
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def summary(record: Record) -> str:
    """One run in one line."""
    scores = [f"{title(key)} {value(key, best[1])}" for key in record.scores if (best := record.best(key))]
    scores += [f"test accuracy {record.test['top1']:.2%}"] if "top1" in record.test else []
    epochs = f"{record.finished} of {record.recipe.epochs} epochs"
    return ", ".join([network(record, [record]), epochs, record.state, *scores])


def network(record: Record, runs: Sequence[Record]) -> str:
    """The network's name with those of its arguments that differ between the runs; of one run with all."""
    args = record.recipe.model_args
    others = [run.recipe.model_args for run in runs]
    told = [key for key in args if len(runs) == 1 or any(other.get(key) != args[key] for other in others)]
    return " ".join([record.recipe.model, *(f"{key}={_text(args[key])}" for key in told)])


def numbers(runs: Sequence[Record], trained: Sequence[Trained]) -> list[list[str]]:
    """Rows of the first table: a name and a cell for each run; rows without any number are left out."""
    keys = dict.fromkeys(key for record in runs for key in record.scores)
    measured = dict.fromkeys(key for record in runs for key in record.test)
    rows = [
        ["network", *(network(record, runs) for record in runs)],
        ["state", *(record.state for record in runs)],
        ["epochs", *(f"{record.finished} of {record.recipe.epochs}" for record in runs)],
        ["best epoch", *(DASH if record.best_epoch is None else str(record.best_epoch) for record in runs)],
        *([title(key), *(_best(record, key) for record in runs)] for key in keys),
        *([f"test {title(key)}", *(_test(record, key) for record in runs)] for key in measured if key not in _UNTOLD),
        *([f"last {title(key)}", *(_last(record, key) for record in runs)] for key in ("train_loss", "val_loss")),
        ["images per second", *(_speed(record) for record in runs)],
        ["time", *(_time(record) for record in runs)],
        *_costs(trained),
        ["density", *(_density(record) for record in runs)],
    ]
    return [row for row in rows if any(cell != DASH for cell in row[1:])]


def _costs(trained: Sequence[Trained]) -> list[list[str]]:
    counts = [one.count for one in trained]
    sparse = any(count and count.nonzero_parameters < 0.999 * count.parameters for count in counts)
    rows = [
        ["parameters", *(DASH if count is None else short(count.parameters) for count in counts)],
        ["parameters not 0", *(DASH if count is None else short(count.nonzero_parameters) for count in counts)],
        ["MACs", *(DASH if count is None else short(count.macs) for count in counts)],
        ["MACs not by 0", *(DASH if count is None else short(count.effective_macs) for count in counts)],
    ]
    return rows if sparse else rows[::2]


def _best(record: Record, key: str) -> str:
    best = record.best(key)
    if best is None:
        return DASH
    epoch, number = best
    return value(key, number) + ("" if epoch == record.best_epoch else f" (epoch {epoch})")


def _test(record: Record, key: str) -> str:
    return value(key, record.test[key]) if key in record.test else DASH


def _last(record: Record, key: str) -> str:
    values = record.series(key)[1]
    return value(key, values[-1]) if values else DASH


def _speed(record: Record) -> str:
    speeds = record.series("images_per_second")[1]
    return f"{median(speeds):,.0f}" if speeds else DASH


def _time(record: Record) -> str:
    seconds = record.series("seconds")[1]
    return duration(sum(seconds)) if seconds else DASH


def _density(record: Record) -> str:
    values = record.series("density")[1]
    if values:
        return f"{values[-1]:.3g}"
    return "1" if record.rows and record.recipe.sparse.density == 1 else DASH


def different(runs: Sequence[Record]) -> list[str]:
    """Names of the settings in which any two runs differ, if it changes their numbers."""
    told = [fact for record in runs[1:] for fact in differences(runs[0].recipe, record.recipe)]
    return list(dict.fromkeys(fact.partition(": ")[0] for fact in told))


def shared(runs: Sequence[Record]) -> str:
    """The main settings in which the runs agree, as one line."""
    apart = different(runs)
    same = [words.format(setting(runs[0], name)) for name, words in _MAIN.items() if name not in apart]
    return f"{', '.join(same)}." if same else f"{DASH}"


def changed(record: Record) -> list[list[str]]:
    """Settings of one run that are not the defaults: name, default, value."""
    plain = Recipe(model=record.recipe.model)
    names = [fact.partition(": ")[0] for fact in differences(plain, record.recipe)]
    return [[name, _setting(plain, name), _setting(record.recipe, name)] for name in names]


def setting(record: Record, name: str) -> str:
    """A setting of the recipe, such as ``optim.lr``, as one writes it."""
    return _setting(record.recipe, name)


def _setting(recipe: Recipe, name: str) -> str:
    found: Any = recipe.to_dict()
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return DASH
        found = found[part]
    return _text(found)


def environment(runs: Sequence[Record]) -> list[list[str]]:
    """Rows of the table of where the runs ran: a name, and a cell for each run."""
    keys = dict.fromkeys(key for record in runs for start in record.starts for key in start)
    rows = [[str(key).replace("_", " "), *(_over_starts(record, key) for record in runs)] for key in keys]
    if any(len(record.starts) > 1 for record in runs):
        rows.insert(0, ["starts", *(str(len(record.starts) or DASH) for record in runs)])
    return rows


def _over_starts(record: Record, key: str) -> str:
    """The value at each start of the run, where it changed."""
    values = [_git(start[key]) if key == "git" else _text(start[key]) for start in record.starts if key in start]
    values = list(dict.fromkeys(values))
    if not values:
        return DASH
    return " → ".join(values if len(values) < 3 else [values[0], "...", values[-1]])


def _git(state: Any) -> str:
    if not isinstance(state, Mapping) or not state.get("commit"):
        return _text(state)
    branch = f" on {state['branch']}" if state.get("branch") else ""
    return f"{str(state['commit'])[:10]}{branch}{', with changes not committed' if state.get('dirty') else ''}"


def _text(found: Any) -> str:
    """A value of JSON or YAML as one writes it."""
    match found:
        case None:
            return "none"
        case bool():
            return str(found).lower()
        case float():
            return f"{found:g}"
        case list() | tuple():
            return ", ".join(map(_text, found)) or "none"
        case Mapping():
            return ", ".join(f"{key} {_text(inner)}" for key, inner in found.items()) or "none"
        case _:
            return str(found)
