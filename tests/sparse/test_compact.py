"""Whole networks without what is zero: the same outputs, nothing else changed, and nothing at all where it fails."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from shiftconv.models import shiftwise, slak, unireplknet
from shiftconv.models.large_kernel_block import Block
from shiftconv.nn import LargeKernelConv2d, ShiftwiseConv2d
from shiftconv.sparse.chains import chains
from shiftconv.sparse.compact import Compacted, compact

DEPTHS, DIMS, SIZES = (1, 1, 2, 1), (8, 16, 24, 32), (13, 11, 9, 7)
NETWORKS = {
    "slak": lambda: slak.slak(DEPTHS, DIMS, SIZES, 3, width=1.0, layer_scale=0.5),
    "slak_split": lambda: slak.slak_split(DEPTHS, DIMS, SIZES, 3, width=1.0, layer_scale=0.5),
    "shiftwise": lambda: shiftwise.shiftwise(DEPTHS, DIMS, 2, SIZES, num_shifts=2, layer_scale=0.5),
    "unireplknet": lambda: unireplknet.unireplknet(DEPTHS, DIMS, ((3,), (7,), (9, 3), (13,)), layer_scale=0.5),
    "convnext": lambda: timm.create_model("convnext_atto"),
    "resnet": lambda: timm.create_model("resnet18"),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050"),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3),
    "repvgg": lambda: timm.create_model("repvgg_a0"),
    "torchvision resnet": lambda: torchvision.models.resnet18(),
    "torchvision mobilenet": lambda: torchvision.models.mobilenet_v2(),
    "torchvision mlp": lambda: torchvision.ops.MLP(8, [24, 16, 5], norm_layer=nn.BatchNorm1d),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def made(name):
    """A network in which everything counts, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name]().double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for key, value in own.items():
                if value.ndim == 1 and value.is_floating_point():
                    one = key in ("weight", "running_var", "gamma")
                    value.copy_(one + 0.2 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
                    value.abs_() if one else value
    return network


def images(name, dtype=torch.float64):
    shape = (4, 8) if name.endswith("mlp") else (2, 3, 64, 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@torch.no_grad()
def kill_units(network):
    """A quarter of all units is zero, another is not read, and a few are constant; gives how many are zero."""
    generator = torch.Generator().manual_seed(2)
    count = 0
    for chain in chains(network):
        chance = torch.rand(chain.units, generator=generator)
        rows, columns = chance < 0.25, (chance > 0.25) & (chance < 0.5)
        chain.producer.weight[rows | (chance > 0.95)] = 0
        for layer in (chain.producer, *chain.middle):
            if getattr(layer, "bias", None) is not None:
                layer.bias[rows] = 0
        chain.consumer.weight[:, columns] = 0
        for layer in chain.middle:
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean[rows] = 0
        count += min(int(rows.sum()), chain.units - 1)
    return count


@torch.no_grad()
def kill_kernels(network):
    """Those of some channels, the ends of all stripes, and in one layer a whole branch."""
    generator = torch.Generator().manual_seed(3)
    layers = [module for module in network.modules() if isinstance(module, LargeKernelConv2d | ShiftwiseConv2d)]
    for layer in layers:
        if isinstance(layer, LargeKernelConv2d):
            dead = torch.rand(len(layer.tall.weight), generator=generator) < 0.4
            for branch in layer.children():
                branch.weight[dead] = 0
            layer.tall.weight[:, :, :2] = 0
            layer.wide.weight[..., -1:] = 0
        else:
            dead = torch.rand(len(layer.active), generator=generator) < 0.4
            for weight in (*layer.weights, *(layer.tall_weights or ())):
                weight.unflatten(0, (len(dead), -1))[dead] = 0
                weight.unflatten(0, (len(dead), -1))[:, 0] = 0
    if isinstance(layers[0], LargeKernelConv2d):
        layers[0].wide.weight.zero_()


def dead_network(name):
    network = made(name)
    kill_units(network)
    kill_kernels(network)
    return network


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.detach().abs().max()))


@every_network
def test_the_same_without_what_is_zero(name):
    network, x = made(name), images(name)
    dead = kill_units(network)
    before, count = network(x).detach(), sum(value.numel() for value in network.parameters())
    assert float(before.std()) > 1e-3
    done = compact(network, multiple_of=1)
    same(network(x), before)
    assert done.parameters_before == count
    assert done.parameters_after == sum(value.numel() for value in network.parameters()) < count
    assert done.removed.get("hidden units", 0) >= dead
    assert done.error is done.speedup is None


