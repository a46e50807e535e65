"""The trained network of a run, looked at for a report: its cost, its zeros and its receptive field."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from shiftconv.analysis import ERF, Count, count, erf
from shiftconv.models.convert import load_checkpoint
from shiftconv.train.data import open_data
from shiftconv.train.recipe import Recipe
from shiftconv.train.record import Record
from shiftconv.train.settings import OWN_DATA, Data

FILES = ("best.pt", "last.pt")
_SMALL = ("digits", "cifar10", "cifar100")  # data sets of 32 x 32 pixels unless the recipe says otherwise


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
        count: parameters and multiply-accumulates.
        densities: by weight, in the order of the network: the share of its numbers that are not 0. Vectors, such as
            biases, are left out.
        density: the same of all these weights together.
        erf: effective receptive field.
        images: what it was measured on, in words.
        failed: why one of the above is missing, or all (``weights``), or ``last.pt`` stands in for ``best.pt``; why the
            ``images`` are noise.
    """

    count: Count | None = None
    densities: Mapping[str, float] = field(default_factory=dict)
    density: float = 1.0
    erf: ERF | None = None
    images: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)


class Probes:
    """Images to look at networks with: those of the run's own validation part where it opens, else noise.

    Runs of the same data are looked at with the same images. Only data that lie on this machine are opened.

    Args:
        number: how many.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._opened: dict[Data, tuple[Tensor, str, str]] = {}

    def of(self, recipe: Recipe) -> tuple[Tensor, str, str]:
        """``[number, 3, H, W]``, normalised; what they are; and why they are noise, if they are."""
        data = replace(recipe.data, workers=0)
        if data not in self._opened:
            self._opened[data] = self._open(recipe)
        return self._opened[data]

    def _open(self, recipe: Recipe) -> tuple[Tensor, str, str]:
        reason = f"the data set {recipe.data.name} may have to be downloaded"
        if recipe.data.name in OWN_DATA:
            try:
                data = open_data(replace(recipe.data, workers=0))
                images, _ = next(iter(data.loader("val", self.number)))
                return images, f"{len(images)} validation {_images(len(images))}", ""
            except Exception as error:  # a network or a data set may raise anything
                reason = first_line(error)
        side = image_side(recipe)
        noise = torch.randn(self.number, 3, side, side, generator=torch.Generator().manual_seed(0))
        return noise, f"{self.number} {_images(self.number)} of noise", reason


def look(record: Record, probes: Probes | None) -> Trained:
    """Look at the weights of a run on the CPU; nothing that is wrong with them raises.

    Args:
        record: of the run.
        probes: images for the receptive field; None leaves it out.
    """
    failed: dict[str, str] = {}
    model = _load(record, failed)
    if model is None:
        return Trained(failed=failed)
    cost = receptive = None
    told = ""
    try:
        cost = count(model, image_side(record.recipe))
    except Exception as error:
        failed["count"] = first_line(error)
    if probes is not None:
        try:
            images, told, reason = probes.of(record.recipe)
            if reason:
                failed["images"] = reason
            receptive = erf(model, images)
        except Exception as error:
            failed["erf"] = first_line(error)
    weights = {name: value for name, value in model.named_parameters() if value.ndim >= 2 and value.numel()}
    active = {name: int(value.count_nonzero()) for name, value in weights.items()}
    densities = {name: active[name] / value.numel() for name, value in weights.items()}
    density = sum(active.values()) / max(sum(value.numel() for value in weights.values()), 1)
    return Trained(cost, densities, density, receptive, told, failed)


def _load(record: Record, failed: dict[str, str]) -> nn.Module | None:
    """The network of the best checkpoint, or else of the last one."""
    there = [record.path / name for name in FILES if (record.path / name).is_file()]
    if not there:
        failed["weights"] = f"the run has no {' or '.join(FILES)}"
    for path in there:
        try:
            model = load_checkpoint(None, path)
        except Exception as error:
            failed.setdefault("weights", first_line(error))
            continue
        if "weights" in failed:
            failed["best.pt"] = f"{failed.pop('weights')}; {path.name} stands in for it"
        return model
    return None


def _images(number: int) -> str:
    return "image" if number == 1 else "images"


def image_side(recipe: Recipe) -> int:
    """Side in pixels of the images that the run looks at, as its settings say."""
    return recipe.data.image_size or (32 if recipe.data.name in _SMALL else 224)


def first_line(error: Exception, most: int = 300) -> str:
    """The error on one line that is not too long to read."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= most else f"{line[:most]} ..."
