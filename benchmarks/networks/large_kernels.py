"""Whole networks with large kernels, images of 224 x 224, float32: inference, and training steps with AdamW.

The baseline of either family is its original formulation in torch, with the same weights, in NCHW and in the better of
the two formats that torch has:

    SLaK-T    three convolutions a block, each with its batch norm, and their sum
    SW-T      one convolution for each path with all small kernels of a channel, whose maps are added, then shifted to
              their slots and added, once for each arrangement; batch norms, input and ghosts

The authors' operators are CUDA only; that of SW-T is :class:`~benchmarks.ops.shiftwise.ShiftAdd` here. Linear layers of
the baseline are torch's, which take MKL where ours may take oneDNN. Beside them run ConvNeXt-T of timm and
UniRepLKNet-T, as it is trained and folded.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

import shiftconv as sc
from benchmarks.bench import Case
from benchmarks.ops.shiftwise import ShiftAdd
from shiftconv.models.large_kernel_block import Block, ResponseNorm
from shiftconv.models.large_kernel_net import LargeKernelNet
from shiftconv.nn import LargeKernelConv2d, ShiftwiseConv2d

BASELINE = "original formulation"
BATCHES, TRAINED = (1, 4), 2
PIXELS, CHECKED = 224, 64  # the second in float64, of gradients


class SmallKernels(nn.Module):
    """A :class:`ShiftwiseConv2d` in activation space; its ghosts come last."""

    active: Tensor
    ghosts: Tensor
    tall: Tensor
    wide: Tensor
    picks: Tensor

    def __init__(self, layer: ShiftwiseConv2d):
        super().__init__()
        channels, small = len(layer.active), layer.small_kernel_size
        self.kernel_size, self.small_kernel_size = layer.kernel_size, small
        self.paths = nn.ModuleList(depthwise(weight, channels, small - 1) for weight in layer.weights)
        norms = (layer.tall_norm, layer.wide_norm, layer.small_norm)
        self.norms = nn.ModuleList(copy.deepcopy(norm) for norm in norms if norm is not None)
        self.register_buffer("active", layer.active)
        self.register_buffer("ghosts", layer.ghosts)
        first = torch.arange(channels, device=layer.active.device) * layer.slots
        for name in ("tall", "wide"):  # from the slot of each kernel to the kernel in each slot
            self.register_buffer(name, layer.get_buffer(f"{name}_slots").argsort(1).permute(2, 1, 0) + first)
        self.register_buffer("picks", (layer.get_buffer("small_slots") == 0).to(torch.int64).argmax(1).t() + first)

    def forward(self, x: Tensor) -> Tensor:
        y = x.index_select(1, self.active)
        maps, *others = (path(y) for path in self.paths)
        for other in others:
            maps = maps + other
        tables = (self.tall, self.wide, self.picks)
        branches = ShiftAdd.apply(maps, *tables, self.kernel_size, self.small_kernel_size)
        tall, wide, small = (norm(branch) for norm, branch in zip(self.norms, branches, strict=True))  # pyright: ignore[reportArgumentType]
        return torch.cat((tall + wide + small + y, x.index_select(1, self.ghosts)), 1)


class Stripes(nn.Module):
    """A :class:`LargeKernelConv2d` as its branches, one by one."""

    def __init__(self, layer: LargeKernelConv2d):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for branch in (layer.tall, layer.wide, layer.small):
            if branch is not None and branch.norm is not None:
                self.convs.append(depthwise(branch.weight, len(branch.weight)))
                self.norms.append(copy.deepcopy(branch.norm))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = (norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True))
        for branch in rest:
            first = first + branch
        return first


class ElementaryNorm(nn.Module):
    """Layer norm of the channels of a map, written out."""

    def __init__(self, norm: LayerNorm2d):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + self.eps).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ElementaryResponse(nn.Module):
    """:class:`ResponseNorm` without a fused addition."""

    def __init__(self, norm: ResponseNorm):
        super().__init__()
        assert norm.bias is not None
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        strength = x.norm(dim=(1, 2), keepdim=True)
        scale = 1 + self.weight * (strength / (strength.mean(-1, keepdim=True) + self.eps))
        return x * scale + self.bias


def stock(layer: nn.Linear) -> nn.Linear:
    """The same layer as torch has it; ours may run elsewhere."""
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


class Original(nn.Module):
    """A network of ours as its authors formulate it, on maps in the memory format of the images."""

    def __init__(self, net: LargeKernelNet):
        super().__init__()
        self.net = copy.deepcopy(net)
        for parent in [*self.net.modules()]:
            for name, module in [*parent.named_children()]:
                if isinstance(parent, Block) and isinstance(module, ShiftwiseConv2d):
                    _reorder(parent, module.active, module.ghosts)
                    parent.mix = SmallKernels(module)
                elif isinstance(module, LargeKernelConv2d):
                    setattr(parent, name, Stripes(module))
                elif isinstance(module, LayerNorm2d) and not isinstance(parent, Block):
                    setattr(parent, name, ElementaryNorm(module))
                elif isinstance(module, ResponseNorm):
                    setattr(parent, name, ElementaryResponse(module))
                elif isinstance(module, nn.Linear):
                    setattr(parent, name, stock(module))

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_head(self.net.stages(self.net.stem(x)))


@torch.no_grad()
def _reorder(block: Block, active: Tensor, ghosts: Tensor) -> None:
    """Let what follows the mixing take the ghosts last."""
    order = torch.cat((active, ghosts))
    assert isinstance(block.norm, nn.BatchNorm2d)
    for each in (*block.norm.parameters(), *block.norm.buffers()):
        if each.ndim:
            each.copy_(each[order])
    squeeze: Any = block.squeeze
    squeeze.fc1.weight.copy_(squeeze.fc1.weight[:, order])
    for each in squeeze.fc2.parameters():
        each.copy_(each[order])
    block.fc1.weight.copy_(block.fc1.weight[:, order])


def depthwise(weight: Tensor, channels: int, padding: int | None = None) -> nn.Conv2d:
    """A convolution by ``weight`` ``[C * M, 1, kh, kw]``, ``M`` maps of each channel; it keeps the size by default."""
    height, width = weight.shape[2:]
    around = (height // 2, width // 2) if padding is None else (padding, padding)
    with torch.device("meta"):
        conv = nn.Conv2d(channels, len(weight), (height, width), padding=around, groups=channels, bias=False)
    conv.weight = nn.Parameter(weight.detach().clone())
    return conv


def network(name: str, device: str) -> LargeKernelNet:
    """A network in which every block, norm and statistic counts."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = sc.create_model(name, layer_scale=0.5)
    assert isinstance(net, LargeKernelNet)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | ResponseNorm | LayerNorm2d) and module.bias is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return net.to(device)