@every_network
def test_again_there_is_nothing_to_do(name):
    network, x = made(name), images(name)
    kill_units(network)
    compact(network)
    state = copy.deepcopy(network.state_dict())
    done = compact(network, x)
    assert done == Compacted(done.parameters_before, done.parameters_before, {}, 0.0, None)
    assert str(done).startswith("nothing is dead, so nothing was removed")
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["slak", "slak_split", "shiftwise"])
def test_large_kernels_lose_what_is_zero(name):
    network, x = dead_network(name), images(name)
    before = network(x).detach()
    done = compact(network, x)
    same(network(x), before)
    assert done.error <= 1e-12 * float(before.abs().max())
    # the small kernels of shift-wise ones are shuffled, so that none is at the ends of all channels
    kinds = {"slak": {"branches", "taps"}, "slak_split": {"taps"}, "shiftwise": set()}[name]
    assert set(done.removed) == {"hidden units"} | kinds


def test_single_zeros_stay():
    network, x = made("slak"), images("slak")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim > 1:
                value[torch.rand(value.shape, generator=generator) < 0.4] = 0
    before = network(x).detach()
    done = compact(network, x)
    assert done.removed == {}
    same(network(x), before)


def test_numbers_of_units_suit_the_processor():
    for multiple in (8, 5):
        network = dead_network("slak")
        compact(network, multiple_of=multiple)
        sizes = [block.fc1.out_features for block in network.modules() if isinstance(block, Block)]
        assert all(
            size % multiple == 0 or size == 4 * dim for size, dim in zip(sizes, (8, 16, 24, 24, 32), strict=True)
        )
        assert sum(sizes) < 4 * sum((8, 16, 24, 24, 32))


def test_what_is_read_by_nothing_any_more_goes_too():
    """The second chain loses all units that the first one fed by some of its own."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[2].weight[:4, 4:] = 0  # units 4 to 7 are read by units 4 to 7 only,
        model[4].weight[:, 4:] = 0  # which nothing reads
    x = images("mlp")[:, :3]
    before = model(x)
    assert compact(model, multiple_of=1).removed == {"hidden units": 8}
    assert [layer.weight.shape for layer in model if isinstance(layer, nn.Linear)] == [(4, 3), (4, 4), (2, 4)]
    same(model(x), before)


def test_what_comes_of_nothing_any_more_goes_too():
    """Units 4 to 7 of the second chain come of units 4 to 7 of the first one, which are zero."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[0].weight[4:] = 0
        model[2].weight[4:, :4] = 0
    x = images("mlp")[:, :3]
    before = model(x)
    assert compact(model, multiple_of=1).removed == {"hidden units": 8}
    same(model(x), before)


def test_a_report_in_one_line():
    done = Compacted(2_000, 1_000, {"hidden units": 1_234, "taps": 5}, 1e-7, 1.456)
    line = "removed 1,234 hidden units, 5 taps; 2,000 parameters became 1,000; outputs differ by 1e-07 at most; "
    assert str(done) == line + "1.46 times as fast as dense"


def dead_mlp():
    model = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight[:8] = 0
    return model


def test_measures_with_images():
    done = compact(dead_mlp(), torch.randn(5, 3))
    assert done.removed == {"hidden units": 8}
    assert 0 <= done.error < 1e-5
    assert done.speedup > 0
    assert "times as fast as dense" in str(done)


def test_modes_hooks_and_objects_stay():
    model = dead_mlp().train()
    model[1].eval()
    layers, calls = [*model], []
    handle = model.register_forward_hook(lambda *given: calls.append(1))
    compact(model)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(one is other for one, other in zip(model, layers, strict=True))
    model(torch.randn(1, 3))
    handle.remove()
    model(torch.randn(1, 3))
    assert calls == [1]
    network = made("slak").train()
    compact(network)
    assert all(module.training for module in network.modules())


def test_outputs_are_those_of_evaluation():
    model = nn.Sequential(nn.BatchNorm1d(3), dead_mlp(), nn.Dropout(0.5)).train()
    x = torch.randn(5, 3)
    before = copy.deepcopy(model).eval()(x).detach()
    assert compact(model, x).error < 1e-5
    assert model[0].num_batches_tracked == 0
    torch.testing.assert_close(model.eval()(x), before)


