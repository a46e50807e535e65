"""Where channels are after axes have moved, and what constants become; the rest is tested with the chains."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import fx, nn

from shiftconv.models.large_kernel_block import ResponseNorm
from shiftconv.sparse.channelwise import (
    KeepChannels,
    Layout,
    keeps_constants,
    module_step,
    node_step,
    pads_with_zeros,
)

SIZES = (2, 7, 3, 5)  # of axes, the second are the units


def found(y):
    """The axis of seven entries, from the end, and how many axes there are."""
    return y.shape.index(7) - y.ndim, y.ndim


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_permuted(order):
    layout = Layout(7, -3, 4).permuted([axis - 4 if axis % 2 else axis for axis in order])
    assert (layout.axis, layout.rank) == found(torch.empty(SIZES).permute(order))


@pytest.mark.parametrize("axes", [*itertools.product(range(-4, 4), repeat=2)])
def test_transposed(axes):
    layout = Layout(7, -3, 4).transposed(*axes)
    assert (layout.axis, layout.rank) == found(torch.empty(SIZES).transpose(*axes))


@pytest.mark.parametrize("axes", [(2, 3), (2, -1), (-2, -1), (3, 3), (1, 1), (0, 0)])
def test_flattened(axes):
    layout = Layout(7, -3, 4).flattened(*axes)
    assert (layout.axis, layout.rank) == found(torch.empty(SIZES).flatten(*axes))


def test_flattened_with_axes_of_one_entry():
    layout = Layout(7, -3, 4).flattened(1, -1)
    assert (layout.axis, layout.rank) == found(torch.empty(2, 7, 1, 1).flatten(1))
    assert Layout(7, -1, 3).flattened(0, 1) == Layout(7, -1, 2)
    assert Layout(7, -3, 4).flattened(0, 1) is None


def test_what_is_not_known_is_not_guessed():
    known = Layout(7, -1)
    assert known.permuted([0, 2, 1]) == Layout(7, -2, 3)
    assert known.transposed(-1, -2) == Layout(7, -2)
    assert known.transposed(0, 1) is known.transposed(1, -1) is known.flattened(0, -1) is None
    assert Layout(7, -3, 4).permuted([0, 2, 1]) is Layout(7, -3, 4).permuted([0, 1, 1, 2]) is None


def step(function, layout):
    """What is made of a function of one tensor."""

    class Traced(nn.Module):
        def forward(self, x):
            return function(x)

    *_, node, _ = fx.symbolic_trace(Traced()).graph.nodes
    return node_step(node, layout)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.flatten(input=x, start_dim=1),
        lambda x: torch.swapaxes(x, axis0=1, axis1=2),
        lambda x: torch.permute(input=x, dims=(0, 2, 1, 3)),
        lambda x: x.squeeze(),
        lambda x: x.unsqueeze(0),
        lambda x: x.double(),
        lambda x: x.mean(),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.pad(x, (1, 0)),
        lambda x: x.no_such_method(),
    ],
)
def test_other_calls_are_none(function):
    given = step(function, Layout(7, -3, 4))
    assert given is None or given[1] == Layout(7, -2, 4)  # one may be understood, but not misunderstood


def test_a_function_is_taken_with_its_arguments():
    function, layout = step(lambda x: F.hardtanh(x, min_val=0.0, max_val=4.0), Layout(7, -1))
    assert function(torch.tensor([-3.0, 3.0, 9.0])).tolist() == [0.0, 3.0, 4.0]
    assert layout == Layout(7, -1)


@pytest.mark.parametrize("axis", [-1, -3])
def test_keep_channels_has_its_axis(axis):
    norm = ResponseNorm(7)
    assert isinstance(norm, KeepChannels)
    assert (module_step(norm, Layout(7, axis, 4)) is None) == (axis != -1)


def test_norms_of_ones_own():
    class Coupled(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) + input.mean(1, keepdim=True)

    class More(nn.BatchNorm2d):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("more", torch.zeros(3))

        def forward(self, input):
            return super().forward(input)

    layout = Layout(7, -3, 4)
    assert module_step(BatchNormAct2d(7), layout) is not None
    assert module_step(BatchNormAct2d(7, act_layer=nn.PReLU), layout) is None
    assert module_step(Coupled(7), layout) is None
    assert module_step(nn.SyncBatchNorm(7), layout) is not None


PADS = [
    (nn.Conv2d(4, 4, 3, padding=1, groups=4), True),
    (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), True),
    (nn.Conv2d(4, 4, 3, padding="same"), True),
    (nn.Conv2d(4, 4, 1, padding="same"), False),
    (nn.Conv2d(4, 4, 3, padding="valid"), False),
    (nn.Conv2d(4, 4, 3), False),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), False),
    (nn.AvgPool2d(3, 1, 1), True),
    (nn.AvgPool1d(2), False),
    (nn.AvgPool2d(3, 2, ceil_mode=True), False),
    (nn.MaxPool2d(3, 2, 1), False),
    (nn.AdaptiveAvgPool2d(3), False),
    (nn.AdaptiveMaxPool2d(3), False),
]


@pytest.mark.parametrize("layer,pads", PADS, ids=lambda each: str(each))
def test_what_pads_makes_other_numbers_at_the_border(layer, pads):
    assert pads_with_zeros(layer) == pads
    y = layer(torch.ones(1, 4, 7) if isinstance(layer, nn.AvgPool1d) else torch.ones(1, 4, 7, 7))
    flat = y.flatten(2)
    assert torch.allclose(flat, flat[:, :, :1].expand_as(flat)) != pads
    if not pads and keeps_constants(layer):
        torch.testing.assert_close(y, torch.ones_like(y))
