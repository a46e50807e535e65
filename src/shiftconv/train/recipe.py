"""What one training run is: plain, frozen, checked values. Imports no torch, so that a command line starts at once."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Self, get_args

from shiftconv.names import unknown

DataName = Literal["digits", "cifar10", "cifar100", "folder"]
OptimizerName = Literal["sgd", "adam", "adamw", "lamb", "lion"]
ScheduleName = Literal["step", "cosine", "constant"]
Amp = Literal["none", "bf16", "fp16"]
SparseRule = Literal["static", "set", "set_signed", "rigl", "snfs", "mixed"]
Allocation = Literal["uniform", "erk", "snip", "snip_layers", "grasp"]
Layers = Literal["all", "large_kernels", "pointwise"]
Decay = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Data:
    """Which images a run learns from.

    Attributes:
        name: digits (comes with scikit-learn, works offline), cifar10, cifar100, or folder (any folder of images).
        folder: Where the images are. CIFAR: the folder that holds, or shall hold, the download; default ./data. Folder:
            one with train/ and val/ (or validation/), perhaps test/, or one with a sub-folder per class, which is split
            80/10/10.
        image_size: Side of the square images in pixels; none: 32 for digits and CIFAR, 224 for a folder.
        workers: Processes that read images; none: 0 for digits and CIFAR, which stay in memory, 2 for a folder. The
            numbers of a run do not depend on it.
        val_share: Share of the training images put aside for validation, where the data set has no validation split.
        augment: Change the training images at random: crops, and mirroring where flip allows it.
        flip: Mirror half of the training images; none: yes, but for digits.
        crop_padding: Digits and CIFAR: black pixels around the image before its random crop.
    """

    name: DataName = "digits"
    folder: str | None = None
    image_size: int | None = None
    workers: int | None = None
    val_share: float = 0.1
    augment: bool = True
    flip: bool | None = None
    crop_padding: int = 4

    def __post_init__(self) -> None:
        _one_of("data set", self.name, DataName)
        if self.folder is not None and not isinstance(self.folder, str):
            raise TypeError(f"data.folder must be a path as text, got {self.folder!r}")
        if self.name == "folder" and not self.folder:
            raise ValueError("data.name 'folder' needs data.folder, the folder that holds the images")
        if self.image_size is not None:
            _integer("data.image_size", self.image_size, 1)
        if self.workers is not None:
            _integer("data.workers", self.workers, 0)
        _number("data.val_share", self.val_share, above=0, below=0.5)
        _integer("data.crop_padding", self.crop_padding, 0)
        _flags("data", augment=self.augment)
        if self.flip is not None:
            _flags("data", flip=self.flip)


@dataclass(frozen=True)
class Optim:
    """How the weights change.

    Attributes:
        name: The optimiser: sgd, adam, adamw, lamb or lion.
        lr: Learning rate at its highest.
        momentum: Momentum of sgd; the others have their own defaults.
        nesterov: Nesterov's momentum; sgd only.
        weight_decay: Weight decay.
        decay_norms: Decay norms and biases too, as the ShiftResNet authors did; no: only weights with two or more axes.
        schedule: step (times gamma after each milestone), cosine (down to min_lr) or constant.
        milestones: Schedule step: after how many finished epochs the rate drops.
        gamma: Schedule step: what each milestone multiplies the rate by.
        min_lr: Schedule cosine: the rate at the end.
        warmup_epochs: Epochs, fractions allowed, in which the rate rises in a line from warmup_lr to lr.
        warmup_lr: The rate of the first update of a warm-up.
    """

    name: OptimizerName = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norms: bool = True
    schedule: ScheduleName = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0

    def __post_init__(self) -> None:
        _one_of("optimiser", self.name, OptimizerName)
        _one_of("schedule", self.schedule, ScheduleName)
        _number("optim.lr", self.lr, above=0)
        _number("optim.momentum", self.momentum, low=0, below=1)
        _flags("optim", nesterov=self.nesterov, decay_norms=self.decay_norms)
        for name in ("weight_decay", "min_lr", "warmup_epochs", "warmup_lr"):
            _number(f"optim.{name}", getattr(self, name), low=0)
        _number("optim.gamma", self.gamma, above=0, high=1)
        if not isinstance(self.milestones, tuple | list):
            raise TypeError(f"optim.milestones must be a list of whole numbers, got {self.milestones!r}")
        object.__setattr__(self, "milestones", tuple(self.milestones))  # YAML has lists only
        for milestone in self.milestones:
            _integer("optim.milestones", milestone, 1)
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"optim.milestones must rise, got {self.milestones}")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("optim.schedule 'step' needs optim.milestones; use 'constant' for a rate that never drops")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(f"optim.nesterov needs sgd with momentum, got {self.name} with {self.momentum}")


@dataclass(frozen=True)
class Sparsity:
    """Which weights are zero; see ``shiftconv.sparse``.

    Attributes:
        density: Share of the weights that are active; 1: all, and the rest of these settings does nothing.
        rule: What moves the active ones: rigl, set, set_signed, snfs, mixed, or static for nothing.
        allocate: How layers share the density: erk, uniform, or by the first images snip, snip_layers, grasp.
        granularity: What is active or not: weight, kernel, kernel:4, channel, hidden (units), 2:4, fan_in.
        layers: Which layers: all, large_kernels, or pointwise (linear ones and 1x1 convolutions).
        prune_fraction: Share of the active weights that an update exchanges, at first.
        final_fraction: The same at the end.
        decay: How it falls: cosine, linear or constant.
        every_steps: Updates of the weights between two updates of the masks.
        warmup_epochs: Epochs, fractions allowed, before the masks first move.
        stop_fraction: Share of the run after which they stay.
        share_every: Parallel paths have one mask at each so many-th update, and go their own ways between; 1: always.
        start_density: The density falls from this one, cubically; none: it is constant.
        density_epochs: First and last epoch, fractions allowed, of that fall.
    """

    density: float = 1.0
    rule: SparseRule = "rigl"
    allocate: Allocation = "erk"
    granularity: str = "weight"
    layers: Layers = "all"
    prune_fraction: float = 0.3
    final_fraction: float = 0.0
    decay: Decay = "cosine"
    every_steps: int = 100
    warmup_epochs: float = 0.0
    stop_fraction: float = 0.75
    share_every: int = 1
    start_density: float | None = None
    density_epochs: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _number("sparse.density", self.density, above=0, high=1)
        _one_of("sparse rule", self.rule, SparseRule)
        _one_of("allocation", self.allocate, Allocation)
        _one_of("layers", self.layers, Layers)
        _one_of("decay", self.decay, Decay)
        if not isinstance(self.granularity, str):
            raise TypeError(f"sparse.granularity must be a name, got {self.granularity!r}")
        for name in ("prune_fraction", "final_fraction", "stop_fraction"):
            _number(f"sparse.{name}", getattr(self, name), low=0, high=1)
        _integer("sparse.every_steps", self.every_steps, 1)
        _integer("sparse.share_every", self.share_every, 1)
        _number("sparse.warmup_epochs", self.warmup_epochs, low=0)
        if self.start_density is not None:
            _number("sparse.start_density", self.start_density, above=0, high=1)
        object.__setattr__(self, "density_epochs", tuple(self.density_epochs))  # YAML has lists only
        if len(self.density_epochs) != 2 or not 0 <= self.density_epochs[0] < self.density_epochs[1]:
            raise ValueError(f"sparse.density_epochs must be two rising numbers, got {self.density_epochs}")


@dataclass(frozen=True)
class Recipe:
    """The run.

    A variant is a ``dataclasses.replace`` of another recipe.

    Attributes:
        model: Name of the network, as ``shiftconv list`` shows it, or of any other network of timm.
        model_args: Arguments of the network, such as expansion; the number of classes comes from the data.
        data: The images.
        epochs: How often every training image is seen.
        batch_size: Images per update of the weights.
        optim: The optimiser and its learning rate.
        sparse: Which weights are zero.
        label_smoothing: Share of the target that is spread over all classes.
        amp: Mixed precision: none, bf16, or fp16 (on a GPU only).
        clip_grad: Longest allowed gradient (its norm over all weights); none: no limit.
        seed: All that is random follows from this number.
        deterministic: Let torch use deterministic algorithms only; needed for equal numbers on a GPU, and slower.
        channels_last: Keep images and weights in the channels-last memory format.
        compile: Compile the network with torch.compile.
        tensorboard: Write curves for TensorBoard into the run's folder.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    epochs: int = 100
    batch_size: int = 128
    optim: Optim = field(default_factory=Optim)
    sparse: Sparsity = field(default_factory=Sparsity)
    label_smoothing: float = 0.0
    amp: Amp = "none"
    clip_grad: float | None = None
    seed: int = 0
    deterministic: bool = False
    channels_last: bool = False
    compile: bool = False
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise TypeError(f"model must be the name of a network, got {self.model!r}")
        if not isinstance(self.model_args, dict) or not all(isinstance(key, str) for key in self.model_args):
            raise TypeError(f"model_args must be a dict of named arguments, got {self.model_args!r}")
        for name, kind in (("data", Data), ("optim", Optim), ("sparse", Sparsity)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be of class {kind.__name__}, got {getattr(self, name)!r}")
        _integer("epochs", self.epochs, 1)
        _integer("batch_size", self.batch_size, 1)
        _integer("seed", self.seed, 0)
        _one_of("amp", self.amp, Amp)
        _number("label_smoothing", self.label_smoothing, low=0, below=1)
        if self.clip_grad is not None:
            _number("clip_grad", self.clip_grad, above=0)
        names = ("deterministic", "channels_last", "compile", "tensorboard")
        _flags("recipe", **{name: getattr(self, name) for name in names})
        if self.optim.warmup_epochs > self.epochs:  # as many are fine: a first look at a recipe with --epochs 1
            warmup = self.optim.warmup_epochs
            raise ValueError(f"optim.warmup_epochs must be at most the number of epochs, {self.epochs}, got {warmup}")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values that JSON and YAML can hold; tuples become lists.

        Raises:
            TypeError: if ``model_args`` holds something else than numbers, text, lists and dicts.
        """
        try:
            return json.loads(json.dumps(asdict(self)))
        except TypeError as error:
            raise TypeError(f"model_args must hold numbers, text, lists and dicts only: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The recipe that ``to_dict`` wrote.

        Raises:
            ValueError: for an unknown or a missing name, with a did-you-mean.
            TypeError: for a value of the wrong kind.
        """
        return _from_dict(cls, values, "recipe")


def differences(first: Recipe, second: Recipe) -> list[str]:
    """What makes two runs give different numbers, as ``optim.lr: 0.1 / 0.05``; empty for the same run.

    Where the images lie, how many processes read them and what is logged change no number.
    """
    neutral = {"data.folder", "data.workers", "tensorboard"}
    one, two = _flat(first.to_dict()), _flat(second.to_dict())
    names = [name for name in {**one, **two} if name not in neutral]
    return [f"{name}: {one.get(name)} / {two.get(name)}" for name in names if one.get(name) != two.get(name)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _from_dict(cls: Any, values: Any, what: str) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"{what} must be a mapping of names to values, got {values!r}")
    known = {f.name: f for f in fields(cls)}
    for name in values:
        if name not in known:
            raise unknown(f"{what} setting", name, known)
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"the {what} has no {name!r}")
    kinds = {name: f.type for name, f in known.items() if isinstance(f.type, type) and is_dataclass(f.type)}
    return cls(**{name: _from_dict(kinds[name], v, name) if name in kinds else v for name, v in values.items()})


def _one_of(kind: str, value: object, names: Any) -> None:
    if value not in get_args(names):
        raise unknown(kind, value, get_args(names))


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def _number(
    name: str,
    value: object,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    wants = [
        (low, "at least", lambda limit: value >= limit),
        (above, "above", lambda limit: value > limit),
        (high, "at most", lambda limit: value <= limit),
        (below, "below", lambda limit: value < limit),
    ]
    wants = [want for want in wants if want[0] is not None]
    if not math.isfinite(value) or not all(holds(limit) for limit, _, holds in wants):
        text = " and ".join(f"{words} {limit:g}" for limit, words, _ in wants)
        raise ValueError(f"{name} must be {text}, got {value!r}")


def _flags(owner: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{owner}.{name} must be true or false, got {value!r}")
