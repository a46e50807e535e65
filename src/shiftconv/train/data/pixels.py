"""Pictures as bytes on their way from the process that reads them to the one that trains, which normalises them.

Bytes are a quarter of the floats, and memory that is handed over costs more than the arithmetic. Every number is the
one that timm's transform gives, bit for bit: the operations are the same ones in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation per channel, of values in 0..1


class Patch(NamedTuple):
    """A rectangle of a normalised image that is erased, and what it is filled with.

    Attributes:
        rows: first row, and the one after the last.
        columns: likewise.
        filling: float32 ``[3, h, w]``, or ``[3, 1, 1]`` of one colour. No tensor, for a shared one costs a file.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    filling: "np.ndarray[Any, np.dtype[np.float32]]"


class Sample(NamedTuple):
    """One picture as it is handed over: uint8 ``[3, H, W]``, what is to be erased of it, and its class."""

    pixels: Tensor
    erased: list[Patch]
    label: int


@dataclass(frozen=True)
class Look:
    """From a PIL picture in RGB to what a network sees, in two steps: ``pixels`` where it is read, then ``finish``.

    Calling it takes both: float32 ``[3, H, W]``.

    Attributes:
        change: crops, resizes, and whatever else works on pictures.
        normalisation: mean and standard deviation per channel.
        erase: fills rectangles of normalised images, at the end; none: nothing.
    """

    change: Callable[[Image], Image]
    normalisation: Normalisation
    erase: RandomErasing | None = None

    def __call__(self, picture: Image) -> Tensor:
        pixels, erased = self.pixels(picture)
        return self.finish(pixels[None], [erased])[0]

    def pixels(self, picture: Image) -> tuple[Tensor, list[Patch]]:
        """The changed picture, uint8 ``[3, H, W]``, and what ``finish`` is to erase of it.

        All that is random is drawn here, from the global generators.
        """
        picture = self.change(picture)
        # Row by row all red, all green, all blue: to take triples of bytes apart later takes longer.
        lines = bytearray(picture.tobytes("raw", "RGB;L"))
        pixels = torch.frombuffer(lines, dtype=torch.uint8).view(picture.height, 3, picture.width).transpose(0, 1)
        if self.erase is None:
            return pixels, []
        canvas = _Canvas((3, picture.height, picture.width))
        self.erase(canvas)
        return pixels, canvas.patches

    def finish(self, images: Tensor, erased: Sequence[list[Patch]], device: torch.device | None = None) -> Tensor:
        """Normalise and erase.

        Args:
            images: uint8 ``[B, 3, H, W]``.
            erased: the patches of each image, in their order.
            device: where to; none: where the images are.

        Returns:
            float32 ``[B, 3, H, W]``, contiguous.
        """
        device = device or images.device
        quick = device.type == "cuda"  # else a copy would wait for all that the GPU has to do
        images = images.to(device, non_blocking=quick)
        full, mean, std = _constants(self.normalisation, images.device)
        found = images.to(torch.float32).div_(full).sub_(mean).div_(std)
        for image, patches in zip(found, erased, strict=True):
            for patch in patches:
                filling = torch.from_numpy(patch.filling)
                if quick:
                    filling = filling.pin_memory().to(device, non_blocking=True)
                image[:, slice(*patch.rows), slice(*patch.columns)] = filling
        return found


class _Canvas:
    """Stands for a normalised image before timm's RandomErasing and notes what that would fill in."""

    dtype = torch.float32

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.patches: list[Patch] = []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], filling: Tensor) -> None:
        _, rows, columns = place
        self.patches.append(Patch((rows.start, rows.stop), (columns.start, columns.stop), filling.numpy()))


@cache
def _constants(normalisation: Normalisation, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and deviation. A GPU divides exactly by tensors of its own; for a number it takes the reciprocal."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in normalisation)
    return torch.tensor(255.0, device=device), mean, std
