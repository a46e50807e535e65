"""What the networks with large kernels answer to: timm's protocols, torch's tools, odd images, and wrong arguments."""

import copy
import os
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models import reparameterize_model
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shiftconv.models import create_model, shiftwise, slak, unireplknet
from shiftconv.models.large_kernel_block import Block

DEPTHS, DIMS = (1, 1, 2, 1), (8, 16, 24, 32)
SIZES = (13, 11, 9, 7)
SMALL = {
    "slak": lambda **kw: slak.slak(DEPTHS, DIMS, SIZES, 3, width=1.0, **kw),
    "square": lambda **kw: slak.slak(DEPTHS, DIMS, SIZES, None, decomposed=False, width=1.0, **kw),
    "slak_split": lambda **kw: slak.slak_split(DEPTHS, DIMS, SIZES, 3, width=1.0, **kw),
    "slak_weighted": lambda **kw: slak.slak_weighted(DEPTHS, DIMS, SIZES, 3, width=1.0, **kw),
    "slak_shuffled": lambda **kw: slak.slak_shuffled(DEPTHS, DIMS, SIZES, 3, width=1.0, num_paths=2, **kw),
    "shiftwise_v1": lambda **kw: shiftwise.shiftwise(DEPTHS, DIMS, 1, SIZES, num_shifts=2, **kw),
    "shiftwise": lambda **kw: shiftwise.shiftwise(DEPTHS, DIMS, 2, SIZES, num_shifts=2, **kw),
    "unireplknet": lambda **kw: unireplknet.unireplknet(DEPTHS, DIMS, ((3,), (7,), (9, 3), (13,)), **kw),
}
MAIN = ("slak", "shiftwise", "unireplknet")
every_family = pytest.mark.parametrize("family", SMALL)
main_families = pytest.mark.parametrize("family", MAIN)


pytestmark = pytest.mark.usefixtures("one_thread")


def made(family, dtype=torch.float32, **kw):
    """A network in evaluation all of whose parameters and statistics matter, without moving torch's generator."""
    network = SMALL[family](**dict(num_classes=10, layer_scale=0.5) | kw).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if not value.is_floating_point() or "slots" in key:
                continue
            n = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            one = key.rpartition(".")[2] in ("weight", "gamma", "running_var") and value.ndim == 1
            scale = 0.2 if value.ndim < 2 else 1.0 / value[0].numel() ** 0.5
            value.copy_((one + scale * n).abs() if one else scale * n)
            if key.endswith("squeeze.fc1.bias"):  # of two hidden channels, or a few more, none shall be dead
                value.abs_().add_(1)
    return network.eval()


def images(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def settled(network, chans=3):
    """With running statistics near those of a batch, so that evaluation is no noise."""
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        network.train()(images(8, chans, 64, 64, dtype=next(network.parameters()).dtype, seed=3))
    return network.eval()


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# timm's protocols


@pytest.mark.parametrize("name", ["slak_tiny", "slak_weighted_tiny", "shiftwise_tiny", "unireplknet_n"])
def test_features_only_through_timm(name):
    dims = [124, 249, 499, 998] if name.startswith("slak") else [80, 160, 320, 640]
    with torch.device("meta"):
        whole = timm.create_model(name, features_only=True)
        some = timm.create_model(name, features_only=True, out_indices=(1, 3), feature_norm=True)
        last = create_model(name, features_only=True, out_indices=(-1,))
    assert whole.feature_info.channels() == dims
    assert whole.feature_info.reduction() == [4, 8, 16, 32]
    x = torch.empty(2, 3, 64, 96, device="meta")
    assert [[*y.shape] for y in whole(x)] == [[2, c, 16 >> i, 24 >> i] for i, c in enumerate(dims)]
    assert [y.shape[1] for y in some(x)] == some.feature_info.channels() == [dims[1], dims[3]]
    assert [y.shape[1] for y in last(x)] == last.feature_info.channels() == dims[-1:]
    assert some.feature_info.reduction() == [8, 32]


@every_family
def test_intermediate_maps_are_those_of_the_network(family):
    network = made(family)
    x, seen = images(2, 3, 50, 64), []
    for stage in network.stages:
        stage.blocks.register_forward_hook(lambda _, __, y: seen.append(y))
    with torch.no_grad():
        last = network.forward_features(x)
        stages = seen.copy()
        final, maps = network.forward_intermediates(x)
        assert all(torch.equal(a, b) for a, b in zip(maps, stages, strict=True))
        assert torch.equal(final, last) and torch.equal(last, stages[-1])
        assert torch.equal(network.forward_head(last), network(x))
        for indices, wanted in ((2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), (None, [0, 1, 2, 3])):
            got = network.forward_intermediates(x, indices, intermediates_only=True, stop_early=True)
            assert all(torch.equal(a, stages[i]) for a, i in zip(got, wanted, strict=True))
        del seen[:]
        network.forward_intermediates(x, [1], stop_early=True)
        assert len(seen) == 2


def test_feature_norm_normalises_channels():
    network = made("slak", feature_norm=True)
    plain = made("slak")
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("feature_norms.")})
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        maps = network.forward_intermediates(x, intermediates_only=True)
        bare = plain.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(network(x), plain(x))
    for norm, got, raw in zip(network.feature_norms, maps, bare, strict=True):
        y = F.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2], norm.weight, norm.bias, 1e-6)
        close(got, y.permute(0, 3, 1, 2), 1e-5)


