"""The grouped shift against the original kernel's maps (goldens) and against a convolution with a one-hot kernel."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shiftconv.nn import GroupShift1d, GroupShift2d, GroupShift3d

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "grouped.json").read_text())
SHIFTS = {1: GroupShift1d, 2: GroupShift2d, 3: GroupShift3d}
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _taps(channels: int, kernel_size: tuple[int, ...], grouping: str) -> list[tuple[int, ...]]:
    """The tap of each channel, middle 0, by counting on paper: left-over channels have the tap that stays."""
    window = list(itertools.product(*(range(-(k // 2), k - k // 2) for k in kernel_size)))
    each, stay = channels // len(window), (0,) * len(kernel_size)
    moved = window * each if grouping == "interleaved" else [tap for tap in window for _ in range(each)]
    return moved + [stay] * (channels - len(moved))


def _one_hot_conv(x: Tensor, taps: list[tuple[int, ...]], dilation: tuple[int, ...], mode: str) -> Tensor:
    reach = [max(abs(tap[i]) for tap in taps) * d for i, d in enumerate(dilation)]
    kernel = torch.zeros(x.shape[1], 1, *(2 * r + 1 for r in reach), dtype=x.dtype)
    for channel, tap in enumerate(taps):
        kernel[(channel, 0, *(r + d * t for r, d, t in zip(reach, dilation, tap, strict=True)))] = 1
    pad = [r for r in reversed(reach) for _ in range(2)]
    return CONVS[x.ndim - 2](F.pad(x, pad, mode), kernel, groups=x.shape[1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_the_original_kernel(case):
    """The goldens say which input the original read for every output, and which output gradient for every input."""
    shift = GroupShift2d(case["shape"][1], case["kernel_size"], case["dilation"])
    x = _image(*case["shape"]).requires_grad_()
    grad = _image(*case["shape"], seed=1)
    y = shift(x)
    y.backward(grad)
    with np.load(GOLDEN / "grouped.npz") as golden:
        source, grad_source, taps = (golden[f"{case['name']}/{key}"] for key in ("out", "grad_x", "offsets"))
    assert shift.offset.tolist() == (-taps.astype(int)).tolist()
    for got, read, index in ((y, x, source), (x.grad, grad, grad_source)):
        index = torch.from_numpy(index).long()
        expected = read.detach().flatten()[index.clamp(min=0)].masked_fill(index < 0, 0)
        assert got is not None and torch.equal(got, expected)


@pytest.mark.parametrize("grouping", ["interleaved", "contiguous"])
@pytest.mark.parametrize(
    ("channels", "kernel_size", "dilation"),
    [
        (7, (3,), (2,)), (9, (4,), (1,)), (5, (1,), (3,)), (2, (3,), (1,)),
        (20, (3, 3), (1, 1)), (9, (2, 2), (1, 1)), (18, (4, 4), (2, 2)), (16, (3, 5), (2, 1)), (13, (2, 3), (3, 1)),
        (27, (3, 3, 3), (1, 1, 1)), (30, (2, 3, 2), (1, 2, 3)), (26, (3, 3, 3), (1, 1, 1)),
    ],
)  # fmt: skip
def test_equals_a_one_hot_convolution(channels, kernel_size, dilation, grouping):
    ndim = len(kernel_size)
    shift = SHIFTS[ndim](channels, kernel_size, dilation, grouping)
    x = _image(2, channels, *(8, 7, 6)[:ndim]).requires_grad_()
    expected = _one_hot_conv(x, _taps(channels, kernel_size, grouping), dilation, "constant")
    assert torch.equal(shift(x), expected)
    grad = torch.randn_like(expected)
    (got_grad,), (expected_grad,) = (torch.autograd.grad(y, x, grad) for y in (shift(x), expected))
    assert torch.equal(got_grad, expected_grad)


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate", "circular", "reflect"])
def test_equivalent_kernel_is_the_shift(padding_mode):
    shift = GroupShift2d(14, (4, 3), (1, 2), padding_mode=padding_mode)
    kernel = shift.equivalent_kernel()
    assert kernel.shape == (14, 1, 5, 5) and kernel.sum((1, 2, 3)).eq(1).all()
    x = _image(2, 14, 6, 7)
    padded = F.pad(x, (2, 2, 2, 2), "constant" if padding_mode == "zeros" else padding_mode)
    assert torch.equal(shift(x), F.conv2d(padded, kernel.double(), groups=14))


def test_one_number_serves_all_axes():
    shift = GroupShift3d(64, 2, 3)
    assert shift.kernel_size == (2, 2, 2) and shift.dilation == (3, 3, 3)
    assert shift.offset.shape == (64, 3) and shift.offset.dtype == torch.int64
    assert shift.offset[:8].tolist() == [
        [3 - 3 * a, 3 - 3 * b, 3 - 3 * c] for a, b, c in itertools.product((0, 1), repeat=3)
    ]


def test_moves_with_the_model():
    shift = copy.deepcopy(GroupShift2d(11)).to(torch.bfloat16, memory_format=torch.channels_last)
    assert not shift.state_dict() and not list(shift.parameters())
    assert shift.offset.dtype == torch.int64
    x = _image(2, 11, 5, 6).to(torch.bfloat16).to(memory_format=torch.channels_last)
    y = shift(x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.double(), _one_hot_conv(x.double(), _taps(11, (3, 3), "interleaved"), (1, 1), "constant"))


def test_repr_says_what_is_not_usual():
    assert repr(GroupShift2d(9)) == "GroupShift2d(9, kernel_size=(3, 3))"
    text = "GroupShift1d(9, kernel_size=(2,), dilation=(4,), grouping='contiguous', padding_mode='circular')"
    assert repr(GroupShift1d(9, 2, 4, "contiguous", "circular")) == text


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "channels must be a whole number, got 9.0", dict(channels=9.0)),
        (ValueError, "channels must be at least 1, got 0", dict(channels=0)),
        (ValueError, "kernel_size must be at least 1, got 0", dict(channels=9, kernel_size=0)),
        (TypeError, "kernel_size must be a whole number, got '3'", dict(channels=9, kernel_size="3")),
        (
            ValueError,
            r"kernel_size must be one number or 2, .* got \(3, 3, 3\)",
            dict(channels=9, kernel_size=(3, 3, 3)),
        ),
        (TypeError, "dilation must be a whole number, got True", dict(channels=9, dilation=(1, True))),
        (ValueError, "grouping 'interleave'; did you mean 'interleaved'", dict(channels=9, grouping="interleave")),
        (ValueError, "padding_mode 'zero'; did you mean 'zeros'", dict(channels=9, padding_mode="zero")),
    ],
)
def test_bad_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        GroupShift2d(**arguments)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[C, D\] = \[8, 2\] .* got \[9, 2\]"):
        GroupShift2d(9)(torch.zeros(1, 8, 4, 4))
