"""Depthwise convolution with a large kernel, whole or decomposed into two stripes, and a small one beside it.

    decomposed      (K, s) + (s, K) + (s, s)     SLaK: Liu et al., ICLR 2023, arXiv:2207.03620, sections 3.2 and 3.3
    square          (K, K) + (s, s)              RepLKNet: Ding et al., CVPR 2022, arXiv:2203.06717, section 4.1

In training each branch has its normalisation; with running statistics they fold into one operator with a bias.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math

import torch
from torch import Tensor, nn

from shiftconv.nn.arguments import positive
from shiftconv.nn.cross_kernels import CrossConv2d, CrossKernels, centred, is_fixed, scale_and_shift
from shiftconv.ops.branches import apply_each
from shiftconv.ops.compose import exact_dtype
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

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias in ``dtype`` with the normalisation in them, by its running statistics; differentiable."""
        if self.norm is None:
            return self.weight.to(dtype), None
        scale, shift = (t.to(dtype) for t in scale_and_shift(self.norm))
        return self.weight.to(dtype) * scale.view(-1, 1, 1, 1), shift

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={(*self.weight.shape[2:],)}"


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
        self.merged: CrossConv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged(x)
        branches = self._branches()
        if all(branch.norm is None or is_fixed(branch.norm) for branch in branches.values()):
            return self._folded().apply(x)
        x, weights, _ = prepare("LargeKernelConv2d", x, {name: b.weight for name, b in branches.items()}, None)
        padding = [number for weight in weights for side in centred(weight) for number in side]
        total: Tensor | None = None
        for branch, y in zip(branches.values(), apply_each(x, weights, padding), strict=True):
            y = y if branch.norm is None else branch.norm(y)
            total = y if total is None else total + y
        assert total is not None
        return total

    def equivalent_kernel(self) -> tuple[Tensor, Tensor]:
        """The module in evaluation mode as one dense depthwise convolution: kernel ``[C, 1, *K]`` and bias ``[C]``.

        Both extents of ``K`` are odd, ``2 * r + 1``, and entry ``r`` is the middle:
        ``conv2d(x, kernel, bias, padding=r, groups=C)``. Differentiable.

        Raises:
            ValueError: a normalisation without running statistics.
        """
        folded = self._folded(exact=True) if self.merged is None else self.merged.kernels()
        dtype = self._dtype() if self.merged is None else self.merged.tall.dtype
        dense = folded.dense().to(dtype)
        return dense, dense.new_zeros(len(dense)) if folded.bias is None else folded.bias.to(dtype)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the normalisations, and the small kernel into the large or the tall one; in place, for inference.

        Two stripes stay two: their common ``K x K`` kernel would cost many times as much.
        ``timm.utils.reparameterize_model`` finds this method by its name.

        Raises:
            ValueError: a normalisation without running statistics.
        """
        if self.merged is None:
            kernels = self._folded(exact=True).merged()
            self.merged = CrossConv2d(kernels.to(self._dtype()))
            self.tall = self.wide = self.large = self.small = None

    def _branches(self) -> dict[str, DepthwiseBranch]:
        """Those that there are, the one that can hold the small kernel first."""
        named = {"tall": self.tall, "large": self.large, "wide": self.wide, "small": self.small}
        return {name: branch for name, branch in named.items() if branch is not None}

    def _dtype(self) -> torch.dtype:
        return next(iter(self._branches().values())).weight.dtype

    def _folded(self, exact: bool = False) -> CrossKernels:
        """All kernels, their normalisations folded in, and their common bias.

        Exact ones are float64. The others, made in each call, have the dtype of the weights, to cost little.
        """
        dtype = self._dtype()
        wide = exact_dtype(next(self.parameters())) if exact else torch.promote_types(dtype, torch.float32)
        kernels: dict[str, Tensor] = {}
        bias: Tensor | None = None
        branches = self._branches()
        for name, branch in branches.items():
            kernels[name], shift = branch.folded(wide)
            bias = shift if bias is None else bias if shift is None else bias + shift
        padding = tuple(centred(kernel) for kernel in kernels.values())
        folded = CrossKernels(kernels[next(iter(branches))], kernels.get("wide"), kernels.get("small"), bias, padding)
        return folded if exact else folded.to(dtype)
