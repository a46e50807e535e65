"""Depthwise convolution with a large kernel, whole or decomposed into two stripes, and a small one beside it.

    decomposed      (K, s) + (s, K) + (s, s)     SLaK: Liu et al., ICLR 2023, arXiv:2207.03620, sections 3.2 and 3.3
    square          (K, K) + (s, s)              RepLKNet: Ding et al., CVPR 2022, arXiv:2203.06717, section 4.1

In training each branch has its normalisation; with running statistics they fold into one operator with a bias.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftconv.nn.arguments import positive
from shiftconv.ops.branches import apply_each, apply_sum
from shiftconv.ops.depthwise import prepare


class DepthwiseBranch(nn.Module):
    """A depthwise kernel and the normalisation of its map; parameters only, the module that holds it runs it.

    Args:
        dim: channels, ``C``.
        kernel_size: height and width of ``weight`` ``[C, 1, kh, kw]``.
        norm: whether there is a normalisation, ``norm``.
    """

    def __init__(self, dim: int, kernel_size: tuple[int, int], norm: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, *kernel_size))
        self.norm = nn.BatchNorm2d(dim) if norm else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def padding(self) -> list[int]:
        """Top, bottom, left and right, which keep the size of the map."""
        return [pad for taps in self.weight.shape[2:] for pad in (taps // 2, taps - 1 - taps // 2)]

    def is_linear(self) -> bool:
        """Whether the normalisation is a fixed scale and shift: by running statistics, or none."""
        return self.norm is None or is_fixed(self.norm)

    def equivalent_kernel(self) -> tuple[Tensor, Tensor | None]:
        """Kernel ``[C, 1, kh, kw]`` and bias ``[C]`` with the normalisation folded in; differentiable."""
        return fold(self.weight, self.norm)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={(*self.weight.shape[2:],)}"


def is_fixed(norm: nn.Module) -> bool:
    """Whether a normalisation is a fixed scale and shift now, so that it folds into the kernel before it."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and not norm.training and norm.running_var is not None  # pyright: ignore[reportPrivateUsage]


