"""The kernels of a cross-shaped convolution as one value: merged, made dense, or kept as a module of their own."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shiftconv.ops.compose import Padding, exact_dtype
from shiftconv.ops.cross_conv import cross_conv
from shiftconv.ops.depthwise import depthwise_conv


class CrossKernels(NamedTuple):
    """Depthwise kernels ``[C, 1, kh, kw]`` that are added, their bias ``[C]``, and the padding of each kernel.

    ``cross_conv(x, tall, wide, small, bias, padding)`` is what they compute; ``padding`` holds ``((top, bottom), (left,
    right))`` in pixels of each kernel that is not None. A whole kernel is a tall one without a wide one.
    """

    tall: Tensor
    wide: Tensor | None
    small: Tensor | None
    bias: Tensor | None
    padding: tuple[Padding, ...]

    def apply(self, x: Tensor) -> Tensor:
        """The convolution of ``x`` ``[N, C, H, W]``."""
        first, *rest = self.kernels()
        if not rest:
            return depthwise_conv(x, first, self.bias, self.padding[0])
        return cross_conv(x, first, rest[0], rest[1] if len(rest) > 1 else None, self.bias, self.padding)

    def kernels(self) -> list[Tensor]:
        """Tall and, where there are such, wide and small."""
        return [kernel for kernel in self[:3] if kernel is not None]

    def to(self, dtype: torch.dtype) -> "CrossKernels":
        wide, small, bias = (None if t is None else t.to(dtype) for t in self[1:4])
        return CrossKernels(self.tall.to(dtype), wide, small, bias, self.padding)

    def merged(self) -> "CrossKernels":
        """The same with the small kernel added to the tall one, if it lies inside of it."""
        if self.small is None:
            return self
        room = [
            outer - inner
            for pads in zip(reversed(self.padding[0]), reversed(self.padding[-1]), strict=True)
            for outer, inner in zip(*pads, strict=True)
        ]
        if min(room) < 0:
            return self
        tall = self.tall + nn.functional.pad(self.small, room)
        return self._replace(tall=tall, small=None, padding=self.padding[:-1])

    def trimmed(self) -> "CrossKernels":
        """The same without kernels, and rows and columns at either end of one, that are zero in all channels."""
        each = [_trim(*pair) for pair in zip(self.kernels(), self.padding, strict=True)]
        each = [pair for pair in each if pair[0].count_nonzero()] or each[:1]
        (tall, *rest), padding = zip(*each, strict=True)
        wide, small = (*rest, None, None)[:2]
        return CrossKernels(tall, wide, small, self.bias, padding)

    def among(self, active: Tensor, channels: int) -> "CrossKernels":
        """The same for ``channels`` of which they convolve the ``active`` ones, the others pass unchanged."""

        def spread(kernel: Tensor, others: Tensor) -> Tensor:
            return others.expand(channels, *kernel.shape[1:]).index_copy(0, active, kernel)

        (top, bottom), (left, right) = self.padding[0]
        identity = nn.functional.pad(self.tall.new_ones(1, 1, 1, 1), (left, right, top, bottom))
        zero = self.tall.new_zeros(())
        wide, small, bias = (None if t is None else spread(t, zero) for t in self[1:4])
        return CrossKernels(spread(self.tall, identity), wide, small, bias, self.padding)

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


def _trim(kernel: Tensor, padding: Padding) -> tuple[Tensor, Padding]:
    """A kernel without zeros at its ends, as far as less padding makes up for them; one tap stays."""
    sides: list[tuple[int, int]] = []
    for axis, (before, after) in zip((2, 3), padding, strict=True):
        taps = kernel.shape[axis]
        live = kernel.transpose(0, axis).flatten(1).count_nonzero(1).nonzero().flatten().tolist()
        first = min(live[0] if live else taps - 1, before)
        last = max(live[-1] if live else first, taps - 1 - after)
        kernel = kernel.narrow(axis, first, last + 1 - first)
        sides.append((before - first, after - (taps - 1 - last)))
    return kernel, (sides[0], sides[1])


class CrossConv2d(nn.Module):
    """:class:`CrossKernels` as parameters: what a large-kernel convolution is once it is trained."""

    def __init__(self, kernels: CrossKernels):
        super().__init__()
        self.tall = nn.Parameter(kernels.tall.detach().clone())
        rest = (None if t is None else nn.Parameter(t.detach().clone()) for t in kernels[1:4])
        self.wide, self.small, self.bias = rest
        self.padding = kernels.padding

    def kernels(self) -> CrossKernels:
        return CrossKernels(self.tall, self.wide, self.small, self.bias, self.padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels().apply(x)

    @torch.no_grad()
    def compact(self) -> dict[str, int]:
        """Drop kernels that are zero in all channels, and zeros at the ends of the others; in place, exact.

        Returns:
            How many ``branches`` went, and how many ``taps`` in all, counted in each channel.
        """
        before, left = self.kernels(), self.kernels().trimmed()
        dropped = len(before.padding) - len(left.padding)
        taps = sum(kernel.numel() for kernel in before.kernels()) - sum(kernel.numel() for kernel in left.kernels())
        if taps:
            self.tall = nn.Parameter(left.tall.clone())
            self.wide, self.small = (None if t is None else nn.Parameter(t.clone()) for t in left[1:3])
            self.padding = left.padding
        return {"branches": dropped, "taps": taps}

    @torch.no_grad()
    def absorb(self, scale: Tensor, shift: Tensor) -> None:
        """Compute ``scale * y + shift`` instead of ``y`` from now on, both ``[C]``; in place."""
        each = scale.view(-1, 1, 1, 1)
        for kernel in (self.tall, self.wide, self.small):
            if kernel is not None:
                kernel.copy_(kernel * each)
        bias = shift if self.bias is None else self.bias * scale + shift
        self.bias = nn.Parameter(bias.to(self.tall.dtype))

    def extra_repr(self) -> str:
        sizes = [f"{kernel.shape[2]}x{kernel.shape[3]}" for kernel in self.kernels().kernels()]
        return f"{self.tall.shape[0]}, {' + '.join(sizes)}, padding={self.padding}, bias={self.bias is not None}"


def is_fixed(norm: nn.Module) -> bool:
    """Whether a normalisation only scales and shifts channels now."""
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


def centred(kernel: Tensor) -> Padding:
    """The padding that keeps the size of a map, the larger half of an even kernel's in front."""
    (top, bottom), (left, right) = ((taps // 2, taps - 1 - taps // 2) for taps in kernel.shape[2:])
    return (top, bottom), (left, right)


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
