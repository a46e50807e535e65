"""What all shifts of one map share: the window they compute, how they show themselves, and their dense kernel."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from shiftconv.nn.arguments import crops, padding, per_axis, positive
from shiftconv.ops import PaddingMode, shift
from shiftconv.ops.sampling import Crop


class ShiftModule(nn.Module):
    """A shift of any rank; a subclass fixes ``ndim``, the number of spatial axes, and makes ``offset`` ``[C, ndim]``.

    Args:
        channels: ``C``.
        padding_mode: what the map reads beyond its border, as in :func:`shiftconv.ops.shift`.
        crop: the pixels to cut, as there.
        stride: keep every ``stride``-th position, as there.
    """

    ndim: ClassVar[int]
    offset: Tensor

    def __init__(
        self,
        channels: int,
        padding_mode: PaddingMode = "zeros",
        crop: Crop | None = None,
        stride: int | Sequence[int] = 1,
    ):
        super().__init__()
        self.channels = positive("channels", channels)
        self.padding_mode: PaddingMode = padding(padding_mode)
        self.crop = crops(crop, self.ndim)
        strides = per_axis("stride", stride, self.ndim)
        self.stride = strides if set(strides) != {1} else 1  # the operators know a plain 1 fastest

    def equivalent_kernel(self) -> Tensor:
        """The shift as a dense depthwise kernel ``[C, 1, *K]`` on the device of the offsets.

        Each extent of ``K`` is odd, ``2 * r + 1`` with an ``r`` that reaches the farthest tap, and entry ``r`` is the
        middle, so that a strided cross-correlation of the map padded by ``r`` on both sides, less the crop, gives the
        output of the module: ``conv2d(pad(x, r - crop, mode), kernel, stride=stride, groups=C)``.
        """
        return dense_kernel(self.offset)

    def _window_repr(self) -> str:
        text = f", padding_mode={self.padding_mode!r}" if self.padding_mode != "zeros" else ""
        text += f", crop={self.crop}" if self.crop is not None else ""
        return text + (f", stride={self.stride}" if self.stride != 1 else "")


class IntegerShift(ShiftModule):
    """A shift by whole pixels: ``offset`` is an int64 buffer."""

    def forward(self, x: Tensor) -> Tensor:
        return shift(x, self.offset, self.padding_mode, self.crop, self.stride)


def dense_kernel(offset: Tensor, reach: Sequence[int] | None = None) -> Tensor:
    """Kernel ``[C, 1, *K]`` whose cross-correlation is the shift by ``offset`` ``[C, D]``.

    Args:
        offset: integers give a one-hot kernel in torch's default dtype; real numbers the weights of the (bi/tri)linear
            interpolation in their own dtype, differentiable as the operator is.
        reach: ``r`` of each axis, ``K = 2 * r + 1``; by default as far as the farthest tap.

    Raises:
        ValueError: an offset that is not finite.
    """
    if not offset.isfinite().all():
        raise ValueError("equivalent_kernel needs finite offsets, got NaN or infinite ones")
    blend = offset.is_floating_point()
    if reach is None:
        farthest = offset.detach().abs().amax(0)
        reach = [int(r) + blend for r in farthest.tolist()]
    kernel = torch.ones((), dtype=offset.dtype if blend else None, device=offset.device)
    for axis, r in enumerate(reach):
        tap = torch.arange(-r, r + 1, device=offset.device)
        at = -offset[:, axis, None]  # the map at p - offset is the tap at -offset
        cell = at.detach().floor()
        weight = (tap == cell).to(kernel.dtype)
        if blend:
            far = at - cell
            weight = weight * (1 - far) + (tap == cell + 1) * far
        kernel = kernel[..., None] * weight.view(-1, *(1,) * axis, 2 * r + 1)
    return kernel[:, None]
