"""What zeros are worth once ``compact()`` has taken them out: networks with 40 % of something zero, and single layers.

The baseline of a network is its dense form, folded; everything else is folded, too, and compacted unless it says so:

    hidden units    rows of the first linear layer of a block, their biases, and columns of the second one
    kernels         all kernels of a channel, of single channels or of 16 neighbours together
    single zeros    weights of the linear layers, wherever

A layer is a shift-wise convolution, a share of whose small kernels is zero in all paths: in training, where its kernels
are composed in each step, and compacted.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.bench import Case
from benchmarks.networks.large_kernels import BATCHES, PIXELS, folded, network
from shiftconv.models.large_kernel_block import Block
from shiftconv.nn import LargeKernelConv2d, ShiftwiseConv2d
from shiftconv.nn.large_kernel import DepthwiseBranch
from shiftconv.sparse.compact import compact

SHARE, LANES = 0.4, 16
DENSITIES = (1.0, 0.6, 0.3, 0.1)
LAYERS = ((60, 56, 51), (122, 28, 49), (246, 14, 47))  # channels, side, kernel
IMAGES = 2

Prune = Callable[[nn.Module], None]


def cases(device: str) -> Iterator[Case]:
    for name in ("slak_tiny", "shiftwise_tiny"):
        nets = {"dense": folded(network(name, device)), **pruned(name, device)}
        for batch in BATCHES:
            x = torch.randn(batch, 3, PIXELS, PIXELS, device=device)
            yield inference(f"{name} {PIXELS} px batch {batch}", nets, x)
    for channels, side, kernel_size in LAYERS:
        for label, layer in {
            "plain, 1 shift": ShiftwiseConv2d(channels, kernel_size, 3, 2, 1),
            "plain, 4 shifts": ShiftwiseConv2d(channels, kernel_size, 3, 2, 4),
            "split": ShiftwiseConv2d(channels, kernel_size, 5, variant="split"),
        }.items():
            yield from layers(f"shift-wise {label} {channels}@{side} {kernel_size}", layer.to(device), side)


def pruned(name: str, device: str) -> dict[str, nn.Module]:
    """Networks with zeros, by what is zero in them."""
    ways: dict[str, list[Prune]] = {
        "single zeros": [single_weights],
        "hidden units": [hidden_units],
        "kernels": [partial(kernels, together=1)],
        f"kernels by {LANES}": [partial(kernels, together=LANES)],
        "hidden units and kernels": [hidden_units, partial(kernels, together=1)],
        f"hidden units and kernels by {LANES}": [hidden_units, partial(kernels, together=LANES)],
    }
    nets: dict[str, nn.Module] = {}
    for key, steps in ways.items():
        net = network(name, device)
        for step in steps:
            step(net)
        if key == f"hidden units and kernels by {LANES}":
            nets["the same, not compacted"] = folded(net)
        compact(net.eval())
        nets[key] = net
    return nets


@torch.no_grad()
def hidden_units(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for block in net.modules():
        if isinstance(block, Block):
            dead = torch.randperm(block.fc1.out_features, generator=generator)[: round(SHARE * block.fc1.out_features)]
            block.fc1.weight[dead] = 0
            block.fc1.bias[dead] = 0
            block.fc2.weight[:, dead] = 0


@torch.no_grad()
def kernels(net: nn.Module, together: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for layer in net.modules():
        if isinstance(layer, LargeKernelConv2d):
            branches = [branch.weight for branch in layer.children() if isinstance(branch, DepthwiseBranch)]
            dead = ~choice(len(branches[0]), 1 - SHARE, together, generator)
            for weight in branches:
                weight[dead] = 0
        elif isinstance(layer, ShiftwiseConv2d):
            dead = ~choice(len(layer.active), 1 - SHARE, together, generator)
            for weight in layer.weights:
                weight.view(len(dead), -1)[dead] = 0


@torch.no_grad()
def single_weights(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.weight[torch.rand(layer.weight.shape, generator=generator) < SHARE] = 0


def choice(channels: int, density: float, together: int, generator: torch.Generator) -> Tensor:
    """Which channels live, ``[channels]``, neighbours of which share their fate."""
    groups = -(-channels // together)
    live = torch.zeros(groups, dtype=torch.bool)
    live[torch.randperm(groups, generator=generator)[: round(density * groups)]] = True
    return live.repeat_interleave(together)[:channels]


def inference(case: str, nets: dict[str, nn.Module], x: Tensor) -> Case:
    def check() -> None:
        name = case.split()[0]
        net = network(name, str(x.device)).eval()
        hidden_units(net)
        kernels(net, LANES)
        with torch.inference_mode():
            truth = net(x)
            for key in (f"hidden units and kernels by {LANES}", "the same, not compacted"):
                torch.testing.assert_close(nets[key](x), truth, rtol=1e-4, atol=1e-4, msg=key)

    runs: dict[str, Callable[[], object]] = {
        key: torch.inference_mode()(lambda net=net: net(x)) for key, net in nets.items()
    }
    return Case(case, "forward", "dense", runs, check)


def layers(case: str, full: ShiftwiseConv2d, side: int) -> Iterator[Case]:
    x = torch.randn(IMAGES, full.dim, side, side).contiguous(memory_format=torch.channels_last)
    trained: dict[str, ShiftwiseConv2d] = {}
    small: dict[str, ShiftwiseConv2d] = {}
    composed: dict[str, ShiftwiseConv2d] = {}  # those that are trained have other statistics soon
    for together in (1, LANES):
        for density in DENSITIES[together > 1 :]:
            key = f"density {density:g}" + (f" by {together} channels" if together > 1 else "")
            trained[key] = thinned(full, density, together)
            composed[key] = copy.deepcopy(trained[key]).eval()
            small[key] = copy.deepcopy(trained[key])
            compact(small[key].eval())

    def check() -> None:
        with torch.inference_mode():
            for key, layer in small.items():
                torch.testing.assert_close(layer(x), composed[key](x), rtol=1e-4, atol=1e-4, msg=key)

    def step(layer: ShiftwiseConv2d) -> None:
        given = x.detach().requires_grad_()
        torch.autograd.grad(layer(given), [given, *layer.parameters()], x)

    first = f"density {DENSITIES[0]:g}"
    steps: dict[str, Callable[[], object]] = {
        key: partial(step, copy.deepcopy(layer).train())
        for key, layer in trained.items()  # which move their statistics
    }
    runs: dict[str, Callable[[], object]] = {
        key: torch.inference_mode()(partial(layer, x)) for key, layer in small.items()
    }
    yield Case(case, "forward+backward", first, steps, check)
    yield Case(case, "forward", first, runs, check)


@torch.no_grad()
def thinned(full: ShiftwiseConv2d, density: float, together: int) -> ShiftwiseConv2d:
    """The same with a share of its small kernels, in all paths, the same one of so many channels together."""
    layer, generator = copy.deepcopy(full), torch.Generator().manual_seed(4)
    channels = len(layer.active)
    live = torch.rand(-(-channels // together), layer.slots, generator=generator) < density
    live = live.repeat_interleave(together, 0)[:channels].flatten()
    for weight in (*layer.weights, *(layer.tall_weights or ())):
        weight[~live] = 0
    return layer
