"""Active and sparse shift against a plain copy, against their common torch forms, and against the original extension.

Offsets are uniform in (-1, 1), as a network starts. The torch forms are one gather per corner of the cell, and one
``grid_sample`` over the channels as a batch. Backward, the copy goes through autograd like every candidate, and the
others also compute the gradient of the offset. The original (torchshifts 3.1; NCHW, float32) runs where the variable
TORCHSHIFTS_LIBRARY names its compiled C++ extension; its results are wrong in part, so only their shape is checked.
"""

import itertools
import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from benchmarks.ops.shift import FORMATS, SHAPES, Copy
from shiftconv.ops import active_shift, sparse_shift
from shiftconv.ops.active_shift import reference

BASELINE = "copy"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ORIGINAL = os.environ.get("TORCHSHIFTS_LIBRARY", "")


def by_gather(x: Tensor, offset: Tensor) -> Tensor:
    """Bilinear interpolation, one gather for each of the four corners."""
    n, c, height, width = x.shape
    cell = (-offset).floor()
    d = (-offset - cell).to(x.dtype)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    flat, y = x.flatten(2), torch.zeros_like(x)
    for a, b in itertools.product((0, 1), repeat=2):
        h = rows + (cell[:, :1].long() + a)
        w = columns + (cell[:, 1:].long() + b)
        inside = ((h >= 0) & (h < height))[:, :, None] & ((w >= 0) & (w < width))[:, None]
        index = h.clamp(0, height - 1)[:, :, None] * width + w.clamp(0, width - 1)[:, None]
        corner = flat.gather(2, index.flatten(1).expand(n, c, -1)).view_as(x)
        weight = (d[:, 0] if a else 1 - d[:, 0]) * (d[:, 1] if b else 1 - d[:, 1])
        y = y + corner * (inside * weight[:, None, None])
    return y


def by_grid_sample(x: Tensor, offset: Tensor) -> Tensor:
    """The channels as a batch of images with one grid each."""
    c, height, width = x.shape[1:]
    h = torch.arange(height, device=x.device, dtype=offset.dtype) - offset[:, :1]
    w = torch.arange(width, device=x.device, dtype=offset.dtype) - offset[:, 1:]
    h, w = (2 * h + 1) / height - 1, (2 * w + 1) / width - 1
    grid = torch.stack((w[:, None].expand(c, height, width), h[:, :, None].expand(c, height, width)), 3).to(x.dtype)
    y = F.grid_sample(x.transpose(0, 1), grid, "bilinear", "zeros", align_corners=False)
    return y.transpose(0, 1)


def original(active: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The original's operator on zeros padding, without cut borders."""
    torch.ops.load_library(ORIGINAL)
    run, whole = torch.ops.torchshifts.shift2d.default, torch.empty(0)
    return lambda x, offset: run(x, offset, whole, 0, active)


def cases(device: str) -> Iterator[Case]:
    """All shapes, memory formats, dtypes and directions on ``device``."""
    for (name, shape), (dtype_name, dtype), (format_name, memory_format) in itertools.product(
        SHAPES.items(), DTYPES.items(), FORMATS.items()
    ):
        x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
        yield from directions(f"{name} {format_name} {dtype_name}", x)


def directions(name: str, x: Tensor) -> Iterator[Case]:
    offset = torch.rand(x.shape[1], 2, device=x.device) * 2 - 1
    kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        BASELINE: lambda x, offset: Copy.apply(x),
        "active_shift": active_shift,
        "sparse_shift": sparse_shift,
        "gather": by_gather,
    }
    if x.dtype is torch.float32:  # its 16-bit grid is too coarse to be right
        kinds["grid_sample"] = by_grid_sample
        if ORIGINAL and x.is_contiguous() and x.device.type == "cpu":
            kinds |= {"original active": original(True), "original sparse": original(False)}

    def check() -> None:
        truths = {
            "active_shift": reference(x, offset, 0, False, 0, False),
            "sparse_shift": reference(x, offset, 0, True, 0, False),
        }
        for label in ("gather", "grid_sample"):
            truths[label] = truths["active_shift"]
        close = 1e-4 if x.dtype is torch.float32 else 4e-2
        for label, function in list(kinds.items())[1:]:
            y = function(x, offset)
            assert y.shape == x.shape
            if label in truths:
                torch.testing.assert_close(y, truths[label], rtol=close, atol=close, msg=lambda m, n=label: f"{n}: {m}")

    forward: dict[str, Callable[[], object]] = {n: lambda f=f: f(x, offset) for n, f in kinds.items()}
    yield Case(name, "forward", BASELINE, forward, check)

    leaf, learned, grad = x.clone().requires_grad_(), offset.clone().requires_grad_(), torch.randn_like(x)
    both: dict[str, Callable[[], object]] = {}
    for label, function in kinds.items():
        wanted = [leaf] if label == BASELINE else [leaf, learned]
        both[label] = lambda f=function, w=wanted: torch.autograd.grad(f(leaf, learned), w, grad)
    yield Case(name, "forward+backward", BASELINE, both, check)
