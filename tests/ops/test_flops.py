"""torch's counter of operations sees what our operators cost, as if they were torch's convolutions."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from shiftconv import ops


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_forward_counts_what_torch_counts():
    x, weight = torch.randn(2, 4, 20, 18), torch.randn(4, 1, 7, 5)
    assert flops(lambda: ops.depthwise_conv(x, weight, padding=(1, 2))) == flops(
        lambda: F.conv2d(x, weight, padding=(1, 2), groups=4)
    )
    offset = torch.zeros(4, 2, dtype=torch.int64)
    assert flops(lambda: ops.shift_linear(x, offset, weight[:3, 0, 0, :4])) == flops(
        lambda: F.conv2d(x, torch.randn(3, 4, 1, 1))
    )


def test_backward_is_twice_the_forward_pass():
    x, tall = torch.randn(1, 3, 9, 9, requires_grad=True), torch.randn(3, 1, 7, 3, requires_grad=True)
    wide = torch.randn(3, 1, 3, 7, requires_grad=True)
    forward = 2 * 3 * 81 * 42
    for summed in (True, False):
        assert flops(lambda s=summed: ops.cross_conv(x, tall, wide, summed=s)) == forward
        y = ops.cross_conv(x, tall, wide, summed=summed)
        total = y if summed else y[0] + y[1]
        assert flops(lambda t=total: t.sum().backward()) == 2 * forward