class Foldable(nn.Module):
    """Counts how often it is folded, and with what inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.folded = inner, []

    def reparameterize(self):
        self.folded.append([len(module.folded) for module in self.inner.modules() if isinstance(module, Foldable)])

    def forward(self, x):
        return self.inner(x)


def test_folds_from_outside_to_inside_once_each():
    inner = Foldable(nn.Identity())
    outer = Foldable(nn.Sequential(inner, nn.Sequential(inner)))
    compact(outer)
    assert (outer.folded, inner.folded) == ([[0]], [[]])


class Lies(nn.Linear):
    """Says that something is zero which is not."""

    def compact(self):
        self.weight = nn.Parameter(torch.zeros_like(self.weight))
        self.bias.data.add_(1)
        return {"lies": 2}


def test_modules_say_what_they_removed():
    assert compact(nn.Sequential(Lies(2, 2), Lies(2, 2))).removed == {"lies": 4}


class Fails(nn.Module):
    def reparameterize(self):
        raise ValueError("it cannot be folded")

    def forward(self, x):
        return x


class Named(nn.Module):
    def forward(self, x):
        return {"y": [x, (x + float("nan"),)], "n": 3, "shape": torch.tensor(3)}


def test_outputs_of_any_form():
    done = compact(nn.Sequential(dead_mlp(), Named()), torch.randn(2, 3))
    assert done.removed == {"hidden units": 8}
    assert done.error < 1e-5


BAD = {
    "no module": (lambda: [nn.Linear(1, 1)], {}, TypeError, r"compact takes a torch.nn.Module, got list"),
    "no images": (dead_mlp, {"images": [1.0]}, TypeError, r"images must be a tensor .* got list"),
    "no number": (dead_mlp, {"multiple_of": 8.0}, TypeError, r"multiple_of must be a whole number, got float"),
    "true": (dead_mlp, {"multiple_of": True}, TypeError, r"multiple_of must be a whole number, got bool"),
    "zero": (dead_mlp, {"multiple_of": 0}, ValueError, r"multiple_of must be at least 1, got 0"),
    "none": (dead_mlp, {"images": torch.empty(0, 3)}, ValueError, r"images must be at least one, got \[0, 3\]"),
    "other images": (
        dead_mlp,
        {"images": torch.ones(1, 4)},
        ValueError,
        r"does not take images \[1, 4\] of torch.float",
    ),
    "no values": (lambda: nn.Linear(2, 2, device="meta"), {}, ValueError, r"must have values, but weight has none"),
    "lazy": (lambda: nn.LazyLinear(2), {}, ValueError, r"must have values, but weight has none"),
    "not to be folded": (lambda: nn.Sequential(dead_mlp(), Fails()), {}, ValueError, r"it cannot be folded"),
    "lies": (
        lambda: nn.Sequential(dead_mlp(), Lies(2, 2)),
        {"images": torch.ones(1, 3)},
        ValueError,
        r"outputs differ by .* but rounding allows",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_where_it_fails_the_model_is_as_it_was(case):
    make, arguments, error, message = case
    model = make()
    module = model if isinstance(model, nn.Module) else model[0]
    values, layers = {**dict(module.named_parameters())}, [*module.modules()]
    known = not any(value.is_meta or nn.parameter.is_lazy(value) for value in values.values())
    before = copy.deepcopy(module.state_dict()) if known else None
    with pytest.raises(error, match=message):
        compact(model, **arguments)
    assert [*module.modules()] == layers
    assert all(one is other for one, other in zip(module.parameters(), values.values(), strict=True))
    assert all(each.training for each in layers)
    if known:
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
        linear = next(layer for layer in layers if isinstance(layer, nn.Linear))
        assert (linear.in_features, linear.out_features) == (linear.weight.shape[1], linear.weight.shape[0])


def test_a_network_of_ours_is_put_back_whole():
    network, x = dead_network("slak"), images("slak")
    network.stages[2].blocks[1].mix.small.norm.running_mean = None  # which cannot be folded
    network.stages[2].blocks[1].mix.small.norm.running_var = None
    before, state = network(x), copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="without running statistics"):
        compact(network)
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(network(x), before, rtol=0, atol=0)
    assert network.stages[0].blocks[0].mix.merged is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype):
    network, x = dead_network("slak").to(dtype), images("slak", dtype)
    done = compact(network, x)
    assert done.removed["hidden units"] > 0
    assert all(value.dtype is dtype for value in network.parameters())


def test_exports_and_compiles():
    network, x = dead_network("slak"), images("slak")
    compact(network)
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), network(x))
