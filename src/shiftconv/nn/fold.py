"""Shifts that pay for the channels they move, and for no others.

The channels between two convolutions have no natural order. Where the ones that move lie together, an integer shift in
place touches those alone; the reordering is folded into the weights of the neighbours, where it costs nothing. So
the time falls with the sparsity that the penalty of the Sparse Shift paper (arXiv:1903.05285) reaches.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from shiftconv.nn.arguments import padding, positive
from shiftconv.nn.base import IntegerShift, dense_kernel
from shiftconv.nn.convs import Conv, check_conv
from shiftconv.nn.learned_shift import SparseShift1d, SparseShift2d, SparseShift3d
from shiftconv.ops import PaddingMode, shift, shift_

_SPARSE = (SparseShift1d, SparseShift2d, SparseShift3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ALIKE = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh,
)  # fmt: skip


class _PartialShift(nn.Module):
    """The partial shift of any rank."""

    ndim: ClassVar[int]
    offset: Tensor

    def __init__(
        self,
        channels: int,
        offset: Tensor | Sequence[Sequence[int]],
        padding_mode: PaddingMode = "zeros",
        inplace: bool = False,
    ):
        super().__init__()
        self.channels = positive("channels", channels)
        given = torch.as_tensor(offset)
        if given.numel() == 0:
            given = torch.zeros(0, self.ndim, dtype=torch.int64)
        if given.ndim != 2 or given.shape[1] != self.ndim or given.shape[0] > channels:
            raise ValueError(f"offset must be [M, {self.ndim}], M at most {channels}, got {[*given.shape]}")
        if given.is_floating_point() or given.is_complex() or given.dtype is torch.bool:
            raise TypeError(f"{type(self).__name__} takes integer offsets, got {given.dtype}")
        self.padding_mode: PaddingMode = padding(padding_mode)
        self.inplace = inplace
        self.register_buffer("offset", given.detach().to(torch.int64, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self.ndim + 2 or x.shape[1] != self.channels:
            expected = f"[N, {self.channels}, *S] with {self.ndim} spatial axes"
            raise ValueError(f"{type(self).__name__} takes x {expected}, got {[*x.shape]}")
        moved = self.offset.shape[0]
        if moved == 0:
            return x
        recorded = x.requires_grad and torch.is_grad_enabled()
        if self.inplace and not recorded and not torch.compiler.is_exporting():
            return shift_(x, self.offset, self.padding_mode)
        y = shift(x[:, :moved], self.offset, self.padding_mode)
        return y if moved == self.channels else torch.cat((y, x[:, moved:]), 1)

    def equivalent_kernel(self) -> Tensor:
        """As of any shift: a dense depthwise kernel ``[C, 1, *K]``, whose entry in the middle is 1 where none moves."""
        stay = self.offset.new_zeros(self.channels - self.offset.shape[0], self.ndim)
        return dense_kernel(torch.cat((self.offset, stay)))

    def extra_repr(self) -> str:
        text = f"{self.channels}, moved={self.offset.shape[0]}"
        text += f", padding_mode={self.padding_mode!r}" if self.padding_mode != "zeros" else ""
        return text + (", inplace=True" if self.inplace else "")


class PartialShift1d(_PartialShift):
    """Shift the first channels of ``[N, C, L]``, leave the others; as :class:`PartialShift2d`."""

    ndim = 1


class PartialShift2d(_PartialShift):
    """Shift the first ``M`` channels of ``[N, C, H, W]`` by whole pixels and leave the others where they are.

    Args:
        channels: ``C``.
        offset: integers ``[M, 2]``, how far the content of the first ``M`` channels moves down and right.
        padding_mode: what the vacated border reads, as in :func:`shiftconv.ops.shift`.
        inplace: write into ``x`` and return it, wherever no gradient is recorded; then the channels that stay cost
            nothing at all. As with ``nn.ReLU(inplace=True)``, nothing else may need ``x``.

    Raises:
        TypeError: offsets that are no integers.
        ValueError: offsets of another shape, an unknown padding mode; in a call, an ``x`` of another shape.
    """

    ndim = 2


class PartialShift3d(_PartialShift):
    """Shift the first channels of ``[N, C, T, H, W]``, leave the others; as :class:`PartialShift2d`."""

    ndim = 3


_PARTIAL = {1: PartialShift1d, 2: PartialShift2d, 3: PartialShift3d}


@torch.no_grad()
def fold_shift(before: nn.Module, between: Sequence[nn.Module], shift: nn.Module, after: nn.Module) -> _PartialShift:
    """Reorder the channels between two convolutions so that those that a shift moves come first.

        before -> between -> shift -> after   becomes   before' -> between' -> fold_shift(...) -> after'

    The weights of ``before``, ``between`` and ``after`` change in place; their chain computes the same as before, but
    for the order of the sums in ``after``. Only for chains in which nothing else reads the maps in between.

    Args:
        before: the convolution whose outputs are reordered.
        between: norms, whose channels are reordered, and activations, which treat all channels alike, in any order.
        shift: a shift by whole pixels (:class:`SparseShift2d` by its rounded offsets) without crop and stride.
        after: the convolution whose inputs are reordered, with any stride.

    Returns:
        The shift of the reordered channels, in place, to be put where ``shift`` was.

    Raises:
        TypeError: a convolution that is no plain one, or a shift by fractions of pixels.
        ValueError: a grouped convolution, numbers of channels that do not fit, a shift with crop or stride, or a module
            in between that is not known to treat channels alike.
    """
    convs = (check_conv(before)[0], check_conv(after)[0])
    hard = shift.harden() if isinstance(shift, _SPARSE) else shift
    if not isinstance(hard, IntegerShift):
        raise TypeError(f"only a shift by whole pixels can move channels in place, got {type(shift).__name__}")
    reason = _refusal(convs, between, hard)
    if reason:
        raise ValueError(f"cannot fold {type(shift).__name__}: {reason}")
    offset = hard.offset.tolist()
    # Channels with one offset side by side: a kernel meets them as one block.
    order = sorted(range(hard.channels), key=lambda channel: (not any(offset[channel]), offset[channel]))
    index = torch.tensor(order, device=hard.offset.device)
    _reorder(convs[0].weight, index)
    _reorder(convs[0].bias, index)
    for module in between:
        if isinstance(module, _NORMS):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                _reorder(values, index)
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            _reorder(module.weight, index)
    _reorder(convs[1].weight, index, axis=1)
    moved = sum(map(any, offset))
    partial = _PARTIAL[hard.ndim](hard.channels, hard.offset[index[:moved]], hard.padding_mode, inplace=True)
    return partial.to(hard.offset.device).train(shift.training)


def fold_shifts(model: nn.Module) -> int:
    """Apply :func:`fold_shift` to every chain of convolution, norms, shift and convolution in an ``nn.Sequential``.

    In place. Nested ``nn.Sequential`` are looked through. What cannot be folded stays, as do shifts whose neighbours'
    weights are used in several places. Blocks that call their layers in a ``forward`` of their own need
    :func:`fold_shift` itself.

    Returns:
        How many shifts were folded.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    inner = {id(child) for m in model.modules() if type(m) is nn.Sequential for child in m.children()}
    folded = 0
    for root in [m for m in model.modules() if type(m) is nn.Sequential and id(m) not in inner]:
        for chain in _chains([*_leaves(root)]):
            modules = [getattr(parent, name) for parent, name in chain]
            if any(uses[id(p)] > 1 for module in modules for p in module.parameters()):
                continue
            before, *between, shift, after = modules
            try:
                partial = fold_shift(before, between, shift, after)
            except (TypeError, ValueError):
                continue
            setattr(*chain[-2], partial)
            folded += 1
    return folded


