"""Which code carries out a depthwise convolution, and the codes that are not kernels of ours: torch's, and FFT.

========  ==========================================================================================
path      what it is
========  ==========================================================================================
direct    our kernels: C++ on the CPU, Triton on CUDA
torch     torch's convolution in the memory format that is faster for the shape; also the reference
fft       ``torch.fft``, for dense kernels on large maps, where it needs fewer operations
========  ==========================================================================================

``SHIFTCONV_BACKEND=reference`` always takes torch, ``native`` and ``triton`` always the direct kernels.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftconv.ops import backend
from shiftconv.ops.sampling import format_of

Pads = Sequence[int]  # top, bottom, left, right of every branch

Size = tuple[int, int]  # height and width of a kernel

_CLIFF = 14  # oneDNN leaves its depthwise kernels for kernels this wide in NCHW
_WORTH_IT = 700  # pixels of all images; below, oneDNN's start costs more than its kernels for few taps gain
_PAIRS_PER_POINT = 900  # our float32 kernel meets so many in the time that transforms take for a point of the period
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # here, as the compiler cannot trace the question
_SPECTRUM = 1 << 21  # numbers in a spectrum: a few megabytes


class Path(NamedTuple):
    """What carries a call out, ``direct``, ``torch`` or ``fft``, and the reason in one sentence."""

    name: str
    reason: str


class Call(NamedTuple):
    """What the choice of a path depends on; ``gradient`` tells that the gradient to the kernels is wanted."""

    device: str
    dtype: torch.dtype
    images: int
    height: int
    width: int
    channels_last: bool
    kernels: Sequence[Size]
    gradient: bool = False


def choose(call: Call) -> Path:
    """The path of a call, from what was measured; see the page about kernels."""
    forced = backend.forced()
    if forced:
        return Path("torch" if forced == "reference" else "direct", f"{backend.VARIABLE}={forced}")
    if call.device == "cpu":
        return _choose_on_cpu(call)
    if call.device == "cuda":
        return _choose_on_cuda(call)
    return Path("torch", f"there is no kernel for {call.device}")


def _choose_on_cpu(call: Call) -> Path:
    if _spectra_win(call):
        return Path("fft", "a dense kernel on a large map needs fewer operations as a product of spectra")
    if len(call.kernels) == 1 and call.dtype in (torch.float32, torch.bfloat16):
        (kh, kw), side = call.kernels[0], min(call.height, call.width)
        if call.images * call.height * call.width >= _WORTH_IT and kh * kw <= _few_taps(call, kw, side):
            return Path("torch", "oneDNN is faster at few taps here")
        if not (_AVX512 or call.channels_last or call.gradient) and kh >= 9 and kw <= 9 and 7 < side <= 28:
            return Path("torch", "oneDNN is faster at tall kernels on a processor without AVX-512")
    return Path("direct", "our kernel is the faster one")


def _few_taps(call: Call, width: int, side: int) -> int:
    """Up to so many taps oneDNN was faster; it is in channels_last only, but for gradients without AVX-512."""
    if call.gradient:
        if width > 3 or (_AVX512 and not call.channels_last):
            return 0
        return 33 if side >= 56 and call.channels_last else 9
    if not call.channels_last:
        return 0
    if not _AVX512:
        return 9 if side < 28 else 27 if side < 112 else 33
    if side < 56:
        return 9 if call.dtype is torch.float32 else 25
    return 25 if side < 112 else 49


def _spectra_win(call: Call) -> bool:
    """Whether a transform of all pixels takes less time than the taps; the rates are those of one thread."""
    sides = call.height, call.width
    if max(min(size) for size in call.kernels) < 31 or min(sides) < 64:
        return False
    pairs = sum(_pairs(sides[0], kh) * _pairs(sides[1], kw) for kh, kw in call.kernels)
    periods = (_smooth(side + max(size[axis] for size in call.kernels)) for axis, side in enumerate(sides))
    rate = _PAIRS_PER_POINT * (2 if call.dtype.itemsize == 2 else 1)
    return pairs > (rate if _AVX512 else rate // 2) * math.prod(periods)


def _pairs(size: int, taps: int) -> int:
    """How many pairs of an output and an input that it reads there are along one axis, with centred padding."""
    return sum(max(size - abs(tap - taps // 2), 0) for tap in range(taps))


def _choose_on_cuda(call: Call) -> Path:
    """What no GPU has confirmed yet: by the operations of either side."""
    longest = max(max(size) for size in call.kernels)
    few = 7 if call.channels_last and call.dtype.itemsize == 2 else 5
    if longest <= few and len(call.kernels) == 1 and not call.gradient:
        return Path("torch", "cuDNN has kernels of its own for few taps")
    return Path("direct", "cuDNN and torch run kernels of this size on general-purpose units")


def _call(x: Tensor, kernels: Sequence[Size], gradient: bool = False) -> Call:
    last = format_of(x) is torch.channels_last
    return Call(x.device.type, x.dtype, x.shape[0], x.shape[2], x.shape[3], last, kernels, gradient)


def explain(device: str) -> list[tuple[str, Path]]:
    """The path of typical float32 calls on a device, each described in a few words."""
    rows: list[tuple[str, Path]] = []
    for kernels, side, last, gradient in (
        ([(51, 51)], 56, False, False),
        ([(51, 5), (5, 51), (5, 5)], 56, False, False),
        ([(7, 7)], 56, True, False),
        ([(5, 5)], 56, True, False),
        ([(3, 3)], 56, False, True),
        ([(3, 3)], 56, True, True),
        ([(63, 63)], 224, False, False),
    ):
        what = "gradient of " if gradient else ""
        sizes = " + ".join(f"{kh}x{kw}" for kh, kw in kernels)
        call = Call(device, torch.float32, 8, side, side, last, kernels, gradient)
        rows.append((f"{what}{sizes} at {side} px, {'channels_last' if last else 'NCHW'}", choose(call)))
    return rows


def run_sum(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, padding: Pads, transpose: bool
) -> Tensor:
    """``shiftconv::depthwise_sum`` on the path that suits the call."""
    path = choose(_call(x[0], _sizes(weight))).name
    if path == "fft":
        return sum_by_fft(x, weight, bias, padding, transpose)
    return (direct_sum if path == "direct" else sum_by_torch)(x, weight, bias, padding, transpose)


def run_each(x: Tensor, weight: Sequence[Tensor], padding: Pads, transpose: bool) -> list[Tensor]:
    """``shiftconv::depthwise_each`` on the path that suits the call."""
    path = choose(_call(x, _sizes(weight))).name
    if path == "fft":
        pads = _split(padding)
        return [sum_by_fft([x], [w], None, p, transpose) for w, p in zip(weight, pads, strict=True)]
    return (direct_each if path == "direct" else each_by_torch)(x, weight, padding, transpose)


def run_weight(x: Sequence[Tensor], grad: Sequence[Tensor], padding: Pads) -> list[Tensor]:
    """``shiftconv::depthwise_weight`` on the path that suits the call."""
    sizes = [kernel_size(x[b % len(x)], grad[b % len(grad)], p) for b, p in enumerate(_split(padding))]
    path = choose(_call(x[0], sizes, gradient=True)).name
    if path == "fft":
        return weight_by_fft(x, grad, padding)
    return (direct_weight if path == "direct" else weight_by_torch)(x, grad, padding)


def direct_sum(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, padding: Pads, transpose: bool
) -> Tensor:
    """Runs where no kernel is registered (yet): pick one for the device, then go through it."""
    run = backend.kernel("depthwise", x[0].device.type, sum_by_torch, "depthwise_sum_direct")
    return run(x, weight, bias, padding, transpose)


def direct_each(x: Tensor, weight: Sequence[Tensor], padding: Pads, transpose: bool) -> list[Tensor]:
    """The same for the branches one by one."""
    run = backend.kernel("depthwise", x.device.type, each_by_torch, "depthwise_each_direct")
    return run(x, weight, padding, transpose)


def direct_weight(x: Sequence[Tensor], grad: Sequence[Tensor], padding: Pads) -> list[Tensor]:
    """The same for the gradient, whose kernels are files of their own."""
    run = backend.kernel("depthwise_weight", x[0].device.type, weight_by_torch, "depthwise_weight_direct")
    return run(x, grad, padding)


def sum_by_torch(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, padding: Pads, transpose: bool
) -> Tensor:
    """``depthwise_sum`` by torch's convolution."""
    first, only = x[0], len(weight) == 1
    wide = first.dtype if only else _summable(first.dtype)
    total: Tensor | None = None
    for b, (kernel, pads) in enumerate(zip(weight, _split(padding), strict=True)):
        offset = bias.to(wide) if bias is not None and b == 0 else None
        y = convolve(x[b % len(x)].to(wide), kernel.to(wide), offset, pads, transpose)
        total = y if total is None else total + y
    assert total is not None
    return total.to(first.dtype).contiguous(memory_format=format_of(first))


