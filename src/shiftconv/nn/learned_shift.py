"""Shifts that are learned: one real offset per channel and axis, trained with the weights around it.

Sources: Jeon and Kim, "Constructing Fast Network through Deconstruction of Convolution" (Active Shift), NeurIPS 2018,
arXiv:1806.07370; Chen et al., "All You Need is a Few Shifts" (Sparse Shift), CVPR 2019, arXiv:1903.05285.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from shiftconv.names import unknown
from shiftconv.nn.arguments import Range, ranges
from shiftconv.nn.base import IntegerShift, ShiftModule, dense_kernel
from shiftconv.nn.shift import Shift1d, Shift2d, Shift3d
from shiftconv.ops import PaddingMode, active_shift, sparse_shift
from shiftconv.ops.active_shift import round_offset
from shiftconv.ops.sampling import Crop

Init = Literal["uniform", "signed", "grid"]


class LearnedShift(ShiftModule):
    """A shift of any rank whose ``offset`` ``[C, D]`` is a parameter."""

    def __init__(
        self,
        channels: int,
        init_range: float | Sequence[float | Range] = 1.0,
        padding_mode: PaddingMode = "zeros",
        crop: Crop | None = None,
        stride: int | Sequence[int] = 1,
        init: Init = "uniform",
        normalize_gradient: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(channels, padding_mode, crop, stride)
        if init not in get_args(Init):
            raise unknown("init", init, get_args(Init))
        self.init: Init = init
        self.init_range = ranges("init_range", init_range, self.ndim)
        if init == "grid" and any(not end.is_integer() for axis in self.init_range for end in axis):
            raise ValueError(f"init 'grid' takes whole numbers as init_range, got {init_range}")
        self.normalize_gradient = normalize_gradient
        self.offset = nn.Parameter(torch.empty(channels, self.ndim))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the offsets anew, from ``generator`` or torch's default one."""
        if self.init == "grid":
            self.offset.copy_(_grid(self.channels, self.init_range))
            return
        low, high = torch.tensor(self.init_range, dtype=self.offset.dtype, device=self.offset.device).unbind(1)
        draw = torch.empty_like(self.offset).uniform_(generator=generator)
        if self.init == "signed":
            positive = torch.empty_like(self.offset).uniform_(generator=generator) < 0.5
            self.offset.copy_(torch.where(positive, high, low) * draw)
        else:
            self.offset.copy_(low + (high - low) * draw)

    def offset_penalty(self) -> Tensor:
        """The sum of ``|offset|``, a scalar that trains: ``loss = loss + 5e-4 * shift.offset_penalty()``."""
        return self.offset.abs().sum(dtype=torch.promote_types(self.offset.dtype, torch.float32))

    def _trained_offset(self) -> Tensor:
        return _UnitGradient.apply(self.offset) if self.normalize_gradient else self.offset

    def extra_repr(self) -> str:
        sizes = [high if low == -high else (low, high) for low, high in self.init_range]
        text = f"{self.channels}, init_range={sizes[0] if len(set(sizes)) == 1 else tuple(sizes)}"
        text += self._window_repr()
        text += f", init={self.init!r}" if self.init != "uniform" else ""
        return text + (", normalize_gradient=True" if self.normalize_gradient else "")


class _ActiveShift(LearnedShift):
    def forward(self, x: Tensor) -> Tensor:
        return active_shift(x, self._trained_offset(), self.padding_mode, self.crop, self.stride)


class _SparseShift(LearnedShift):
    def forward(self, x: Tensor) -> Tensor:
        return sparse_shift(x, self._trained_offset(), self.padding_mode, self.crop, self.stride)

    def equivalent_kernel(self) -> Tensor:
        """As of any shift, with the rounded offsets: one-hot in every channel, in the dtype of ``offset``."""
        return dense_kernel(self._rounded()).to(self.offset.dtype)

    def harden(self) -> IntegerShift:
        """The same map as a :class:`Shift2d` (1d, 3d): the rounded offsets as integers, for inference, exactly.

        Raises:
            ValueError: an offset that is not finite.
        """
        shift = {1: Shift1d, 2: Shift2d, 3: Shift3d}[self.ndim]
        return shift(self._rounded(), self.padding_mode, self.crop, self.stride).train(self.training)

    def fuse(self) -> IntegerShift:
        """:meth:`harden`, by the name that ``timm.models.reparameterize_model`` looks for."""
        return self.harden()

    def _rounded(self) -> Tensor:
        if not self.offset.isfinite().all():
            raise ValueError(f"{type(self).__name__} has offsets that are NaN or infinite: the training diverged")
        return round_offset(self.offset)


