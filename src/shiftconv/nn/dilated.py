"""Depthwise convolution with a large kernel and, beside it in training, small kernels whose taps lie apart.

Source: Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet", CVPR 2024, arXiv:2311.15599,
section 3.2 (the Dilated Reparam Block).
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftconv.nn.arguments import positive
from shiftconv.nn.cross_kernels import CrossConv2d, CrossKernels, centred, is_fixed
from shiftconv.nn.large_kernel import DepthwiseBranch
from shiftconv.ops.compose import exact_dtype
from shiftconv.ops.depthwise import depthwise_conv

BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}
"""The published small kernels beside each large one: their side, and how far apart their taps lie."""


class DilatedReparamConv2d(nn.Module):
    """Depthwise convolution ``[N, C, H, W]`` to the same size by a large kernel and several dilated small ones.

    Each kernel is normalised by itself in training. By running statistics, that is in evaluation, all of them are one
    kernel of the large one's size, whether folded for good or not.

    Args:
        dim: channels, ``C``.
        kernel_size: side of the large kernel, one of ``BRANCHES``, which says what stands beside it.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size that is not among the published ones.
    """

    dense: DepthwiseBranch | None

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        dim, size = positive("dim", dim), positive("kernel_size", kernel_size)
        if size not in BRANCHES:
            raise ValueError(f"kernel_size must be one of {sorted(BRANCHES)}, got {size}")
        self.dense = DepthwiseBranch(dim, (size, size), True)
        self.dilations = tuple(dilation for _, dilation in BRANCHES[size])
        small = {f"k{side}_{gap}": DepthwiseBranch(dim, (side, side), True) for side, gap in BRANCHES[size]}
        self.dilated = nn.ModuleDict(small)  # by side and distance of the taps
        self.merged: CrossConv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged(x)
        if all(branch.norm is not None and is_fixed(branch.norm) for branch, _ in self._branches()):
            return self._folded().apply(x)
        total: Tensor | None = None
        for branch, dilation in self._branches():
            assert branch.norm is not None
            padding = dilation * (branch.weight.shape[2] // 2)
            y = branch.norm(depthwise_conv(x, branch.weight, padding=padding, dilation=dilation))
            total = y if total is None else total + y
        assert total is not None
        return total

    def equivalent_kernel(self) -> tuple[Tensor, Tensor]:
        """The module in evaluation mode as one convolution: kernel ``[C, 1, K, K]`` and bias ``[C]``; differentiable.

        Raises:
            ValueError: a normalisation without running statistics.
        """
        folded = self._folded() if self.merged is None else self.merged.kernels()
        assert folded.bias is not None
        return folded.tall, folded.bias

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the normalisations and the small kernels into the large one; in place, for inference.

        ``timm.utils.reparameterize_model`` finds this method by its name.

        Raises:
            ValueError: a normalisation without running statistics.
        """
        if self.merged is None:
            self.merged = CrossConv2d(self._folded())
            self.dense, self.dilated, self.dilations = None, nn.ModuleDict(), ()

    def _branches(self) -> list[tuple[DepthwiseBranch, int]]:
        """Each kernel and the distance of its taps, the large one first."""
        assert self.dense is not None
        small = [branch for branch in self.dilated.values() if isinstance(branch, DepthwiseBranch)]
        return [(self.dense, 1), *zip(small, self.dilations, strict=True)]

    def _folded(self) -> CrossKernels:
        """The sum of all kernels with the normalisations in them, added in float64."""
        assert self.dense is not None
        size, dtype = self.dense.weight.shape[2], self.dense.weight.dtype
        kernel, bias = self.dense.folded(exact_dtype(self.dense.weight))
        for branch, dilation in self._branches()[1:]:
            weight, shift = branch.folded(kernel.dtype)
            assert bias is not None
            assert shift is not None
            bias = bias + shift
            spread = weight.new_zeros(len(weight), 1, *(dilation * (side - 1) + 1 for side in weight.shape[2:]))
            spread[:, :, ::dilation, ::dilation] = weight
            kernel = kernel + F.pad(spread, [(size - spread.shape[2]) // 2] * 4)
        return CrossKernels(kernel, None, None, bias, (centred(kernel),)).to(dtype)
