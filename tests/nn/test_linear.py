"""The linear layer by oneDNN against torch's, wherever it must step aside, and its derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shiftconv.nn import linear
from shiftconv.nn.linear import Linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Every product that oneDNN computes, on whatever processor."""
    done = []
    product = linear._product
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(linear, "_product", lambda *args: (done.append(args), product(*args))[1])
    return done


def layer(inputs, outputs, bias=True):
    torch.manual_seed(0)
    return Linear(inputs, outputs, bias=bias)


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (4, 3), (1, 3), (2, 9, 3)])
@pytest.mark.parametrize(("outputs", "bias"), [(5, True), (2, False), (64, True)])
def test_same_as_torch(shape, outputs, bias, calls):
    own = layer(shape[-1], outputs, bias)
    x = torch.randn(shape, requires_grad=True)
    y, expected = own(x), F.linear(x, own.weight, own.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
    grad, leaves = torch.randn_like(y), [x, *own.parameters()]
    for got, want in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


def test_views_and_expanded_gradients():
    own, x = layer(6, 4), torch.randn(2, 6, 5, 7).permute(0, 2, 3, 1).requires_grad_()
    for y in (own(x), F.linear(x, own.weight, own.bias)):
        own.weight.grad = None
        y.sum().backward()  # sends an expanded gradient
        torch.testing.assert_close(own.weight.grad, x.detach().sum((0, 1, 2)).expand(4, 6), rtol=1e-4, atol=1e-4)


def test_second_derivative(calls):
    own, x = layer(3, 4), torch.randn(5, 3, requires_grad=True)

    def twice(function):
        (first,) = torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, own.weight])

    for got, want in zip(twice(own), twice(lambda x: F.linear(x, own.weight, own.bias)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_steps_aside(calls, monkeypatch):
    own, x = layer(3, 4), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert own(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.vmap(own)(x), F.linear(x, own.weight, own.bias))
    torch.func.grad(lambda x: own(x).sum())(x)
    own(x[0])
    assert own(x[:0]).shape == (0, 4)
    torch.compile(own, fullgraph=True, backend="eager")(x)
    torch.export.export(own, (x,))
    own.to("meta")(x.to("meta"))
    layer(3, 4).double()(x.double())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    layer(3, 4)(x)
    assert not calls


def test_the_counter_of_operations_sees_it(calls):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(3, 4)(torch.randn(5, 3))
    assert calls
    assert counter.get_total_flops() == 2 * 5 * 3 * 4


def test_is_a_linear_layer():
    own = layer(3, 4)
    assert isinstance(own, nn.Linear)
    plain = nn.Linear(3, 4)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(own(x), plain(x))
