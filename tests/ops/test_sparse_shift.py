"""Sparse shift against NumPy: whole pixels forward, halves to even; the offset's gradient is the active shift's."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftconv import ops
from shiftconv.ops.active_shift import reference, round_offset

from . import oracle
from .cases import (
    LAYOUTS,
    MODES,
    array,
    cases,
    check_gradients,
    every_mode,
    laid_out,
    normal,
    often,
    originals,
    poison,
    recover_offset,
)

WINDOWED = {"crop": ((-1, 0), (1, -2)), "stride": 2}
every_window = pytest.mark.parametrize("window", [{}, WINDOWED], ids=["plain", "windowed"])


@settings(often, max_examples=300)
@given(cases())
def test_forward(case):
    """Nothing is interpolated, so every number is one of x or zero, bit for bit."""
    poison(case.grad.shape, case.x.dtype)
    y = ops.sparse_shift(case.x, case.offset, *case.arguments)
    expected = oracle.forward(array(case.x), array(case.offset), *case.arguments, rounded=True)
    assert y.dtype == case.x.dtype
    assert np.array_equal(array(y), expected)


@settings(often, max_examples=300)
@given(cases(), st.booleans())
def test_gradients(case, of_higher_order):
    x, offset = case.x.detach().requires_grad_(), case.offset.detach().requires_grad_()
    y = ops.sparse_shift(x, offset, *case.arguments)
    poison(x.shape, x.dtype)
    create_graph = of_higher_order and x.dtype.itemsize > 2
    gradients = torch.autograd.grad(y, (x, offset), case.grad, create_graph=create_graph)
    check_gradients(case, *gradients, rounded=True)


def test_equals_the_originals():
    """The kernels of the Sparse Shift paper, and ActiveSparseShifts; the gradients in their exact statement."""
    names = []
    for name, (x, offset, grad, out, grad_x, grad_offset), arguments in originals("sparse"):
        names.append(name)
        x.requires_grad_()
        offset.requires_grad_()
        y = ops.sparse_shift(x, offset, *arguments)
        gradients = torch.autograd.grad(y, (x, offset), grad)
        tolerance = 1e-6 if "ssl" in name else 1e-12  # those ran in float32
        for actual, expected in zip((y, *gradients), (out, grad_x, grad_offset), strict=True):
            message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=message)
    assert len(names) > 40
    assert sum("ssl" in name for name in names) == 3


def test_halves_round_to_even():
    halves = [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 0.5 + 2**-23, 0.5 - 2**-24, 2.0**22 + 0.5, 2.0**30]
    expected = [-4, -2, -2, 0, 0, 2, 2, 4, 1, 0, 2**22, 2**30]
    x = torch.arange(10.0).view(1, 1, 10)
    for kind in (torch.float32, torch.float64):
        offset = torch.tensor(halves, dtype=kind)[:, None]
        rounded = round_offset(offset)
        assert rounded.dtype == torch.int64
        assert rounded.flatten().tolist() == expected
        for each, whole in zip(offset, rounded, strict=True):
            y = x.roll(int(whole), -1)
            assert torch.equal(ops.sparse_shift(x, each[None], "circular"), y)
            for run in (torch.ops.shiftconv.active_shift, reference):  # there, kernels of other devices round
                assert torch.equal(run(x, each[None], MODES["circular"], True, 0, False), y)
    assert round_offset(torch.tensor([[2.0**31 - 1]], dtype=torch.float64)).item() == 2**31 - 1
    assert round_offset(torch.zeros(0, 2)).shape == (0, 2)


@every_mode
@every_window
def test_equals_the_integer_shift(padding_mode, window):
    """In x the two are one linear map, whose transpose the gradient is."""
    x, offset = normal((2, 7, 5, 6)).requires_grad_(), normal((7, 2), 1) * 3
    y = ops.sparse_shift(x, offset, padding_mode, **window)
    z = ops.shift(x, offset.round().long(), padding_mode, **window)
    assert torch.equal(y, z)
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(z, x, grad)[0])


@every_mode
@every_window
def test_derivatives_of_any_order(padding_mode, window):
    """By x everything can be differentiated, the gradient of the offset too; that one is the active shift's."""
    x, offset, grad = normal((1, 2, 3, 4)), normal((2, 2), 1) * 2, None
    x.requires_grad_()
    offset.requires_grad_()

    def sparse(x):
        return ops.sparse_shift(x, offset, padding_mode, **window)

    def slope(x, shift=ops.sparse_shift):
        nonlocal grad
        y = shift(x, offset, padding_mode, **window)
        grad = normal(y.shape, 2) if grad is None else grad
        return torch.autograd.grad(y, offset, grad, create_graph=True)[0]

    assert torch.autograd.gradcheck(sparse, x)
    assert torch.autograd.gradgradcheck(lambda x: sparse(x).square(), x)
    assert torch.autograd.gradcheck(slope, x)
    torch.testing.assert_close(slope(x), slope(x, ops.active_shift))


@every_mode
def test_trained_by_sgd_it_finds_the_offset(padding_mode):
    offset, error = recover_offset(ops.sparse_shift, padding_mode)
    assert error == 0
    assert offset.round().tolist() == [[2, -1]] * 2


@every_mode
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_moves_what_cannot_be_interpolated(padding_mode, dtype):
    x, offset = (normal((2, 7, 5, 6)) * 50).to(dtype), normal((7, 2), 1) * 3
    for window in ({}, WINDOWED):
        y = ops.sparse_shift(x, offset, padding_mode, **window)
        assert y.dtype == dtype
        assert torch.equal(y, ops.shift(x, offset.round().long(), padding_mode, **window))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_moves_integers_by_offsets_of_16_bits(kind):
    x, offset = torch.arange(60, dtype=torch.int8).view(1, 2, 5, 6), torch.tensor([[1.5, -2], [0, 2.5]], dtype=kind)
    assert torch.equal(ops.sparse_shift(x, offset), ops.sparse_shift(x, offset.float()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_of_16_bits(layout):
    x = laid_out(normal((2, 7, 5, 6)), layout)
    for shift, kind in itertools.product((ops.active_shift, ops.sparse_shift), (torch.bfloat16, torch.float16)):
        offset = (normal((7, 2), 1) * 3).to(kind).requires_grad_()
        wide = offset.detach().float().requires_grad_()
        y, z = shift(x, offset), shift(x, wide)
        assert torch.equal(y, z)
        (narrow,) = torch.autograd.grad(y.sum(), offset)
        assert torch.equal(narrow, torch.autograd.grad(z.sum(), wide)[0].to(kind))