@pytest.mark.parametrize("indices", [[0], [1], [0, 2], 1])
@pytest.mark.parametrize("head", [True, False])
def test_pruning_leaves_what_is_needed(indices, head):
    network = made("slak", feature_norm=True)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_intermediates(x, indices, intermediates_only=True)
        taken = network.prune_intermediate_layers(indices, prune_head=head)
        got = network.forward_intermediates(x, taken, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert len(network.stages) == max(taken) + 1
        assert network(x).shape == ((1, 10) if max(taken) == 3 and not head else network.forward_features(x).shape)


@every_family
def test_head(family):
    network = made(family, num_classes=7)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        maps = network.forward_features(x)
        vector = network.forward_head(maps, pre_logits=True)
        pooled = F.layer_norm(maps.mean((2, 3)), (32,), network.norm.weight, network.norm.bias, 1e-6)
        close(vector, pooled, 1e-5)
        assert torch.equal(network(x), network.get_classifier()(vector))
        assert network.get_classifier() is network.get_submodule(network.get_classifier(name_only=True))
        assert network(x).shape == (2, 7)
        network.reset_classifier(3)
        assert network(x).shape == (2, 3) and network.num_classes == 3
        network.reset_classifier(0)
        assert torch.equal(network(x), vector)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_pooling(pool):
    network = made("slak", num_classes=5 if pool else 0, global_pool=pool)
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        maps = network.forward_features(x)
        mean, peak = maps.mean((2, 3)), maps.amax((2, 3))
        parts = {"avg": [mean], "max": [peak], "avgmax": [(mean + peak) / 2], "catavgmax": [mean, peak]}.get(pool)
        got = network.forward_head(maps, pre_logits=True)
        assert network.head_hidden_size == (64 if pool == "catavgmax" else 32)
        if not pool:
            expected = F.layer_norm(maps.permute(0, 2, 3, 1), (32,), network.norm.weight, network.norm.bias, 1e-6)
            close(got, expected.permute(0, 3, 1, 2), 1e-5)
            assert torch.equal(network(x), got)
            return
        norm = network.norm
        close(got, torch.cat([F.layer_norm(part, (32,), norm.weight, norm.bias, 1e-6) for part in parts], 1), 1e-5)
        y = network(x)
        assert y.shape == (2, 5)
        network.reparameterize()
        close(network(x), y, 1e-4)


def test_a_new_classifier_is_drawn_as_the_first():
    network = made("slak", head_init_scale=0.5)
    network.reset_classifier(2000, "catavgmax")
    assert network.linear.weight.shape == (2000, 64) and not network.linear.bias.any()
    assert network.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)