def fold(kernel: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """The kernel and bias that compute ``norm(kernel * x)`` by running statistics, in the dtype of ``kernel``.

    Raises:
        ValueError: a normalisation that is no batch normalisation with running statistics.
    """
    if norm is None:
        return kernel, None
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or norm.running_var is None:  # pyright: ignore[reportPrivateUsage]
        raise ValueError(f"only a batch normalisation with running statistics can be folded, got {norm}")
    wide = torch.promote_types(kernel.dtype, torch.float32)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.to(wide)
    bias = -norm.running_mean.to(wide) * scale
    if norm.affine:
        bias = bias + norm.bias.to(wide)
    return (kernel.to(wide) * scale.view(-1, 1, 1, 1)).to(kernel.dtype), bias.to(kernel.dtype)


def superpose(kernels: Sequence[Tensor], padding: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """One dense kernel that computes the sum of several.

    Args:
        kernels: each ``[C, 1, kh, kw]``.
        padding: of each: top, bottom, left, right.

    Returns:
        The kernel ``[C, 1, KH, KW]`` that just holds them all, and its padding.
    """
    before = [max(pads[side] for pads in padding) for side in (0, 2)]
    sizes = [
        max(ahead - pads[2 * axis] + kernel.shape[2 + axis] for kernel, pads in zip(kernels, padding, strict=True))
        for axis, ahead in enumerate(before)
    ]
    total: Tensor | None = None
    for kernel, pads in zip(kernels, padding, strict=True):
        top, left = before[0] - pads[0], before[1] - pads[2]
        room = (left, sizes[1] - left - kernel.shape[3], top, sizes[0] - top - kernel.shape[2])
        grown = F.pad(kernel, room)
        total = grown if total is None else total + grown
    assert total is not None
    # The outputs are as many as before, whichever kernel they are counted by.
    grow = [sum(padding[0][2 * axis : 2 * axis + 2]) + 1 - kernels[0].shape[2 + axis] for axis in (0, 1)]
    ends = [grow[axis] - 1 + sizes[axis] - before[axis] for axis in (0, 1)]
    return total, [before[0], ends[0], before[1], ends[1]]


class LargeKernelConv2d(nn.Module):
    """Depthwise convolution ``[N, C, H, W]`` to the same size by a large kernel and a small one beside it.

    The branches are ``tall``, ``wide`` and ``small`` where the kernel is decomposed, else ``large`` and ``small``. By
    running statistics, that is in evaluation, all of them run as one operator, whether folded for good or not.

    Args:
        dim: channels, ``C``.
        kernel_size: ``K``, the long side. Even sizes have their larger half of taps above and to the left.
        small_kernel_size: ``s``, the short side of the stripes and the side of the small kernel; there is no small
            kernel if ``s >= K``, or if it is None, which a decomposed kernel cannot be.
        decomposed: two stripes ``K x s`` and ``s x K`` instead of one ``K x K`` kernel.
        branch_norm: whether each branch has a batch normalisation.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, or a decomposed kernel without a short side.
    """

    tall: DepthwiseBranch | None
    wide: DepthwiseBranch | None
    large: DepthwiseBranch | None
    small: DepthwiseBranch | None
    bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        small_kernel_size: int | None = 5,
        decomposed: bool = True,
        branch_norm: bool = True,
    ):
        super().__init__()
        dim, size = positive("dim", dim), positive("kernel_size", kernel_size)
        if small_kernel_size is None and decomposed:
            raise ValueError("a decomposed kernel needs small_kernel_size, the short side of its stripes; got None")
        short = size if small_kernel_size is None else positive("small_kernel_size", small_kernel_size)
        self.tall = DepthwiseBranch(dim, (size, short), branch_norm) if decomposed else None
        self.wide = DepthwiseBranch(dim, (short, size), branch_norm) if decomposed else None
        self.large = None if decomposed else DepthwiseBranch(dim, (size, size), branch_norm)
        self.small = DepthwiseBranch(dim, (short, short), branch_norm) if short < size else None
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        branches = self._branches()
        padding = [pad for branch in branches.values() for pad in branch.padding()]
        if all(branch.is_linear() for branch in branches.values()):
            kernels, bias = self._folded()
            x, weights, bias = prepare("LargeKernelConv2d", x, kernels, bias)
            return apply_sum([x], weights, bias, padding)
        x, weights, _ = prepare("LargeKernelConv2d", x, {name: b.weight for name, b in branches.items()}, None)
        maps = apply_each(x, weights, padding)
        total: Tensor | None = None
        for branch, y in zip(branches.values(), maps, strict=True):
            y = y if branch.norm is None else branch.norm(y)
            total = y if total is None else total + y
        assert total is not None
        return total

    def equivalent_kernel(self) -> tuple[Tensor, Tensor | None]:
        """What the module computes in evaluation, as one dense depthwise kernel.

        Returns:
            Kernel ``[C, 1, K, K]`` whose tap ``K // 2`` lies on the output's pixel, and bias ``[C]`` or None:
            ``depthwise_conv(x, kernel, bias, padding=((K // 2, K - 1 - K // 2),) * 2)``.

        Raises:
            ValueError: a normalisation without running statistics.
        """
        kernels, bias = self._folded()
        kernel, _ = superpose([*kernels.values()], [branch.padding() for branch in self._branches().values()])
        return kernel, bias

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the normalisations, and the small kernel into the large or the tall one; in place, for inference.

        Two stripes stay two: their common ``K x K`` kernel would cost many times as much.
        ``timm.utils.reparameterize_model`` finds this method by its name.

        Raises:
            ValueError: a normalisation without running statistics.
        """
        kernels, bias = self._folded()
        host = self.tall or self.large
        if self.small is not None and host is not None:
            pads = [host.padding(), self.small.padding()]
            name = next(iter(kernels))  # that of the host
            kernels[name], _ = superpose([kernels[name], kernels["small"]], pads)
            self.small = None
        for name, branch in self._branches().items():
            branch.weight, branch.norm = nn.Parameter(kernels[name]), None
        if bias is not None:
            self.bias = nn.Parameter(bias)

    def _branches(self) -> dict[str, DepthwiseBranch]:
        """Those that there are, the one that can hold the small kernel first."""
        named = {"tall": self.tall, "large": self.large, "wide": self.wide, "small": self.small}
        return {name: branch for name, branch in named.items() if branch is not None}

    def _folded(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """All kernels, their normalisations folded in, and their common bias."""
        kernels: dict[str, Tensor] = {}
        bias: Tensor | None = self.bias
        for name, branch in self._branches().items():
            kernels[name], shift = branch.equivalent_kernel()
            bias = shift if bias is None else bias if shift is None else bias + shift
        return kernels, bias