def _refusal(convs: tuple[Conv, Conv], between: Sequence[nn.Module], hard: IntegerShift) -> str | None:
    """Why this chain cannot be reordered, if so."""
    widths = (convs[0].out_channels, hard.channels, convs[1].in_channels)
    if len(set(widths)) > 1:
        return f"its {hard.channels} channels lie between {widths[0]} outputs and {widths[2]} inputs"
    if hard.crop is not None or hard.stride != 1:
        return "a crop or stride cannot be computed in place"
    for conv in convs:
        if conv.groups != 1:
            return f"a convolution with {conv.groups} groups beside it needs its channels in their order"
        if len(conv.kernel_size) != hard.ndim:
            return f"{type(conv).__name__} beside it has another number of axes"
    for module in between:
        if isinstance(module, _NORMS):
            if module.num_features != hard.channels:
                return f"{type(module).__name__} between has {module.num_features} channels, not {hard.channels}"
        elif not isinstance(module, (*_ALIKE, nn.PReLU)):
            return f"{type(module).__name__} between is not known to treat all channels alike"
    for module in (*convs, *between):
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if "weight" not in own and getattr(module, "weight", None) is not None:
            return f"the weight of {type(module).__name__} is computed from others; remove the parametrisation first"
    return None


def _reorder(values: Tensor | None, index: Tensor, axis: int = 0) -> None:
    if values is not None:
        values.copy_(values.index_select(axis, index.to(values.device)))


def _leaves(sequential: nn.Sequential) -> Iterator[tuple[nn.Sequential, str]]:
    """Where each module of nested ``nn.Sequential`` hangs, in the order in which they run."""
    for name, child in sequential._modules.items():  # named_children leaves out what comes a second time
        if type(child) is nn.Sequential:
            yield from _leaves(child)
        else:
            yield sequential, name


def _chains(places: Sequence[tuple[nn.Sequential, str]]) -> Iterator[Sequence[tuple[nn.Sequential, str]]]:
    """The stretches of ``places`` that begin and end with a convolution and have a shift before the last."""
    modules = [getattr(parent, name) for parent, name in places]
    start = None
    for i, module in enumerate(modules[:-1]):
        if isinstance(module, Conv):
            start = i
        elif isinstance(module, (IntegerShift, *_SPARSE)):
            if start is not None and isinstance(modules[i + 1], Conv):
                yield places[start : i + 2]
            start = None
        elif not isinstance(module, (*_NORMS, *_ALIKE, nn.PReLU)):
            start = None
