"""ShiftLinear against the layers that it stands for."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftconv.nn import GroupShift2d, ShiftLinear
from shiftconv.nn.shift_linear import fold_norm


def settled(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A normalisation that has seen data, in evaluation mode."""
    with torch.no_grad():
        for name, tensor in norm.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name in ("weight", "running_var") else tensor.normal_()
    return norm.eval()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_from_conv_is_the_layers_in_turn(stride, bias):
    shift, conv, norm = GroupShift2d(20), nn.Conv2d(20, 7, 1, stride, bias=bias), settled(nn.BatchNorm2d(7))
    x, residual = torch.randn(2, 20, 9, 6), torch.randn(2, 7, -(-9 // stride), 6 // stride)
    fused = ShiftLinear.from_conv(conv, norm, shift.offset, activation="relu")
    torch.testing.assert_close(fused(x), norm(conv(shift(x))).relu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused(x, residual), norm(conv(shift(x))).relu() + residual, rtol=1e-5, atol=1e-5)
    plain = ShiftLinear.from_conv(conv)
    torch.testing.assert_close(plain(x), conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_trains_and_keeps_its_state(ndim):
    offset = torch.randint(-2, 3, (5, ndim))
    layer = ShiftLinear(offset, 4, padding_mode="circular")
    x = torch.randn(2, 5, *[6, 5, 4][:ndim])
    moved = torch.stack([x[:, c].roll(row.tolist(), [*range(1, ndim + 1)]) for c, row in enumerate(offset)], 1)
    expected = F.linear(moved.movedim(1, -1), layer.weight, layer.bias).movedim(-1, 1)
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert set(layer.state_dict()) == {"weight", "bias", "offset"}
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_folded_norm_is_the_norm():
    conv, norm = nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False), settled(nn.BatchNorm2d(6))
    x = torch.randn(2, 3, 5, 5)
    before = conv.weight.clone()
    torch.testing.assert_close(fold_norm(conv, norm)(x), norm(conv(x)), rtol=1e-5, atol=1e-5)
    assert conv.bias is None
    assert conv.weight.equal(before)


def test_refusals():
    with pytest.raises(ValueError, match="ungrouped, unpadded 1x1"):
        ShiftLinear.from_conv(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="ungrouped, unpadded 1x1"):
        ShiftLinear.from_conv(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ValueError, match="ungrouped, unpadded 1x1"):
        ShiftLinear.from_conv(nn.Conv2d(4, 4, 1, padding=1))
    with pytest.raises(ValueError, match="without running statistics"):
        ShiftLinear.from_conv(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(TypeError, match=r"integer offsets, got torch\.float32"):
        ShiftLinear(torch.zeros(4, 2), 4)
    with pytest.raises(ValueError, match=r"\[C, D\] with D from 1 to 3, got \[4\]"):
        ShiftLinear(torch.zeros(4, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="out_channels"):
        ShiftLinear(torch.zeros(4, 2, dtype=torch.int64), 0)
