"""What one training run is: plain, frozen, checked values. Imports no torch, so that a command line starts at once."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Self

from shiftconv.names import unknown
from shiftconv.train.checks import flags, integer, number, one_of, optional, text
from shiftconv.train.settings import Data, Distillation, Mix, Optim, Sparsity

Amp = Literal["none", "bf16", "fp16"]
Loss = Literal["ce", "bce"]
Parallel = Literal["ddp", "fsdp"]
Logger = Literal["wandb", "mlflow", "trackio"]
_PARTS = {"data": Data, "optim": Optim, "sparse": Sparsity, "distill": Distillation, "mix": Mix}


@dataclass(frozen=True)
class Recipe:
    """The run.

    A variant is a ``dataclasses.replace`` of another recipe.

    Attributes:
        model: Name of the network, as ``shiftconv list`` shows it, or of any other network of timm.
        model_args: Arguments of the network, such as expansion; the number of classes comes from the data.
        data: The images.
        epochs: How often every training image is seen.
        batch_size: Images per update of the weights, on all devices together.
        micro_batch_size: Images that one device computes at a time, at most; gradients of more are accumulated. None:
            its whole share.
        optim: The optimiser and its learning rate.
        sparse: Which weights are zero.
        distill: A teacher to learn from.
        weights: A checkpoint, ours or a released one, to start from; a head for other classes is left out.
        head_scale: What the head's first weights are multiplied by.
        loss: ce (cross entropy) or bce (binary cross entropy of each class, summed; Wightman et al. 2021).
        label_smoothing: Share of the target that is spread over all classes.
        mix: Two training images in one.
        ema_decay: Keep an average of the weights, too, this share of which stays at each update; none: no average.
        amp: Mixed precision: none, bf16, or fp16 (on a GPU only).
        clip_grad: Longest allowed gradient (its norm over all weights); none: no limit.
        sync_batch_norm: Batch norms take their statistics over the images of all devices.
        parallel: ddp (every device has all weights) or fsdp (each has its part of them).
        seed: All that is random follows from this number.
        deterministic: Let torch use deterministic algorithms only; needed for equal numbers on a GPU, and slower.
        channels_last: Keep images and weights in the channels-last memory format.
        compile: Compile the network with torch.compile.
        save_minutes: Write a checkpoint within an epoch after so many minutes; one is written after each epoch anyway.
        tensorboard: Write curves for TensorBoard into the run's folder.
        loggers: Send the curves to one of these, too, or to a list of them: wandb, mlflow, trackio.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    epochs: int = 100
    batch_size: int = 128
    micro_batch_size: int | None = None
    optim: Optim = field(default_factory=Optim)
    sparse: Sparsity = field(default_factory=Sparsity)
    distill: Distillation = field(default_factory=Distillation)
    weights: str | None = None
    head_scale: float = 1.0
    loss: Loss = "ce"
    label_smoothing: float = 0.0
    mix: Mix = field(default_factory=Mix)
    ema_decay: float | None = None
    amp: Amp = "none"
    clip_grad: float | None = None
    sync_batch_norm: bool = False
    parallel: Parallel = "ddp"
    seed: int = 0
    deterministic: bool = False
    channels_last: bool = False
    compile: bool = False
    save_minutes: float = 10.0
    tensorboard: bool = True
    loggers: tuple[Logger, ...] | Logger = ()

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise TypeError(f"model must be the name of a network, got {self.model!r}")
        if not isinstance(self.model_args, dict) or not all(isinstance(key, str) for key in self.model_args):
            raise TypeError(f"model_args must be a dict of named arguments, got {self.model_args!r}")
        for name, kind in _PARTS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be of class {kind.__name__}, got {getattr(self, name)!r}")
        optional(text, "weights", self.weights)
        number("head_scale", self.head_scale, low=0)
        integer("epochs", self.epochs, 1)
        integer("batch_size", self.batch_size, 1)
        optional(integer, "micro_batch_size", self.micro_batch_size, 1)
        integer("seed", self.seed, 0)
        one_of("amp", self.amp, Amp)
        one_of("loss", self.loss, Loss)
        one_of("way to train in parallel", self.parallel, Parallel)
        number("label_smoothing", self.label_smoothing, low=0, below=1)
        optional(number, "ema_decay", self.ema_decay, low=0, below=1)
        optional(number, "clip_grad", self.clip_grad, above=0)
        number("save_minutes", self.save_minutes, above=0)
        names = ("sync_batch_norm", "deterministic", "channels_last", "compile", "tensorboard")
        flags("recipe", **{name: getattr(self, name) for name in names})
        names = (self.loggers,) if isinstance(self.loggers, str) else tuple(self.loggers)  # YAML has lists only
        object.__setattr__(self, "loggers", names)
        for logger in names:
            one_of("logger", logger, Logger)
        self._check_together()

    def _check_together(self) -> None:
        if self.optim.warmup_epochs > self.epochs:  # as many are fine: a first look at a recipe with --epochs 1
            warmup = self.optim.warmup_epochs
            raise ValueError(f"optim.warmup_epochs must be at most the number of epochs, {self.epochs}, got {warmup}")
        if self.parallel == "fsdp" and self.sparse.density < 1:
            raise ValueError("parallel 'fsdp' cannot train sparse, for masks need whole weights; use 'ddp'")

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

    Where the images lie, how many processes read them and what is logged change no number; how the work is shared out
    among devices changes none but by rounding, and by batch norms that are not synchronised.
    """
    neutral = {"data.folder", "data.workers", "micro_batch_size", "parallel", "save_minutes", "tensorboard", "loggers"}
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
