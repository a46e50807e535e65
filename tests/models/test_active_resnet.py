"""AS-ResNet's block and trunk against plain statements of them, and its initialisation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftconv.models import create_model
from shiftconv.models.active_resnet import ActiveShiftBlock


def _read(x, shift, stride):
    """The papers' layer by its definition: ``y[h, w] = x(h * stride + a, w * stride + b)``, bilinear, zero outside."""
    height, width = x.shape[2:]
    y = x.new_zeros(*x.shape[:2], -(-height // stride), -(-width // stride))
    for c, (a, b) in enumerate(shift.tolist()):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                for h in range(height):
                    for w in range(width):
                        far = abs(i * stride + a - h), abs(j * stride + b - w)
                        y[:, c, i, j] += max(0, 1 - far[0]) * max(0, 1 - far[1]) * x[:, c, h, w]
    return y


def _norm(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def _fresh(module):
    """``module`` in float64 and in evaluation, with norms that change something."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(value, generator=generator)
            nn.init.uniform_(norm.running_var, 0.5, 2, generator=generator)
    return module.double().eval()


@pytest.mark.parametrize(("in_chs", "out_chs", "stride"), [(4, 4, 1), (4, 4, 2), (4, 6, 1), (4, 6, 2)])
def test_block(in_chs, out_chs, stride):
    block = _fresh(ActiveShiftBlock(in_chs, out_chs, stride, expansion=1.5))
    block.shift2.offset.data.mul_(2.3)
    x = torch.randn(2, in_chs, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = F.relu(_norm(x, block.bn1))
        shortcut = x
        if (in_chs, stride) != (out_chs, 1):
            shortcut = torch.einsum("oc,nchw->nohw", block.shortcut.weight[:, :, 0, 0], y[:, :, ::stride, ::stride])
        y = torch.einsum("oc,nchw->nohw", block.conv1.weight[:, :, 0, 0], y)
        assert y.shape[1] == int(1.5 * out_chs)
        y = _read(F.relu(_norm(y, block.bn2)), -block.shift2.offset, stride)
        expected = torch.einsum("oc,nchw->nohw", block.conv2.weight[:, :, 0, 0], y) + shortcut
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("name", "blocks", "stride"), [("asresnet20", (3, 3, 3), 1), ("asresnet_w32", (1, 3, 4, 6, 3), 2)]
)
def test_trunk(name, blocks, stride):
    model = _fresh(create_model(name, num_classes=5))
    stages = [model.get_submodule(f"layer{i + 1}") for i in range(len(blocks))]
    assert tuple(len(stage) for stage in stages) == blocks
    for i, stage in enumerate(stages):
        assert [block.shortcut is not None for block in stage] == [i > 0 and j == 0 for j in range(len(stage))]
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = F.conv2d(x, model.conv1.weight, stride=stride, padding=1)
        for stage in stages:
            for block in stage:
                y = block(y)
        y = F.relu(_norm(y, model.norm)).mean((2, 3))
        torch.testing.assert_close(model(x), y @ model.linear.weight.T + model.linear.bias)


def test_initialisation():
    model = create_model("asresnet_w32")
    conv, linear = model.layer5[1].conv1.weight, model.linear.weight
    assert conv.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05) and conv.mean().abs() < 1e-2
    assert linear.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert linear.abs().max() <= (3 / 256) ** 0.5 and not model.linear.bias.any()
    offset = model.layer5[1].shift2.offset
    assert 0.95 < offset.abs().max() <= 1 and offset.mean().abs() < 0.2