class SparseShift1d(_SparseShift):
    """Shift ``[N, C, L]`` by learned whole pixels; as :class:`SparseShift2d`."""

    ndim = 1


class SparseShift2d(_SparseShift):
    """Shift each channel of ``[N, C, H, W]`` by its own learned number of pixels, rounded to whole ones (half to even).

    ``y[p] = x[p - round(offset)]``. The offsets learn through the gradient of the bilinear interpolation at their
    real values. A penalty on their size, :meth:`offset_penalty`, makes channels stay where they are; at deployment
    :func:`shiftconv.nn.fold_shift` then moves the others only. Made on torch's default device in its default dtype.

    Args:
        channels: ``C``.
        init_range: ``s``, the offsets start between ``-s`` and ``s``; one for all axes, one each, or a pair
            ``(low, high)`` each.
        padding_mode: what the map reads beyond its border, as in :func:`shiftconv.ops.sparse_shift`.
        crop: per spatial axis the pixels to cut from the lower and the upper side, negative ones extend the map.
        stride: keep every ``stride``-th position; one for all axes, or one each.
        init: ``uniform``: each offset is drawn from ``[low, high]``. ``signed``: first a sign, either with probability
            1/2, for each channel and axis, then the size up to ``low`` or ``high``; for a range as large in both
            directions that is the uniform distribution, for another one no direction is preferred. ``grid``: as
            the Sparse Shift paper, the whole numbers from ``low`` to ``high`` in equal, contiguous groups of channels
            (nine for the default range), row by row; left-over channels, the last ones, stay where they are.
        normalize_gradient: scale the gradient of each channel's offset to unit length (zero stays zero), as the Active
            Shift paper does: then only its direction matters, and the rate of :func:`shiftconv.nn.offset_groups` is
            how many pixels an offset moves. It is scaled in each backward pass, a penalty's gradient is added
            unscaled. Where gradients are accumulated or a loss is scaled (float16), use
            :func:`shiftconv.nn.normalize_offset_gradients` before the optimiser's step instead.
        generator: draws the offsets; by default torch's default one.

    Raises:
        TypeError: a size, crop or range that is no number.
        ValueError: a size below 1, a wrong number of sizes, a range that is not finite or falls, a grid between numbers
            that are not whole, an unknown padding mode or init.
    """

    ndim = 2


class SparseShift3d(_SparseShift):
    """Shift ``[N, C, T, H, W]`` by learned whole pixels; as :class:`SparseShift2d`."""

    ndim = 3


class ActiveShift1d(_ActiveShift):
    """Shift ``[N, C, L]`` by learned fractions of pixels; as :class:`ActiveShift2d`."""

    ndim = 1


class ActiveShift2d(_ActiveShift):
    """Shift each channel of ``[N, C, H, W]`` by its own learned number of pixels, fractions by bilinear interpolation.

    ``y[p] = x(p - offset)``; arguments and errors as :class:`SparseShift2d`.
    """

    ndim = 2


class ActiveShift3d(_ActiveShift):
    """Shift ``[N, C, T, H, W]`` by learned fractions of pixels; as :class:`ActiveShift2d`."""

    ndim = 3


class _UnitGradient(torch.autograd.Function):
    """The identity, whose gradient has length 1, or 0, in each row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(offset: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return offset.view_as(offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return unit_rows(grad)


def unit_rows(grad: Tensor) -> Tensor:
    """Each row of ``grad`` ``[C, D]`` at length 1; rows of zeros stay as they are."""
    # Over the largest entry first: the squares of small gradients would underflow.
    largest = grad.abs().amax(1, keepdim=True)
    scaled = grad / torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(length > 0, length, torch.ones_like(length))


def _grid(channels: int, ranges: Sequence[Range]) -> Tensor:
    """Every tap of the grid for ``channels // taps`` channels in turn, ``[C, D]``; the last ones zero."""
    taps = [*itertools.product(*(range(int(low), int(high) + 1) for low, high in ranges))]
    each = channels // len(taps)
    grid = torch.zeros(channels, len(ranges))
    grid[: each * len(taps)] = torch.tensor(taps, dtype=grid.dtype).repeat_interleave(each, dim=0)
    return grid
