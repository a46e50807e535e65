"""ShiftNet's block against a plain statement of it, and what is in which stage."""

import pytest
import torch
import torch.nn.functional as F

from shiftconv.models import create_model
from shiftconv.models.shiftnet import CSCBlock


@pytest.mark.parametrize(("out_chs", "stride", "kernel_size"), [(6, 1, 3), (14, 2, 3), (6, 1, 5), (14, 2, 5)])
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_block(out_chs, stride, kernel_size, size):
    block = CSCBlock(6, out_chs, stride, expansion=5, kernel_size=kernel_size).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = block.conv1(F.relu(F.batch_norm(x, None, None, training=True)))
    mid, reach = y.shape[1], kernel_size // 2
    assert mid == 5 * (out_chs if stride == 1 else out_chs - 6)
    padded, moved = F.pad(y, [reach] * 4), y.clone()
    for c in range(mid // kernel_size**2 * kernel_size**2):
        top, left = c // kernel_size % kernel_size, c % kernel_size
        moved[:, c] = padded[:, c, top : top + size[0], left : left + size[1]]
    y = block.conv2(F.relu(F.batch_norm(moved, None, None, training=True)))
    if stride == 1:
        expected = y + x
    else:
        window = F.pad(x, [1] * 4).unfold(2, 3, 2).unfold(3, 3, 2)
        expected = torch.cat([y, window.mean((4, 5))], 1)
    torch.testing.assert_close(block(x), expected)


def test_stages():
    model = create_model("shiftnet_a")
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [len(stage) for stage in stages] == [5, 6, 7, 3]
    assert [stage[1].shift2.kernel_size for stage in stages] == [(5, 5), (5, 5), (3, 3), (3, 3)]
    assert [[stage[i].conv1.out_channels for i in (0, 1)] for stage in stages] == [
        [4 * 32, 4 * 64], [4 * 64, 3 * 128], [3 * 128, 2 * 256], [2 * 256, 1 * 512],
    ]  # fmt: skip
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.out_channels) == ((7, 7), (2, 2), 32)
