"""Active and sparse shift against a plain copy, and against what torch offers: gathers and ``grid_sample``.

Offsets are uniform in (-1, 1) pixels, as ``init_range=1`` starts them, zeros beyond the border; shapes as for shift.
The copy is of the input, or of the input and then of the gradient through autograd, while the others also compute the
gradient of their offsets. The gather form is four weighted gathers of the padded map, one per corner; ``grid_sample``
sees every channel as an image of its own, and its grid is made anew, as offsets change in every step. The original
(torchshifts 3.1; NCHW, float32) runs where TORCHSHIFTS_LIBRARY names its compiled C++ extension; its results are wrong
in part, so they are not compared.
"""

import os
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from benchmarks.ops.shift import BASELINE, FORMATS, SHAPES, Copy
from shiftconv import ops
from shiftconv.ops.active_shift import reference, reference_backward
from shiftconv.ops.sampling import MODES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ORIGINAL = os.environ.get("TORCHSHIFTS_LIBRARY", "")
Operator = Callable[[Tensor, Tensor], Tensor]


def gather(x: Tensor, offset: Tensor) -> Tensor:
    """Active shift of ``[N, C, H, W]`` by up to one pixel, as gathers of the padded map."""
    height, width = x.shape[2:]
    start = -offset
    cell = start.detach().floor()
    weight = ((1 - start + cell).to(x.dtype), (start - cell).to(x.dtype))
    flat = F.pad(x, (1, 1, 1, 1)).flatten(2)
    row = torch.arange(1, height + 1, device=x.device) + cell[:, :1].long()  # [C, H]
    column = torch.arange(1, width + 1, device=x.device) + cell[:, 1:].long()
    total = torch.zeros_like(x)
    for i, j in product(range(2), range(2)):
        index = ((row + i)[:, :, None] * (width + 2) + (column + j)[:, None]).flatten(1)
        corner = flat.gather(2, index.expand(len(x), -1, -1)).view_as(x)
        total = total + corner * (weight[i][:, 0] * weight[j][:, 1])[:, None, None]
    return total


def grid_sample(x: Tensor, offset: Tensor) -> Tensor:
    """Active shift of ``[N, C, H, W]`` with every channel as an image; in float32, as bfloat16 grids are too coarse."""
    images, channels, height, width = x.shape
    row = torch.arange(height, device=x.device) - offset[:, :1]  # [C, H]
    column = torch.arange(width, device=x.device) - offset[:, 1:]
    at = (column[:, None] * (2 / (width - 1)) - 1, row[:, :, None] * (2 / (height - 1)) - 1)
    grid = torch.stack(torch.broadcast_tensors(*at), 3)  # [C, H, W, 2]
    grid = grid.expand(images, -1, -1, -1, -1).flatten(0, 1)
    y = F.grid_sample(x.float().reshape(-1, 1, height, width), grid, align_corners=True)
    return y.view(images, channels, height, width).to(x.dtype)


OPERATORS: dict[str, Operator] = {
    "active_shift": ops.active_shift,
    "sparse_shift": ops.sparse_shift,
    "gather": gather,
    "grid_sample": grid_sample,
}


def cases(device: str) -> Iterator[Case]:
    """All shapes, memory formats, dtypes and directions on ``device``; on the CPU also the cost of a call as such."""
    for shape_name, format_name, dtype_name in product(SHAPES, FORMATS, DTYPES):
        x = torch.randn(SHAPES[shape_name], device=device).to(DTYPES[dtype_name])
        x = x.contiguous(memory_format=FORMATS[format_name])
        yield from directions(f"{shape_name} {format_name} {dtype_name}", x)
    if device == "cpu":
        yield from overhead()


def original(active: bool) -> Operator:
    """The original's operator on zeros padding, without cut borders."""
    torch.ops.load_library(ORIGINAL)
    run, whole = torch.ops.torchshifts.shift2d.default, torch.empty(0)
    return lambda x, offset: run(x, offset, whole, 0, active)


def directions(name: str, x: Tensor) -> Iterator[Case]:
    offset = torch.rand(x.shape[1], 2, device=x.device) * 2 - 1
    grad = torch.randn_like(x)
    operators = dict(OPERATORS)
    if ORIGINAL and x.dtype is torch.float32 and x.is_contiguous() and x.device.type == "cpu":
        operators |= {"original active": original(True), "original sparse": original(False)}

    def check() -> None:
        for label, operator in OPERATORS.items():
            compare(label, operator, x, offset, grad)

    forward: dict[str, Callable[[], object]] = {BASELINE: x.clone}
    for label, operator in operators.items():
        forward[label] = lambda f=operator: f(x, offset)
    yield Case(name, "forward", BASELINE, forward, check)

    leaf, moved = x.clone().requires_grad_(), offset.clone().requires_grad_()
    both: dict[str, Callable[[], object]] = {BASELINE: lambda: torch.autograd.grad(Copy.apply(leaf), leaf, grad)}
    for label, operator in operators.items():
        both[label] = lambda f=operator: torch.autograd.grad(f(leaf, moved), (leaf, moved), grad)
    yield Case(name, "forward+backward", BASELINE, both, check)


def compare(label: str, operator: Operator, x: Tensor, offset: Tensor, grad: Tensor) -> None:
    """Output and gradients against the reference; what only torch computes in bfloat16 need not be exact."""
    mode, rounded = MODES["zeros"], label == "sparse_shift"
    g, wide, o = grad.double(), x.double(), offset.double()
    truth = [reference(wide, o, mode, rounded, 0, False), *reference_backward(g, wide, o, mode, rounded)]
    leaf, moved = x.clone().requires_grad_(), offset.clone().requires_grad_()
    y = operator(leaf, moved)
    came = [y, *torch.autograd.grad(y, (leaf, moved), grad)]
    half = x.dtype is torch.bfloat16
    if half and label == "gather":
        came.pop()  # sums of thousands of bfloat16 numbers
    for got, expected, tolerance in zip(came, truth, (2e-2, 5e-2, 0.2) if half else (1e-4, 1e-4, 1e-2), strict=False):
        scale = float(expected.abs().mean()) + 1
        torch.testing.assert_close(
            got.detach().double(), expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{label}: {m}"
        )


def overhead() -> Iterator[Case]:
    """What a call costs beyond its work: a tensor of 64 numbers, without and with a gradient recorded."""
    for direction, needs_grad in (("forward", False), ("forward, recorded", True)):
        x = torch.randn(1, 4, 4, 4)
        offset = (torch.rand(4, 2) * 2 - 1).requires_grad_(needs_grad)
        candidates: dict[str, Callable[[], object]] = {BASELINE: x.clone}
        for label in ("active_shift", "sparse_shift"):
            candidates[label] = lambda f=OPERATORS[label], x=x, o=offset: f(x, o)
        yield Case("call overhead", direction, BASELINE, candidates, lambda: None)
