"""The kernels of a cross-shaped convolution as one value: merged, made dense, or kept as a module of their own."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shiftconv.ops.compose import Padding, exact_dtype
from shiftconv.ops.cross_conv import cross_conv


class CrossKernels(NamedTuple):
    """Depthwise kernels ``[C, 1, kh, kw]`` that are added, their bias ``[C]``, and the padding of each kernel.

    ``cross_conv(x, tall, wide, small, bias, padding)`` is what they compute; ``padding`` holds ``((top, bottom), (left,
    right))`` in pixels of each kernel that is not None.
    """

    tall: Tensor
    wide: Tensor
    small: Tensor | None
    bias: Tensor | None
    padding: tuple[Padding, ...]

    def apply(self, x: Tensor) -> Tensor:
        """The convolution of ``x`` ``[N, C, H, W]``."""
        return cross_conv(x, self.tall, self.wide, self.small, self.bias, self.padding)

    def kernels(self) -> list[Tensor]:
        """Tall, wide and, where there is one, small."""
        return [self.tall, self.wide] if self.small is None else [self.tall, self.wide, self.small]

    def to(self, dtype: torch.dtype) -> "CrossKernels":
        tall, wide, small, bias = (None if t is None else t.to(dtype) for t in self[:4])
        assert tall is not None and wide is not None
        return CrossKernels(tall, wide, small, bias, self.padding)

    def merged(self) -> "CrossKernels":
        """The same with the small kernel added to the tall one, if it lies inside of it."""
        if self.small is None:
            return self
        (top, bottom), columns = self.padding[0]
        (small_top, small_bottom), small_columns = self.padding[2]
        if columns != small_columns or small_top > top or small_bottom > bottom:
            return self
        rows = (top - small_top, bottom - small_bottom)
        tall = self.tall + nn.functional.pad(self.small, (0, 0, *rows))
        return self._replace(tall=tall, small=None, padding=self.padding[:2])

    def among(self, active: Tensor, channels: int) -> "CrossKernels":
        """The same for ``channels`` of which they convolve the ``active`` ones, the others pass unchanged."""

        def spread(kernel: Tensor, others: Tensor) -> Tensor:
            return others.expand(channels, *kernel.shape[1:]).index_copy(0, active, kernel)

        (top, bottom), (left, right) = self.padding[0]
        identity = nn.functional.pad(self.tall.new_ones(1, 1, 1, 1), (left, right, top, bottom))
        zero = self.tall.new_zeros(())
        tall, wide = spread(self.tall, identity), spread(self.wide, zero)
        small = None if self.small is None else spread(self.small, zero)
        bias = None if self.bias is None else spread(self.bias, zero)
        return CrossKernels(tall, wide, small, bias, self.padding)

    def dense(self) -> Tensor:
        """Their sum as one kernel ``[C, 1, 2 * r + 1, 2 * s + 1]`` whose middle entry is the pixel itself."""
        reach = [max(max(pads[axis]) for pads in self.padding) for axis in (0, 1)]
        total = None
        for kernel, pads in zip(self.kernels(), self.padding, strict=True):
            (top, bottom), (left, right) = ((r - low, r - high) for r, (low, high) in zip(reach, pads, strict=True))
            kernel = nn.functional.pad(kernel, (left, right, top, bottom))
            total = kernel if total is None else total + kernel
        assert total is not None
        return total


class CrossConv2d(nn.Module):
    """:class:`CrossKernels` as parameters: what a large-kernel convolution is once it is trained."""

    def __init__(self, kernels: CrossKernels):
        super().__init__()
        self.tall = nn.Parameter(kernels.tall.detach().clone())
        self.wide = nn.Parameter(kernels.wide.detach().clone())
        self.small = None if kernels.small is None else nn.Parameter(kernels.small.detach().clone())
        self.bias = None if kernels.bias is None else nn.Parameter(kernels.bias.detach().clone())
        self.padding = kernels.padding

    def kernels(self) -> CrossKernels:
        return CrossKernels(self.tall, self.wide, self.small, self.bias, self.padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels().apply(x)

    def extra_repr(self) -> str:
        sizes = [f"{kernel.shape[2]}x{kernel.shape[3]}" for kernel in self.kernels().kernels()]
        return f"{self.tall.shape[0]}, {' + '.join(sizes)}, padding={self.padding}, bias={self.bias is not None}"


def is_fixed(norm: nn.Module) -> bool:
    """Whether a normalisation only scales and shifts channels now."""
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a normalisation by running statistics multiplies each channel by, and then adds; both ``[C]``, exact.

    Raises:
        ValueError: a normalisation without running statistics.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"a normalisation without running statistics cannot be folded: {norm}")
    exact = exact_dtype(norm.running_var)
    scale = (norm.running_var.to(exact) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