def each_by_torch(x: Tensor, weight: Sequence[Tensor], padding: Pads, transpose: bool) -> list[Tensor]:
    """``depthwise_each`` by torch's convolution."""
    pads = _split(padding)
    format_ = format_of(x)
    return [
        convolve(x, w, None, p, transpose).contiguous(memory_format=format_) for w, p in zip(weight, pads, strict=True)
    ]


def weight_by_torch(x: Sequence[Tensor], grad: Sequence[Tensor], padding: Pads) -> list[Tensor]:
    """``depthwise_weight`` by torch's convolution of the maps with the gradients, the images as its channels."""
    results: list[Tensor] = []
    for b, pads in enumerate(_split(padding)):
        source, to = x[b % len(x)], grad[b % len(grad)]
        wide = _summable(source.dtype)
        images, channels = source.shape[:2]
        kh, kw = kernel_size(source, to, pads)
        if source.numel() == 0 or to.numel() == 0:
            results.append(source.new_zeros((channels, 1, kh, kw)))
            continue
        top, bottom, left, right = pads
        if (top, left) == (bottom, right) and min(top, left) >= 0 and channels > 1 and images > 0:
            # Not for one channel: torch 2.15 writes beyond its memory there.
            rest = (None, [1, 1], [top, left], [1, 1], False, [0, 0], channels, [False, True, False])
            kernel = source.new_empty((channels, 1, kh, kw))
            results.append(torch.ops.aten.convolution_backward(to, source, kernel, *rest)[1])
            continue
        padded = F.pad(source.to(wide), (left, right, top, bottom))
        rows = padded.transpose(0, 1).reshape(1, channels * images, *padded.shape[2:])
        filters = to.to(wide).transpose(0, 1).contiguous()
        results.append(F.conv2d(rows, filters, groups=channels).view(channels, 1, kh, kw).to(source.dtype))
    return results


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, pads: Pads, transpose: bool) -> Tensor:
    """One branch by torch: taps that reach nothing cut away, in the memory format that is faster for the shape."""
    top, bottom, left, right = pads
    kh, kw = kernel.shape[2:]
    if transpose:
        kernel = kernel.flip(2, 3)
        top, bottom, left, right = kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right
    if not any(isinstance(size, torch.SymInt) for size in x.shape):  # which would be tied to where it cuts
        rows, (top, bottom) = _reachable(x.shape[2], kh, top, bottom)
        columns, (left, right) = _reachable(x.shape[3], kw, left, right)
        if (rows.stop - rows.start, columns.stop - columns.start) != (kh, kw):
            kernel = kernel[:, :, rows, columns]
        height = x.shape[2] + top + bottom - kernel.shape[2] + 1
        width = x.shape[3] + left + right - kernel.shape[3] + 1
        if 0 in kernel.shape or 0 in x.shape or height < 1 or width < 1:
            y = x.new_zeros((*x.shape[:2], max(height, 0), max(width, 0)))
            return y if bias is None else y + bias.view(-1, 1, 1)
    common = max(min(top, bottom), 0), max(min(left, right), 0)
    extra = (left - common[1], right - common[1], top - common[0], bottom - common[0])
    if any(extra):
        x = F.pad(x, extra)
    if x.device.type == "cpu" and kernel.shape[3] >= _CLIFF:
        x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, kernel, bias, padding=common, groups=x.shape[1])


