"""What a data set that fits into memory hands over, before it is normalised and augmented."""

from dataclasses import dataclass

from torch import Tensor

from shiftconv.train.data.images import Normalisation


@dataclass(frozen=True)
class Source:
    """Images and labels of each part.

    Attributes:
        parts: train, val and test: uint8 ``[N, 3, H, W]`` in 0..255 and int64 ``[N]``.
        class_names: the name of each class, in the order of the labels.
        normalisation: mean and standard deviation per channel, of values in 0..1.
        mirrored_looks_real: whether a mirrored image could be one of the data set; a digit could not.
    """

    parts: dict[str, tuple[Tensor, Tensor]]
    class_names: tuple[str, ...]
    normalisation: Normalisation
    mirrored_looks_real: bool
