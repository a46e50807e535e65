"""ShiftResNet-20 against ResNet-20, whole networks: images of 32 x 32, float32, inference.

The baseline is ResNet-20 as torch runs it. Beside it run the forms in which a user could have it faster, with its
normalisations folded and in channels_last, ShiftResNet-20 with expansion 3 in plain torch (the shift by slice
assignment), with our shift, and deployed.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import shiftconv as sc
from benchmarks.bench import Case
from benchmarks.ops.shift import slices
from shiftconv.models.shiftresnet_blocks import ShiftBlock

BASELINE = "resnet20"


class SliceShift(nn.Module):
    """The grouped shift as common ports have it."""

    def __init__(self, offset: Tensor):
        super().__init__()
        self.offset = [(int(h), int(w)) for h, w in offset.tolist()]

    def forward(self, x: Tensor) -> Tensor:
        moving = x.shape[1] // 9 * 9
        return torch.cat((slices(x[:, :moving], self.offset), x[:, moving:]), 1)


def network(name: str, **arguments: Any) -> nn.Module:
    """A network with statistics that fold into something."""
    generator = torch.Generator().manual_seed(0)
    net = sc.create_model(name, **arguments).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return net


def deployed(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    net.reparameterize()  # pyright: ignore[reportCallIssue]
    return net


def cases(device: str) -> Iterator[Case]:
    """Batches of one and of 64 on ``device``."""
    plain, shifted = network("resnet20").to(device), network("shiftresnet20", expansion=3).to(device)
    sliced = copy.deepcopy(shifted)
    for module in sliced.modules():
        if isinstance(module, ShiftBlock):
            module.shift2 = SliceShift(module.shift2.offset)  # pyright: ignore[reportAttributeAccessIssue]
    nets = {
        BASELINE: plain,
        "resnet20 folded": deployed(plain),
        "resnet20 channels_last": copy.deepcopy(plain).to(memory_format=torch.channels_last),
        "resnet20 folded channels_last": deployed(plain).to(memory_format=torch.channels_last),
        "shiftresnet20 torch": sliced,
        "shiftresnet20": shifted,
        "shiftresnet20 deployed": deployed(shifted),
    }
    for batch in (1, 64):
        x = torch.randn(batch, 3, 32, 32, device=device)
        inputs = {name: x.contiguous(memory_format=torch.channels_last) if "last" in name else x for name in nets}

        def check(inputs: dict[str, Tensor] = inputs) -> None:
            with torch.inference_mode():
                for name, net in nets.items():
                    truth = (plain if name.startswith(BASELINE) else shifted)(inputs[BASELINE])
                    torch.testing.assert_close(net(inputs[name]), truth, rtol=1e-4, atol=1e-4, msg=name)

        candidates: dict[str, Callable[[], object]] = {
            name: torch.inference_mode()(lambda net=net, x=inputs[name]: net(x)) for name, net in nets.items()
        }
        yield Case(f"32 px batch {batch}", "forward", BASELINE, candidates, check)