@every_family
def test_layer_decay_knows_the_order_of_the_layers(family):
    network = made(family)
    names = {id(p): key for key, p in network.named_parameters()}
    groups = param_groups_layer_decay(network, layer_decay=0.5)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert {*scales.values()} >= {0.5**i for i in range(len(DEPTHS) + 2)} and len(scales) == len(names)
    assert scales["stem.0.weight"] == min(scales.values()) and scales["linear.weight"] == scales["norm.weight"] == 1
    order = ["stem.0.weight", *(f"stages.{i}.blocks.{j}.gamma" for i, d in enumerate(DEPTHS) for j in range(d))]
    rising = [scales[key] for key in order]  # blocks of a stage are alike, but of the third one each three
    assert rising == sorted(rising) and len({*rising}) == 1 + len(DEPTHS) + (DEPTHS[2] - 1) // 3
    spared = network.no_weight_decay()
    assert spared == {key for key in names.values() if key.endswith("coefficient")} <= {*names.values()}
    assert bool(spared) == (family == "slak_weighted")


# images


@every_family
@pytest.mark.parametrize("chans", [1, 4])
def test_other_numbers_of_input_channels(family, chans):
    network = made(family, in_chans=chans)
    assert network(images(2, chans, 40, 40)).shape == (2, 10)
    with pytest.raises(ValueError, match=rf"expected images \[N, {chans}, H, W\], got \[2, 3, 40, 40\]"):
        network(images(2, 3, 40, 40))


@every_family
def test_odd_sizes_folded_and_not(family):
    network = made(family, dtype=torch.float64)
    folded = copy.deepcopy(network)
    folded.reparameterize()
    with torch.no_grad():
        for height, width in ((32, 33), (37, 65), (63, 64), (35, 47)):
            x = images(2, 3, height, width, dtype=torch.float64)
            close(folded(x), network(x), 1e-10)
            assert network(x).isfinite().all()


@every_family
def test_every_size_gives_stages_as_convolutions_with_stride_do(family):
    network, padded = made(family), family in ("shiftwise", "unireplknet")
    for size in range(32, 66, 3):
        with torch.no_grad():
            maps = network.forward_intermediates(images(1, 3, size, 32), intermediates_only=True)
        sides, side = [], size
        for i in range(4):
            for _ in range(1 if i else 2):
                side = (side + padded) // 2
            sides.append(side)
        assert [y.shape[2] for y in maps] == sides


