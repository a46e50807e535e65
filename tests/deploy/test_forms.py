"""Every form against the raw operator, whatever its offsets; and the choice among them."""

import itertools
from typing import get_args

import pytest
import torch

from shiftconv.deploy.forms import ConvForm, GroupForm, InPlaceForm, MixForm, Place, form_of
from shiftconv.ops.sampling import MODES, PaddingMode, geometry

RAW = torch.ops.shiftconv
SHAPES = [(2, 4, 7), (2, 8, 6, 9), (1, 4, 3, 5, 4), (2, 4, 1, 4)]

every_mode = pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def normal(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def windows(x):
    """A plain output, one that is strided, one that is cut and extended, one that lies outside on one side."""
    yield ()
    yield geometry(x, None, 2)
    yield geometry(x, [(-2, 1) if size > 1 else (-2, -1) for size in x.shape[2:]], 3)
    yield geometry(x, [(-12, size + 6) for size in x.shape[2:]], 1)


@every_shape
@every_mode
@pytest.mark.parametrize("reach", [0, 2, 15])
def test_integer_forms_are_exact(shape, padding_mode, reach):
    mode = MODES[padding_mode]
    offset = torch.randint(-reach, reach + 1, (shape[1], len(shape) - 2))
    for dtype in (torch.float64, torch.uint8):
        x = (normal(shape) * 50).to(dtype)
        for window in windows(x):
            expected = RAW.shift(x, offset, mode, False, window)
            forms = [GroupForm(offset, Place(mode, window))]
            if dtype is torch.float64:
                forms.append(ConvForm(offset, Place(mode, window), None, dtype))
            for form in forms:
                assert torch.equal(form(x), expected), (form, window)
        y = x.clone()
        InPlaceForm(GroupForm(offset[:-1], Place(mode)), len(offset) - 1)(y)
        assert torch.equal(y[:, :-1], RAW.shift(x, offset, mode, False)[:, :-1])
        assert torch.equal(y[:, -1:], x[:, -1:])


@every_shape
@every_mode
def test_interpolating_convolution(shape, padding_mode):
    x, offset, mode = normal(shape), normal((shape[1], len(shape) - 2), 1) * 3, MODES[padding_mode]
    for column, window in itertools.product((offset, offset.round(), -offset.abs()), windows(x)):
        floor = (-column).floor()
        d = -column - floor
        form = ConvForm(-floor.long(), Place(mode, window), torch.stack((1 - d, d), 1), x.dtype)
        torch.testing.assert_close(form(x), RAW.active_shift(x, column, mode, False, 0, False, window))


@every_shape
def test_shift_then_mix(shape):
    x, offset = normal(shape), torch.randint(-3, 4, (shape[1], len(shape) - 2))
    weight, bias = normal((3, shape[1]), 1), normal((3,), 2)
    for stride in (1, 2):
        moved = RAW.shift(x, offset, 0, False, geometry(x, None, stride))
        mixed = torch.einsum("oc, nc... -> no...", weight, moved)
        form = MixForm(GroupForm(offset, Place(0, stride=[stride] * offset.shape[1])), relu=True)
        expected = (mixed + bias.view(-1, *[1] * offset.shape[1])).relu() + mixed
        torch.testing.assert_close(form(x, weight, bias, mixed), expected)


def test_the_form_fits_the_offsets():
    """Small kernels that onnxruntime blocks by channels; few groups; else, and for what is not finite, a gather."""
    x, near = normal((1, 8, 9, 9)), torch.tensor([[0, 1], [1, -1]]).repeat(4, 1)
    assert isinstance(form_of(near, Place(0), x), ConvForm)
    assert isinstance(form_of(near[:-1], Place(0), x[:, :-1]), GroupForm)  # 7 channels
    assert isinstance(form_of(near, Place(0), x.to(torch.uint8)), GroupForm)
    assert isinstance(form_of(near * 9, Place(0), x), GroupForm)
    assert isinstance(form_of(near.float() / 2, Place(0), x, rounded=False), ConvForm)
    assert form_of(near * 9 + 0.5, Place(0), x, rounded=False) is None
    assert isinstance(form_of(near * 9 + 0.25, Place(0), x, rounded=True), GroupForm)
    assert isinstance(form_of(near * 9.0, Place(0), x, rounded=False), GroupForm)  # whole numbers do not interpolate
    assert form_of(near + float("nan"), Place(0), x) is None
    assert form_of(torch.arange(400).view(-1, 2), Place(0), x) is None
    assert form_of(near[:0], Place(0), x) is None
