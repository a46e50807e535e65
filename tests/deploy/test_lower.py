"""What remains of a network when the operators of this package are replaced."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import shiftconv as sc
from shiftconv import ops
from shiftconv.deploy.lower import lower


def foreign(program):
    """The names of all operators, of which none may be ours."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("shiftconv" in name for name in names)
    return names


def test_known_offsets_become_convolutions_and_leave():
    shifts = [sc.nn.GroupShift2d(12), sc.nn.SparseShift2d(12, padding_mode="reflect"), sc.nn.ActiveShift2d(12)]
    model, x = nn.Sequential(*shifts, nn.Conv2d(12, 4, 1)).eval(), torch.randn(3, 12, 9, 8)
    program = lower(model, (x,), ({0: Dim("batch")},))
    assert sum("conv2d" in name for name in foreign(program)) == 4
    assert not any("offset" in name for name in program.state_dict)
    batch = torch.randn(5, 12, 9, 8)
    torch.testing.assert_close(program.module()(batch), model(batch))


def test_offsets_that_are_computed_are_known_and_those_that_come_in_are_not():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.rand(8, 2) * 2 - 1)

        def forward(self, x, offset):
            return ops.active_shift(x, self.offset.float().abs() + 0.5), ops.shift(x, offset, "symmetric")

    model, x, offset = Model().eval(), torch.randn(3, 8, 9, 8), torch.randint(-9, 9, (8, 2))
    names = foreign(lower(model, (x, offset)))
    assert sum("conv2d" in name for name in names) == 1
    assert sum("index_select" in name for name in names) == 1
    for y, expected in zip(lower(model, (x, offset)).module()(x, -offset), model(x, -offset), strict=True):
        torch.testing.assert_close(y, expected)


def test_heights_and_widths_may_vary():
    model = nn.Sequential(sc.nn.GroupShift2d(12, 5), sc.nn.ActiveShift2d(12, 2.0)).eval()
    shapes = ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},)
    program = lower(model, (torch.randn(2, 12, 9, 8),), shapes)
    x = torch.randn(3, 12, 6, 17)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("relu", [None, "relu"])
def test_shift_linear(relu):
    shift = sc.nn.ShiftLinear(torch.randint(-1, 2, (8, 2)), 6, stride=2, activation=relu)
    x, residual = torch.randn(3, 8, 9, 8), torch.randn(3, 6, 5, 4)
    for args in ((x,), (x, residual)):
        program = lower(shift, args, ({0: Dim("batch")},) * len(args))
        foreign(program)
        torch.testing.assert_close(program.module()(*args), shift(*args))


def test_shift_in_place_and_shift_through_time():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("offset", torch.tensor([[1, 0], [0, -1], [2, 2]]))
            self.time = sc.nn.TemporalShift(8, frames=4)

        def forward(self, x):
            return ops.shift_(self.time(x) * 2, self.offset)

    model, x = InPlace().eval(), torch.randn(8, 8, 6, 5)
    program = lower(model, (x,))
    foreign(program)
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("name", ["shiftresnet20"])
def test_a_network(name):
    model, x = sc.create_model(name, num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    program = lower(model, (x,), ({0: Dim("batch")},))
    foreign(program)
    batch = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program.module()(batch), model(batch), rtol=1e-4, atol=1e-5)