@pytest.mark.parametrize("shape", [(2, 4, 40, 40), (3, 40, 40), (2, 3, 40), (2, 3, 40, 40, 1)])
def test_images_of_another_shape_are_named(shape):
    network = made("slak")
    for call in (network, network.forward_features, network.forward_intermediates):
        with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\], got \["):
            call(torch.zeros(shape))


@every_family
def test_channels_last_and_strided_images_give_the_same(family):
    network = made(family)
    x = images(2, 3, 64, 48)
    spread = torch.zeros(2, 3, 64, 96)[..., ::2].copy_(x)
    with torch.no_grad():
        y = network(x)
        for other in (x.to(memory_format=torch.channels_last), spread, x.mT.contiguous().mT):
            assert torch.equal(network(other), y)
        close(copy.deepcopy(network).to(memory_format=torch.channels_last)(x), y, 1e-5)
        assert network.forward_features(x).is_contiguous(memory_format=torch.channels_last)
        assert network(x[:0]).shape == (0, 10)


@every_family
def test_images_of_a_batch_are_apart(family):
    network = made(family, dtype=torch.float64)
    x = images(3, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        close(torch.cat([network(image[None]) for image in x]), network(x), 1e-12)


# torch's tools


@every_family
def test_gradients_reach_every_parameter(family):
    network = made(family, dtype=torch.float64).train()
    network(images(3, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    zero = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not zero
    assert all(p.grad.isfinite().all() for p in network.parameters())


@every_family
def test_autocast_is_close(family):
    network = settled(made(family))
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        y = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x)
    assert half.dtype is torch.bfloat16
    assert (half.float() - y).norm() < 0.05 * y.norm()
    with torch.autocast("cpu", torch.bfloat16):
        loss = network.train()(x).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype is torch.float32 for p in network.parameters())


@main_families
def test_half_networks_are_close(family):
    network = settled(made(family))
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        y = network(x)
        for fold in (False, True):
            half = copy.deepcopy(network)
            if fold:
                half.reparameterize()
            got = half.bfloat16()(x.bfloat16())
            assert got.dtype is torch.bfloat16 and (got.float() - y).norm() < 0.1 * y.norm()


@main_families
def test_checkpointing_changes_nothing_but_memory(family):
    plain = made(family, dtype=torch.float64).train()
    thrifty = copy.deepcopy(plain)
    thrifty.set_grad_checkpointing()
    for network in (plain, thrifty):
        network(images(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key
    for (key, a), b in zip(plain.state_dict().items(), thrifty.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize(
    ("family", "backend"),
    [("slak", "eager"), ("shiftwise", "eager"), *(pytest.param(f, "aot_eager", marks=pytest.mark.slow) for f in SMALL)],
)
def test_compiles_as_one_graph(family, backend):
    plain = made(family).train()
    network, x = copy.deepcopy(plain), images(2, 3, 64, 64)
    torch.compile(network, fullgraph=True, backend=backend)(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), network.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm() + 1e-4, key
    plain.eval().reparameterize()
    with torch.no_grad():
        close(torch.compile(plain, fullgraph=True, backend="eager")(x), plain(x), 1e-4)


@every_family
def test_stochastic_depth_is_for_training_only(family):
    plain, deep = made(family), made(family, drop_path_rate=0.5)
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(x), deep(x))
        assert not torch.equal(plain.train()(x), deep.train()(x))


@every_family
def test_folding_by_us_and_by_timm(family):
    network = made(family, dtype=torch.float64)
    x = images(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        y = network(x)
        timms = reparameterize_model(network)
        assert torch.equal(network(x), y)  # a copy was folded
        ours = copy.deepcopy(network)
        ours.reparameterize()
        for folded in (timms, ours):
            close(folded(x), y, 1e-10)
            assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
            assert all(block.gamma is None for block in folded.modules() if isinstance(block, Block))
            folded.reparameterize()
            close(folded(x), y, 1e-10)
            assert folded.train()(x).shape == (2, 10)


def test_without_branch_norms_and_without_layer_scale():
    for family in ("slak", "slak_split", "slak_shuffled", "shiftwise", "shiftwise_v1"):
        network = made(family, dtype=torch.float64, branch_norm=False, layer_scale=0)
        assert not [key for key in network.state_dict() if "gamma" in key or ("mix." in key and "norm" in key)]
        x = images(2, 3, 48, 48, dtype=torch.float64)
        with torch.no_grad():
            y = network(x)
            network.reparameterize()
            close(network(x), y, 1e-10)


@every_family
def test_synchronised_norms_fold_too(family):
    network = made(family, dtype=torch.float64)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).eval()
    assert not [m for m in synced.modules() if type(m) is nn.BatchNorm2d]
    x = images(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        close(synced(x), network(x), 1e-12)
        synced.reparameterize()
        close(synced(x), network(x), 1e-10)
    assert not [m for m in synced.modules() if isinstance(m, nn.SyncBatchNorm)]


def _process(rank, port, path):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for family in MAIN:
            network = made(family, dtype=torch.float64, drop_path_rate=0.1).train()
            parallel = DistributedDataParallel(network)
            torch.manual_seed(rank)
            optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
            for _ in range(2):
                optimizer.zero_grad()
                parallel(images(2, 3, 48, 48, dtype=torch.float64, seed=rank)).square().sum().backward()
                optimizer.step()
            torch.save(network.state_dict(), f"{path}/{family}.{rank}")
    finally:
        dist.destroy_process_group()


def test_trains_on_two_processes(tmp_path):
    """No parameter is left without a gradient, no buffer changes where it should not: DDP would complain."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    for family in MAIN:
        first, second = (torch.load(tmp_path / f"{family}.{rank}") for rank in (0, 1))
        start = made(family, dtype=torch.float64).state_dict()
        for key, value in first.items():
            own = "running" in key
            assert own or torch.equal(value, second[key]), key
            if value.is_floating_point() and value.ndim > 1:
                assert not torch.equal(value, start[key]), key
