"""What a network learns. The loop knows no more of a task than this: a loss to train with, and scores that add up."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shiftconv.train.recipe import Recipe


class Task(nn.Module):
    """A network with its loss; the loop trains all parameters in it.

    Attributes:
        network: what is trained, saved and deployed.
        beside: what trains with it and is needed for the loss only; saved in the run's checkpoints.
        scores: names of what is counted; the first one, the better the higher, chooses the best epoch.
    """

    scores: tuple[str, ...] = ()

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.beside = nn.ModuleDict()

    def forward(self, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        """The mean loss of a batch to train with, and the network's outputs."""
        raise NotImplementedError

    def measure(self, network: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        """The mean loss of a batch to validate with, and the outputs of ``network``, which may be an average."""
        raise NotImplementedError

    def counts(self, outputs: Any, targets: Any) -> Tensor:
        """Of a batch, float64: what adds up over batches and processes to the scores."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """How many counts there are."""
        return len(self.scores)

    def read(self, counts: Sequence[float], examples: int) -> dict[str, float]:
        """The scores, by their names, from the sum of the counts of so many examples."""
        return {name: count / max(1, examples) for name, count in zip(self.scores, counts, strict=True)}


class Classification(Task):
    """Images ``[B, 3, H, W]`` to one of K classes; labels int64 ``[B]``, or shares ``[B, K]`` where images are mixed.

    Args:
        network: gives logits ``[B, K]``.
        loss: ``ce`` or ``bce``, see :class:`~shiftconv.train.recipe.Recipe`.
        label_smoothing: share of a label that is spread over all classes; of shares it is theirs already.
    """

    scores = ("top1", "top5")

    def __init__(self, network: nn.Module, loss: str = "ce", label_smoothing: float = 0.0) -> None:
        super().__init__(network)
        self._hard = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self._soft = SoftTargetCrossEntropy()
        self._binary = BinaryCrossEntropy(smoothing=label_smoothing, sum_classes=True) if loss == "bce" else None

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self._binary is not None:
            return self._binary(logits, targets)
        return self._hard(logits, targets) if targets.ndim == 1 else self._soft(logits, targets)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(inputs)
        return self.loss(logits, targets), logits

    def measure(self, network: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(inputs)
        if int(targets.max()) >= logits.shape[1]:
            raise ValueError(f"the network has {logits.shape[1]} classes, but a label is {int(targets.max())}")
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets), logits

    def counts(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How often the right class is the most probable one, the second, and so on to the fifth."""
        found = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]
        places = found.sum(0, dtype=torch.float64)
        return places if len(places) == self.width else nn.functional.pad(places, (0, self.width - len(places)))

    @property
    def width(self) -> int:
        return 5

    def read(self, counts: Sequence[float], examples: int) -> dict[str, float]:
        return {"top1": counts[0] / max(1, examples), "top5": sum(counts) / max(1, examples)}


class Segmentation(Task):
    """Images to a class of each pixel: logits ``[B, K, H, W]``, labels int64 ``[B, H, W]``.

    Scores: the mean over the classes of intersection over union (of classes that occur), and the share of right pixels.

    Args:
        network: gives logits, which are resized to the labels where they are smaller.
        classes: K.
        ignore: label of pixels that do not count.
        label_smoothing: as for classification.
    """

    scores = ("miou", "accuracy")

    def __init__(self, network: nn.Module, classes: int, ignore: int = 255, label_smoothing: float = 0.0) -> None:
        super().__init__(network)
        self.classes, self.ignore = classes, ignore
        self._loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing, ignore_index=ignore)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.measure(self.network, inputs, targets)

    def measure(self, network: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(inputs).float()
        if logits.shape[-2:] != targets.shape[-2:]:
            logits = nn.functional.interpolate(logits, targets.shape[-2:], mode="bilinear")
        return self._loss(logits, targets), logits

    def counts(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The confusion matrix, ``[K * K]``: pixels by true class and by found one."""
        seen = targets != self.ignore
        pairs = targets[seen] * self.classes + outputs.argmax(1)[seen]
        return torch.bincount(pairs, minlength=self.classes**2).double()

    @property
    def width(self) -> int:
        return self.classes**2

    def read(self, counts: Sequence[float], examples: int) -> dict[str, float]:
        matrix = torch.tensor(counts, dtype=torch.float64).view(self.classes, self.classes)
        right, either = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        there = either > 0
        miou = float((right[there] / either[there]).mean()) if there.any() else 0.0
        return {"miou": miou, "accuracy": float(right.sum() / matrix.sum().clamp(min=1))}


class Detection(Task):
    """Networks by torchvision's convention: in training mode, images and their boxes go in and losses come out.

    Inputs are a list of images, targets a list of dicts. What validation measures is the sum of the losses, without
    gradients and with norms as in evaluation; the score, by which epochs compare, is its negative.
    """

    scores = ("negative_loss",)

    def forward(self, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        loss = torch.stack([*self.network(inputs, targets).values()]).sum()
        return loss, loss.detach().view(1)

    def measure(self, network: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        for part in network.modules():  # torchvision's networks give losses in training mode only
            part.training = not isinstance(part, nn.modules.batchnorm._NormBase | nn.Dropout)
        loss = torch.stack([*network(inputs, targets).values()]).sum()
        return loss, loss.view(1)

    def counts(self, outputs: Tensor, targets: Any) -> Tensor:
        return -outputs.double() * len(targets)


def classification(recipe: Recipe, network: nn.Module) -> Classification:
    """The task of a recipe without a teacher."""
    return Classification(network, recipe.loss, recipe.label_smoothing)
