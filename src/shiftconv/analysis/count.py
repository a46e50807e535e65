"""What a network costs: its parameters, and its multiply-accumulates for one image, layer by layer.

PyTorch's own FLOP counter sees every convolution and matrix product that one forward pass runs, whichever module or
function asks for it. The pass runs on tensors without data, so that it computes nothing and needs no memory.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from shiftconv.analysis.zeros import ZeroProducts, nonzero

_LOG = logging.getLogger(FakeTensorMode.__module__)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_NUMBERS = ("parameters", "not 0", "MACs", "effective")


@dataclass(frozen=True)
class LayerCount:
    """What one module costs by itself, without the modules inside it."""

    name: str
    """Path of the module, as in ``named_modules()``; empty for the network itself."""
    kind: str
    """Name of its class."""
    output: tuple[int, ...]
    """Shape of its output, ``[1, C, H, W]`` for a convolution; empty if it gives anything but one tensor."""
    parameters: int
    nonzero_parameters: int
    macs: int
    effective_macs: int


@dataclass(frozen=True)
class Count:
    """The cost of a network for one image, dense and with the zeros in its weights left out."""

    model: str
    """Name of its class, or what timm calls it."""
    size: tuple[int, int, int]
    """``(C, H, W)`` of the image."""
    parameters: int
    """Numbers in its parameters, frozen ones included; running statistics are none."""
    nonzero_parameters: int
    """``parameters`` less the zeros in those of two or more dimensions. Biases, norms and layer scales, which are not
    pruned but may pass through 0, count whole, as in the counts that SLaK's authors publish."""
    macs: int
    """Multiply-accumulates of its convolutions and matrix products. Biases, norms, activations, pooling, sums and
    shifts count 0."""
    effective_macs: int
    """``macs`` less those by a zero of the weight: of the tensor that the convolution or product is given, if it is
    made of parameters (and buffers) alone, by whatever steps. So a composed kernel counts where any of its small
    kernels is not 0, and a folded one where its taps are not 0 after the fold. Products with buffers, of two maps, by
    weights without data (``meta``) or by weights that were written in place are dense ones."""
    activations: int
    """Numbers in the outputs of all layers that have MACs and give one tensor."""
    layers: tuple[LayerCount, ...]
    """The modules that have parameters or MACs, in the order in which they ran; those that did not run come last."""

    def __str__(self) -> str:
        image = "x".join(str(n) for n in self.size)
        told = compress(zip(_NUMBERS, _numbers(self), strict=True), self._told())
        return f"{self.model}: {', '.join(f'{n:,} {name} ({_short(n)})' for name, n in told)} for one {image} image"

    def table(self) -> str:
        """One line of text for each of ``layers``, and their sums."""
        told = self._told()
        lines = [["layer", "kind", "output", *compress(_NUMBERS, told)]]
        lines += [[r.name, r.kind, "x".join(map(str, r.output)), *_figures(r, told)] for r in self.layers]
        lines += [["total", "", "", *_figures(self, told)]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [[t.ljust(w) for t, w in zip(line[:3], widths[:3], strict=True)] for line in lines]
        numbers = [[t.rjust(w) for t, w in zip(line[3:], widths[3:], strict=True)] for line in lines]
        return "\n".join("  ".join([*a, *b]) for a, b in zip(text, numbers, strict=True))

    def _told(self) -> tuple[bool, bool, bool, bool]:
        """Which of the numbers are worth telling; weights drawn from a continuous distribution have a few zeros too."""
        some = 1 - 1e-5
        return True, self.nonzero_parameters < some * self.parameters, True, self.effective_macs < some * self.macs


def count(model: nn.Module, size: int | Sequence[int] | None = None) -> Count:
    """Parameters and MACs of ``model`` for one image, as it runs in evaluation; dense, and less the zeros of weights.

    The model may be any module that takes one tensor ``[1, C, H, W]``, on any device. It is as it was afterwards:
    weights, running statistics and modes. Hooks that it has do run, on tensors without data.

    Args:
        model: the network. A parallel wrapper around it is looked through; a compiled network runs uncompiled.
        size: side of a square image, ``(H, W)`` or ``(C, H, W)``. None: the sides in timm's ``default_cfg``, or 224 for
            a network that has none. Channels: timm's ``in_chans``, else those of the first convolution, else 3.

    Raises:
        TypeError: ``model`` is no module, or ``size`` is not of whole numbers.
        ValueError: ``size`` is not of one of the three forms, ``model`` does not run on such an image, or a layer of it
            has not got its shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"count takes a module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # where torch.compile keeps the network
    if isinstance(model, _WRAPPERS):
        model = model.module
    lazy = [name for name, value in model.named_parameters() if is_lazy(value)]
    if lazy:
        raise ValueError(f"count needs the shape of every parameter; {lazy[0]} gets its own at the first forward pass")
    shape = _image_shape(model, size)
    trace = _Trace()
    learned = dict(model.named_parameters())
    # Detached, as the counter takes what needs a gradient for recorded.
    values = {name: value.detach() for name, value in (*learned.items(), *model.named_buffers())}
    with _evaluating(model), trace, _without_data() as fake:
        tensors: dict[str, Tensor] = {name: fake.from_tensor(value) for name, value in values.items()}
        for name, value in values.items():
            trace.zeros.follow(tensors[name], value, name in learned)
        first = next((v for v in tensors.values() if v.is_floating_point()), torch.empty(0))
        image = torch.zeros(1, *shape, dtype=first.dtype, device=first.device)
        try:
            torch.func.functional_call(model, tensors, (image,))
        except Exception as error:
            raise ValueError(f"{type(model).__name__} does not run on an image {[*image.shape]}: {error}") from error
    parameters = sum(value.numel() for value in model.parameters())
    zeros = {id(value): value.numel() - nonzero(value) for value in model.parameters()}
    layers = tuple(_rows(model, trace, zeros))
    cfg = getattr(model, "default_cfg", None) or {}
    return Count(
        model=cfg.get("architecture") or type(model).__name__,
        size=shape,
        parameters=parameters,
        nonzero_parameters=parameters - sum(zeros.values()),
        macs=trace.total(),
        effective_macs=trace.total() - sum(trace.by_zeros.values()),
        activations=sum(trace.activations.values()),
        layers=layers,
    )


class _Trace:
    """Listens to all modules of one forward pass: the MACs of each by itself, and the shape that it gives."""

    def __init__(self):
        self.macs: dict[nn.Module, int] = {}
        self.by_zeros: dict[nn.Module | None, int] = {}
        self.output: dict[nn.Module, tuple[int, ...]] = {}
        self.activations: dict[nn.Module, int] = {}
        self.zeros = ZeroProducts(self._note)
        self._counter = FlopCounterMode(display=False)
        self._running: list[nn.Module] = []  # innermost last, here and in the next list
        self._open: list[list[int]] = []  # total at the entry, MACs of finished children

    def total(self) -> int:
        return self._counter.get_total_flops() // 2

    def __enter__(self) -> None:
        self.zeros.__enter__()  # below the counter, which takes composite operators apart
        self._counter.__enter__()
        self._handles = (register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave))

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._counter.__exit__(*exception)
        self.zeros.__exit__(*exception)

    def _note(self, macs_by_zeros: int) -> None:
        module = self._running[-1] if self._running else None  # none in the hooks of the network itself
        self.by_zeros[module] = self.by_zeros.get(module, 0) + macs_by_zeros

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        self._open.append([self.total(), 0])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        start, inside = self._open.pop()
        whole = self.total() - start
        if self._open:
            self._open[-1][1] += whole
        own = whole - inside
        self.macs[module] = self.macs.get(module, 0) + own  # a shared module runs more than once
        if isinstance(output, Tensor):
            self.output[module] = tuple(output.shape)
            if own:
                self.activations[module] = self.activations.get(module, 0) + output.numel()


def _rows(model: nn.Module, trace: _Trace, zeros: dict[int, int]) -> Iterator[LayerCount]:
    names = {module: name for name, module in model.named_modules()}
    seen: set[int] = set()
    for module in [*trace.macs, *(module for module in names if module not in trace.macs)]:
        own = {id(value): value for value in module.parameters(recurse=False)}
        new = [value for key, value in own.items() if key not in seen]  # tied weights count once
        seen.update(own)
        parameters, macs = sum(value.numel() for value in new), trace.macs.get(module, 0)
        if parameters or macs:
            yield LayerCount(
                name=names.get(module, ""),
                kind=type(module).__name__,
                output=trace.output.get(module, ()),
                parameters=parameters,
                nonzero_parameters=parameters - sum(zeros.get(id(value), 0) for value in new),
                macs=macs,
                effective_macs=macs - trace.by_zeros.get(module, 0),
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, set past ``train()``, which a network may have made to do more than set a flag."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _without_data() -> Iterator[FakeTensorMode]:
    """Tensors that have shapes only. Fused attention and recurrence, opaque to the counter, are off meanwhile."""
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    quiet, _LOG.disabled = _LOG.disabled, True  # it repeats every error that it raises
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            sdpa_kernel(SDPBackend.MATH),
            FakeTensorMode(allow_non_fake_inputs=True) as fake,
        ):
            yield fake
    finally:
        _LOG.disabled = quiet
        torch.backends.mha.set_fastpath_enabled(fast)
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


def _image_shape(model: nn.Module, size: int | Sequence[int] | None) -> tuple[int, int, int]:
    default = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
    if size is None:
        size = tuple(default[1:])
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise TypeError(f"size must be of whole numbers, got {size!r}")
    if len(sides) not in (2, 3) or min(sides) < 1:
        raise ValueError(f"size must be a side, (H, W) or (C, H, W) of at least 1, got {size!r}")
    channels, height, width = sides if len(sides) == 3 else (_channels(model), *sides)
    return channels, height, width


def _channels(model: nn.Module) -> int:
    if isinstance(declared := getattr(model, "in_chans", None), int):
        return declared
    first = next((m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    return first.in_channels if first else 3


def _numbers(row: Count | LayerCount) -> tuple[int, int, int, int]:
    return row.parameters, row.nonzero_parameters, row.macs, row.effective_macs


def _figures(row: Count | LayerCount, told: Sequence[bool]) -> list[str]:
    return [f"{number:,}" for number in compress(_numbers(row), told)]


def _short(number: int) -> str:
    """Three digits and a unit: 16.4 M.

    >>> _short(16433792)
    '16.4 M'
    """
    value, units = float(number), ["", " k", " M", " G", " T"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g}{units[0]}"
