"""What is left of merged kernels without their zeros; the rest is tested with the layers that merge them."""

import itertools

import pytest
import torch
from torch import nn

from shiftconv.nn import LargeKernelConv2d, ShiftwiseConv2d
from shiftconv.nn.cross_kernels import CrossConv2d, CrossKernels

torch.set_num_threads(1)


def kernels(tall=(9, 3), wide=(3, 9), small=None, bias=True, padding=None):
    generator = torch.Generator().manual_seed(0)

    def drawn(size):
        return None if size is None else torch.randn(4, 1, *size, generator=generator, dtype=torch.float64)

    each = [drawn(size) for size in (tall, wide, small)]
    centred = [tuple((n // 2, n - 1 - n // 2) for n in size) for size in (tall, wide, small) if size is not None]
    shift = torch.randn(4, generator=generator, dtype=torch.float64) if bias else None
    return CrossKernels(*each, shift, tuple(padding or centred))


def compacted(given, **removed):
    """The layer after compact(), which must do what it did before."""
    layer = CrossConv2d(given)
    x = torch.randn(2, 4, 11, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = layer(x)
    assert layer.compact() == {"branches": 0, "taps": 0} | removed
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert layer.compact() == {"branches": 0, "taps": 0}
    return layer


def sizes(layer):
    return [(*kernel.shape[2:],) for kernel in layer.kernels().kernels()], layer.padding


def test_nothing_goes_that_is_not_zero():
    given = kernels()
    given.tall[:3, :, :2] = 0  # in the fourth channel it is not
    given.wide[:, :, :, 4] = 0  # in the middle
    layer = CrossConv2d(given)
    tall = layer.tall
    assert layer.compact() == {"branches": 0, "taps": 0}
    assert layer.tall is tall
    given.tall[:, :, 0] = torch.nan
    compacted(given)


@pytest.mark.parametrize("ends", [*itertools.product((0, 2), (0, 3), (0, 1), (0, 1))])
def test_zeros_at_the_ends(ends):
    top, bottom, left, right = ends
    given = kernels()
    given.tall[:, :, :top] = given.tall[:, :, 9 - bottom :] = 0
    given.tall[..., :left] = given.tall[..., 3 - right :] = 0
    tall = 9 - top - bottom, 3 - left - right
    layer = compacted(given, taps=4 * (27 - tall[0] * tall[1]))
    assert sizes(layer)[0] == [tall, (3, 9)]
    assert layer.padding[0] == ((4 - top, 4 - bottom), (1 - left, 1 - right))


def test_only_as_far_as_the_padding_goes():
    """Else a map would need less than no padding."""
    given = kernels(padding=(((1, 7), (1, 1)), ((1, 1), (4, 4))))
    given.tall[:, :, :3] = 0
    assert sizes(compacted(given, taps=4 * 3)) == ([(8, 3), (3, 9)], (((0, 7), (1, 1)), ((1, 1), (4, 4))))
    given = kernels(padding=(((6, 2), (1, 1)), ((1, 1), (4, 4))))
    given.tall[:, :, 4:] = 0
    assert sizes(compacted(given, taps=4 * 6)) == ([(7, 3), (3, 9)], (((6, 0), (1, 1)), ((1, 1), (4, 4))))


@pytest.mark.parametrize("dead", ["tall", "wide", "small"])
def test_a_branch_of_zeros(dead):
    given = kernels(small=(3, 3))
    getattr(given, dead).zero_()
    layer = compacted(given, branches=1, taps=getattr(given, dead).numel())
    left = {"tall": (9, 3), "wide": (3, 9), "small": (3, 3)}
    del left[dead]
    assert sizes(layer)[0] == [*left.values()]
    assert len(layer.padding) == 2


@pytest.mark.parametrize("bias", [True, False])
def test_one_tap_stays_of_zeros(bias):
    given = kernels(bias=bias)
    given.tall.zero_()
    given.wide.zero_()
    assert sizes(compacted(given, branches=1, taps=4 * 53)) == ([(1, 1)], (((0, 0), (0, 0)),))


def test_even_sizes():
    given = kernels(tall=(8, 2), wide=None)
    given.tall[:, :, 6:] = 0
    assert sizes(compacted(given, taps=4 * 4)) == ([(6, 2)], (((4, 1), (1, 0)),))


@pytest.mark.parametrize("dead", [(), ("tall", "small"), ("wide",)])
def test_within_a_layer(dead):
    layer = LargeKernelConv2d(4, 9, 3).double().eval()
    for name in dead:
        nn.init.zeros_(getattr(layer, name).weight)
    x = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    before, kernel = layer(x), layer.equivalent_kernel()
    layer.reparameterize()
    removed = layer.merged.compact()
    assert removed["branches"] == bool(dead)
    torch.testing.assert_close(layer(x), before)
    for one, other in zip(layer.equivalent_kernel(), kernel, strict=True):
        margin = [(big - small) // 2 for big, small in zip(other.shape[2:], one.shape[2:], strict=True) for _ in (0, 1)]
        torch.testing.assert_close(nn.functional.pad(one, margin[::-1]) if margin else one, other)


def test_the_input_that_is_added_stays_without_kernels():
    layer = ShiftwiseConv2d(4, 9, 3, branch_norm=False).double().eval()
    for weight in layer.weights:
        nn.init.zeros_(weight)
    x = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    layer.reparameterize()
    assert layer.merged.compact()["branches"] == 1
    assert layer.merged.tall.shape == (4, 1, 1, 1)
    torch.testing.assert_close(layer(x), x)