def _reachable(size: int, taps: int, before: int, after: int) -> tuple[slice, tuple[int, int]]:
    """The taps of a kernel along one axis that some output can reach, and the padding that is left with them."""
    outputs = size + before + after - taps + 1
    first = min(max(before - outputs + 1, 0), taps)
    last = max(first, min(taps, before + size))
    return slice(first, last), (before - first, after - (taps - last))


def sum_by_fft(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, padding: Pads, transpose: bool
) -> Tensor:
    """``depthwise_sum`` by products of spectra, a few channels at a time so that these stay small."""
    first = x[0]
    wide = _summable(first.dtype)
    pads = [*_split(padding)]
    (top, bottom, left, right), (kh, kw) = pads[0], weight[0].shape[2:]
    sign = 1 if transpose else -1
    height = first.shape[2] + sign * (kh - 1 - top - bottom)
    width = first.shape[3] + sign * (kw - 1 - left - right)
    y = torch.empty(
        (*first.shape[:2], height, width), dtype=first.dtype, device=first.device, memory_format=format_of(first)
    )
    # A period that holds every output and every pixel apart, so that nothing wraps around.
    period = (
        _smooth(max(height, first.shape[2]) + max(w.shape[2] for w in weight)),
        _smooth(max(width, first.shape[3]) + max(w.shape[3] for w in weight)),
    )
    step = max(1, _SPECTRUM // (max(first.shape[0], 1) * period[0] * period[1]))
    for c in range(0, first.shape[1], step):
        part = slice(c, c + step)
        spectra: list[Tensor] = [torch.fft.rfft2(t[:, part].to(wide), s=period) for t in x]
        total: Tensor | None = None
        for b, kernel in enumerate(weight):
            response = torch.fft.rfft2(_placed(kernel[part, 0].to(wide), pads[b], period))
            product = spectra[b % len(spectra)] * (response if transpose else response.conj())
            total = product if total is None else total + product
        assert total is not None
        map_ = torch.fft.irfft2(total, s=period)[:, :, :height, :width]
        y[:, part] = map_ if bias is None else map_ + bias[part].to(wide).view(-1, 1, 1)
    return y


def weight_by_fft(x: Sequence[Tensor], grad: Sequence[Tensor], padding: Pads) -> list[Tensor]:
    """``depthwise_weight`` by products of spectra, summed over the images before they are transformed back."""
    results: list[Tensor] = []
    for b, pads in enumerate(_split(padding)):
        source, to = x[b % len(x)], grad[b % len(grad)]
        kh, kw = kernel_size(source, to, pads)
        wide = _summable(source.dtype)
        period = (_smooth(to.shape[2] + kh), _smooth(to.shape[3] + kw))
        period = (max(period[0], _smooth(source.shape[2])), max(period[1], _smooth(source.shape[3])))
        kernel = source.new_empty((source.shape[1], 1, kh, kw))
        step = max(1, _SPECTRUM // (max(source.shape[0], 1) * period[0] * period[1]))
        for c in range(0, source.shape[1], step):
            part = slice(c, c + step)
            first, second = (torch.fft.rfft2(t[:, part].to(wide), s=period) for t in (source, to))
            lags = torch.fft.irfft2((first * second.conj()).sum(0), s=period)
            kernel[part, 0] = lags.roll((pads[0], pads[2]), (1, 2))[:, :kh, :kw].to(source.dtype)
        results.append(kernel)
    return results


def _placed(kernel: Tensor, pads: Pads, period: Sequence[int]) -> Tensor:
    """Kernels ``[C, kh, kw]`` on a torus with the tap that meets the output's own pixel in its origin."""
    grown = F.pad(kernel, (0, period[1] - kernel.shape[2], 0, period[0] - kernel.shape[1]))
    return grown.roll((-pads[0], -pads[2]), (1, 2))


def _smooth(size: int) -> int:
    """The least number from ``size`` on that has no prime factor above 5."""
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1


def kernel_size(x: Tensor, grad: Tensor, pads: Pads) -> tuple[int, int]:
    """Height and width of the kernel that takes ``x`` to a map like ``grad``."""
    top, bottom, left, right = pads
    return x.shape[2] + top + bottom - grad.shape[2] + 1, x.shape[3] + left + right - grad.shape[3] + 1


def _split(padding: Pads) -> list[Pads]:
    return [padding[i : i + 4] for i in range(0, len(padding), 4)]


def _sizes(weight: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(w.shape[2], w.shape[3]) for w in weight]


def _summable(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
