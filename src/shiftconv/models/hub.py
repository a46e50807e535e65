"""Networks on the Hugging Face Hub: safetensors, timm's configuration, and a card that tells the run.

timm writes the files and uploads them; here are the checks before, and what the card says. Once this package has been
imported, ``timm.create_model("hf-hub:OWNER/NAME", pretrained=True)`` makes the network again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import timm
import torch
import yaml
from timm.models import push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme, save_config_for_hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shiftconv.models import list_models
from shiftconv.models.convert.identity import Identity, compare

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_TAGS = ("image-classification", "timm", "shiftconv")
_ON_THE_HUB = ("cifar10", "cifar100")  # data sets that have this name there too
# timm leaves drop rates out, and reads the others off the network, which may have another head by now.
_NOT_SAVED = ("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate")
# Settings of a recipe that change no number.
_NOT_TOLD = ("model", "data.folder", "data.workers", "save_minutes", "tensorboard", "loggers")
_WHOLE = ("digits", "cifar10", "cifar100")  # data whose images are looked at whole
_OFF = {  # parts of a recipe that do nothing, by what they hold
    "sparse": lambda part: part.get("density", 1) == 1,
    "distill": lambda part: not part.get("teacher"),
    "mix": lambda part: not (part.get("mixup") or part.get("cutmix") or part.get("cutmix_minmax")),
}


def save_for_hub(
    network: nn.Module,
    folder: str | Path,
    run: str | Path | None = None,
    labels: Sequence[str] | None = None,
    license: str | None = None,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and the card ``README.md``, as they lie on the Hub.

    Args:
        network: a classifier of this package or of timm, in the form that trains.
        folder: where to; made if it is not there. Files of these names are replaced.
        run: the folder of a run that ``shiftconv train`` has ended, or its ``result.json``: the card tells its figures
            and its recipe, and the configuration its image size, normalisation and classes. ``config.yaml`` and
            ``best.pt`` beside it are read if they are there.
        labels: the name of each class, in their order. None: those of the run's data, if it is known.
        license: of the weights, as the Hub spells it. None: what ``network.pretrained_cfg`` says, or apache-2.0.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: ``run`` has no ``result.json``.
        ValueError: timm could not make the network again from its name and arguments, as after ``reparameterize()``;
            the network is not that of the run, or has not its best weights; ``labels`` are not one for each class;
            ``folder`` is a file; or a file of the run is damaged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the target {folder} is a file; give a folder")
    name = folder.resolve().name
    network, config, card = _prepare(network, name, run, labels, license)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as partial, _whole_tensors(network):
        save_for_hf(network, partial, safe_serialization=True, **config)
        (Path(partial) / "README.md").write_text(generate_readme(card, name), encoding="utf-8")
        for file in Path(partial).iterdir():
            file.replace(folder / file.name)
    return folder


def push_to_hub(
    network: nn.Module,
    repo_id: str,
    run: str | Path | None = None,
    labels: Sequence[str] | None = None,
    license: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> "CommitInfo":
    """Upload what :func:`save_for_hub` writes to a repository of the Hub, which is made if it is not there.

    A card that is there already stays.

    Args:
        network: see :func:`save_for_hub`, as for ``run``, ``labels``, ``license`` and the errors.
        repo_id: ``OWNER/NAME``.
        run: see there.
        labels: see there.
        license: see there.
        private: whether a new repository is to be seen by its owner only.
        token: of the Hub; None: that of ``hf auth login``.

    Returns:
        What ``huggingface_hub`` says about the commit.
    """
    network, config, card = _prepare(network, repo_id, run, labels, license)
    with _whole_tensors(network):
        return push_to_hf_hub(
            network, repo_id, token=token, private=private, model_card=card, safe_serialization=True, **config
        )


def _prepare(
    network: nn.Module, name: str, run: str | Path | None, labels: Sequence[str] | None, license: str | None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The network itself, the arguments of timm's writers for it, and its card; all that can fail does so here."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a module, got {type(network).__name__}")
    network = getattr(network, "_orig_mod", network)  # where torch.compile keeps it
    cfg = getattr(network, "pretrained_cfg", None)
    if not isinstance(cfg, Mapping):
        raise ValueError(f"{type(network).__name__} is no network that timm made: it has no pretrained_cfg")
    classes = getattr(network, "num_classes", None)
    if not isinstance(classes, int):
        raise ValueError(f"{type(network).__name__} is a backbone of features_only; save the network that it is from")
    told = _Run() if run is None else _read_run(run)
    told.check(cfg["architecture"], network)
    names = told.data.get("class_names") if labels is None else labels
    if names is not None and (isinstance(names, str) or len(names) != classes):
        raise ValueError(f"labels must be a list of {classes}, one for each class, got {_counted(names)}")
    license = license or cfg.get("license") or "apache-2.0"
    made_with: Mapping[str, Any] = getattr(network, "model_args", {})
    config: dict[str, Any] = dict(
        model_config=dict(pretrained_cfg=dict(license=license)) | (dict(label_names=list(names)) if names else {}),
        model_args={key: value for key, value in made_with.items() if key not in _NOT_SAVED},
        data_config=told.data_config(),
    )
    twin, arguments = _made_again(network, cfg["architecture"], config)
    return network, config, _card(twin, arguments, name, told, license)


def _made_again(network: nn.Module, name: str, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The network called ``name`` that timm makes of the configuration, without data, and its arguments.

    Raises:
        ValueError: it has not got the weights that ``network`` has.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        save_config_for_hf(network, str(file), **config)
        arguments = json.loads(file.read_text())["model_args"]
        try:
            with torch.device("meta"):
                twin = timm.create_model(f"local-dir:{folder}")
        except Exception as error:  # constructors raise anything
            raise ValueError(f"timm cannot make {Identity(name, arguments)} again: {error}") from error
    if difference := compare(network.state_dict(), twin.state_dict()):
        raise ValueError(
            f"the network is not what timm makes by {Identity(name, arguments)}: {difference}; save it before "
            "reparameterize() and other changes"
        )
    return twin, arguments


@contextmanager
def _whole_tensors(network: nn.Module) -> Iterator[None]:
    """Lets its state dict have what safetensors takes: tensors in one piece, each in memory of its own."""

    def copy(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
        for key, value in state_dict.items():
            whole = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
            state_dict[key] = whole.copy_(value)

    handle = network.register_state_dict_post_hook(copy)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Run:
    """What the files of a run say; empty where one is missing.

    Attributes:
        path: the file ``result.json``.
        result: what it holds.
        recipe: what ``config.yaml`` holds.
        best: what ``best.pt`` holds.
    """

    path: Path = Path()
    result: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Any]:
        return self.best.get("data", {})

    def check(self, architecture: str, network: nn.Module) -> None:
        """Raise ValueError unless the figures are those of ``network``, as far as can be told."""
        trained = str(self.recipe.get("model", architecture)).partition(".")[0]
        if trained != architecture:
            raise ValueError(f"the run in {self.path.parent} trained {trained}, not {architecture}")
        ours = network.state_dict()
        averaged = bool(self.result.get("averaged"))
        state = self.best.get("ema" if averaged else "model", {})
        if self.best and not (state.keys() == ours.keys() and _equal(ours, state)):
            what, how = ("averaged weights", " with ema=True") if averaged else ("weights", "")
            whose = f"{what} of {self.path.with_name('best.pt')}"
            raise ValueError(f"the network has not the {whose}, whose figures the card would tell; load them{how}")

    def data_config(self) -> dict[str, Any] | None:
        """How timm is to prepare images, as the run did."""
        if not self.data:
            return None
        side = self.data["image_size"]
        common = dict(input_size=(3, side, side), mean=self.data["mean"], std=self.data["std"])
        if self.data["name"] in _WHOLE:
            return dict(crop_pct=1.0, interpolation="bilinear", **common)
        crop = self.recipe.get("data", {}).get("crop_share", 0.875)
        mode = "squash" if side >= 384 and crop == 1 else "center"
        return dict(crop_pct=crop, crop_mode=mode, interpolation="bicubic", **common)


def _read_run(run: str | Path) -> _Run:
    path = Path(run)
    path = path / "result.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; a run writes it when it has ended")
    config, best = path.with_name("config.yaml"), path.with_name("best.pt")
    file = path
    try:
        parts = [json.loads(path.read_text())]
        file = config
        parts.append(yaml.safe_load(config.read_text()) if config.exists() else {})
        file = best
        parts.append(torch.load(best, map_location="cpu", weights_only=True) if best.exists() else {})
    except Exception as error:  # torch raises nearly anything for a damaged file
        raise ValueError(f"cannot read {file}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    for file, part in zip((path, config, best), parts, strict=True):
        if not isinstance(part, dict):
            raise ValueError(f"{file} is not what a run writes: it holds no names and values")
    return _Run(path, *parts)


def _equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value.cpu(), theirs[key].to(value.dtype)) for key, value in ours.items())


def _counted(names: Any) -> str:
    return repr(names) if isinstance(names, str) else str(len(names))


def _card(twin: nn.Module, arguments: dict[str, Any], name: str, run: _Run, license: str) -> dict[str, Any]:
    """What timm makes the card of.

    Args:
        twin: the network, without data.
        arguments: what it was made with.
        name: of the repository.
        run: what trained it.
        license: of the weights.
    """
    cfg: dict[str, Any] = twin.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    architecture, shape = cfg["architecture"], tuple(cfg["input_size"])
    papers = cfg.get("paper_ids") or ()
    papers = [papers] if isinstance(papers, str) else papers
    parameters = sum(value.numel() for value in twin.parameters())
    details: dict[str, Any] = {
        "Network": f"`{Identity(architecture, arguments)}`",
        "Model Stats": [
            f"Parameters: {parameters:,}",
            f"Multiply-accumulates: {_macs(twin, shape):,}, for one image",
            f"Image size: {shape[1]} x {shape[2]}, {shape[0]} channels",
        ],
        "Papers": [f"https://arxiv.org/abs/{paper.partition(':')[2] or paper}" for paper in papers],
        "Original": cfg.get("origin_url"),
    }
    data = run.recipe.get("data", {}).get("name")
    if data in _ON_THE_HUB:
        details["Dataset"] = data
    for part, title in (("test", "Test"), ("val", "Validation")):
        details[title] = _figures(run.result.get(part) or {})
    if "best_epoch" in run.result:
        details["Best epoch"] = f"{run.result['best_epoch']}, by validation accuracy"
    details["Recipe"] = _settings(run.recipe)
    return dict(
        tags=_TAGS,
        license=license,
        description=_described(data),
        details={title: value for title, value in details.items() if value},
        usage=_usage(architecture, name if "/" in name else f"OWNER/{name}"),
    )


def _described(data: str | None) -> str:
    images = "a folder of images" if data == "folder" else data
    return "An image classifier" + (f", trained on {images} by `shiftconv`." if data else ", saved by `shiftconv`.")


def _usage(architecture: str, repo_id: str) -> str:
    ours = "import shiftconv  # makes its networks known to timm\n" if architecture in list_models() else ""
    load = f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()'
    return f"```python\nimport timm\n{ours}\n{load}\n```"


def _macs(twin: nn.Module, shape: tuple[int, ...]) -> int:
    """As ``shiftconv.count`` counts, of a network without data."""
    twin.eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.zeros(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


def _figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Lines of the card; ``top1`` and ``top5`` are shares, a whole number is a count."""
    lines: dict[str, str] = {}
    for key, value in metrics.items():
        if key.startswith("top"):
            lines[f"top-{key[3:]} accuracy"] = f"{value:.2%}"
        elif isinstance(value, int | float):
            lines[key.replace("_", " ")] = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return lines


def _settings(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is set in a recipe, under the names of its options; what is off or 0 is left out."""
    lines: dict[str, Any] = {}
    for key, value in recipe.items():
        name = prefix + key
        if isinstance(value, Mapping):
            off = name == "model_args" or (name in _OFF and _OFF[name](value))
            lines |= {} if off else _settings(value, f"{name}.")
        elif value and value != "none" and name not in _NOT_TOLD:
            lines[name] = value
    return lines