def folded(net: LargeKernelNet) -> LargeKernelNet:
    net = copy.deepcopy(net).eval()
    net.reparameterize()
    return net


def step(net: nn.Module) -> Callable[[Tensor], None]:
    """Training steps on images with labels of no meaning."""
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-4, fused=True)

    def run(x: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(len(x), device=x.device)).backward()
        optimizer.step()

    return run


def cases(device: str) -> Iterator[Case]:
    for name in ("slak_tiny", "shiftwise_tiny"):
        own = network(name, device)
        peers: dict[str, nn.Module] = {
            "convnext_tiny": timm.create_model("convnext_tiny").to(device),
            "unireplknet_t": network("unireplknet_t", device),
        }
        for batch in BATCHES:
            yield inference(name, own, peers, torch.randn(batch, 3, PIXELS, PIXELS, device=device))
        yield training(name, own, peers, torch.randn(TRAINED, 3, PIXELS, PIXELS, device=device))


def candidates(name: str, own: LargeKernelNet, peers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Networks that may change their weights: the original, ours and the peers, with torch's in both formats."""
    nets: dict[str, nn.Module] = {BASELINE: Original(own), name: own} | peers
    for each in (BASELINE, "convnext_tiny"):  # the others choose for themselves
        nets[f"{each} channels_last"] = nets[each]
    return {
        key: copy.deepcopy(net).to(memory_format=torch.channels_last) if "last" in key else copy.deepcopy(net)
        for key, net in nets.items()
    }


def inputs(nets: dict[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    return {key: x.contiguous(memory_format=torch.channels_last) if "last" in key else x for key in nets}


def inference(name: str, own: LargeKernelNet, peers: dict[str, nn.Module], x: Tensor) -> Case:
    nets = candidates(name, own, peers)
    for key, net in [*nets.items()]:
        net.eval()
        if isinstance(net, LargeKernelNet):
            nets[f"{key} folded"] = folded(net)
    given = inputs(nets, x)

    def check() -> None:
        with torch.inference_mode():
            truth = nets[BASELINE](x)
            for key, net in nets.items():
                if key.startswith((BASELINE, name)):
                    torch.testing.assert_close(net(given[key]), truth, rtol=1e-4, atol=1e-4, msg=key)

    runs: dict[str, Callable[[], object]] = {
        key: torch.inference_mode()(lambda net=net, x=given[key]: net(x)) for key, net in nets.items()
    }
    return Case(f"{name} {PIXELS} px batch {len(x)}", "forward", BASELINE, runs, check)


def training(name: str, own: LargeKernelNet, peers: dict[str, nn.Module], x: Tensor) -> Case:
    nets = candidates(name, own, peers)
    given = inputs(nets, x)
    runs: dict[str, Callable[[], object]] = {key: partial(step(net), given[key]) for key, net in nets.items()}
    return Case(f"{name} {PIXELS} px batch {len(x)}", "step", BASELINE, runs, lambda: check_gradients(own, x))


def check_gradients(own: LargeKernelNet, x: Tensor) -> None:
    """Both formulations send the same to the weights, in training, in float64; from a corner of the images."""
    nets = [copy.deepcopy(net).double().train() for net in (own, Original(own))]
    x = x[:2, :, :CHECKED, :CHECKED].double()
    each: list[list[Tensor]] = []
    for net in nets:
        inner: Any = net.net if isinstance(net, Original) else net
        mixes = [inner.stages[i].blocks[0].mix for i in (0, 2)]
        weights = [inner.stem[0].weight, inner.stages[1].blocks[1].fc2.weight, inner.linear.weight]
        weights += [next(p for p in mix.parameters() if p.ndim == 4) for mix in mixes]
        y = net(x)
        each.append([y, *torch.autograd.grad(F.cross_entropy(y, torch.arange(2, device=y.device)), weights)])
    for ours, theirs in zip(*each, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
