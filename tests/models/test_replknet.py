"""RepLKNet against numbers of the authors' own code, folded and not, and the protocols that it answers to."""

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import reparameterize_model
from torch import nn

from shiftconv.analysis.count import count
from shiftconv.models import create_model, list_models
from shiftconv.models.replknet import replknet
from shiftconv.nn.large_kernel import DepthwiseBranch

GOLDEN = json.loads((Path(__file__).parent / "golden" / "replknet.json").read_text())
SMALL = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_sizes=(13, 11, 9, 7))


def _normal(key, *shape):
    """The numbers n(key) that conftest.py's weights stand on."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape))


def _small(**arguments):
    return replknet(**SMALL | dict(num_classes=10) | arguments)


def _trained(model):
    """In float64, with statistics near those of a batch, and norms that multiply by numbers of either sign."""
    norms = {name: m for name, m in model.double().named_modules() if isinstance(m, nn.BatchNorm2d)}
    with torch.no_grad():
        for name, norm in norms.items():
            norm.momentum = 1.0
            norm.weight.copy_(1 + 0.3 * _normal(f"{name}.weight", norm.num_features))
            norm.weight.mul_(_normal(f"{name}.sign", norm.num_features).sign())
            norm.bias.copy_(0.3 * _normal(f"{name}.bias", norm.num_features))
        model.train().forward_intermediates(_normal("batch", 4, 3, 128, 96))
        model(_normal("batch", 4, 3, 128, 96))
        for name, norm in norms.items():
            norm.running_mean.add_(0.1 * _normal(f"{name}.mean", norm.num_features))
            norm.running_var.mul_(0.5 + _normal(f"{name}.var", norm.num_features).abs())
    return model.eval()


@pytest.fixture(params=GOLDEN["cases"])
def case(request):
    return request.param, GOLDEN["cases"][request.param]


def _close(got, expected, rtol=1e-10):
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < rtol, f"relative error {error:.1e}"


def test_evaluation_equals_the_authors(case, fill):
    name, golden = case
    model = fill(replknet(**golden["args"], num_classes=10).double()).eval()
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    x = _normal(f"input:{name}", 3, 3, 97, 75)
    logits = torch.tensor(golden["logits"], dtype=torch.float64).view(3, 10)
    _close(model(x), logits)
    model.reparameterize()
    _close(model(x), logits)


def test_training_equals_the_authors(case, fill):
    name, golden = case
    model = fill(replknet(**golden["args"], num_classes=10).double()).train()
    logits = model(_normal(f"input:{name}", 3, 3, 97, 75))
    F.cross_entropy(logits, torch.tensor(GOLDEN["labels"])).backward()
    _close(logits, torch.tensor(golden["train_logits"], dtype=torch.float64).view(3, 10))
    parameters = dict(model.named_parameters())
    assert parameters.keys() == golden["gradients"].keys()
    for key, expected in golden["gradients"].items():
        got = (parameters[key].grad * _normal(f"probe:{key}", *parameters[key].shape)).sum().item()
        assert got == pytest.approx(expected, rel=1e-8, abs=1e-10), key
    for key, expected in golden["running_var"].items():
        assert model.state_dict()[key].sum().item() == pytest.approx(expected, rel=1e-10), key


def test_normalised_features_equal_the_authors(case, fill):
    name, golden = case
    model = fill(replknet(**golden["args"], feature_norm=True, num_classes=0).double()).eval()
    maps = model.forward_intermediates(_normal(f"input:{name}", 3, 3, 97, 75), intermediates_only=True)
    for i, (y, (*shape, norm, product)) in enumerate(zip(maps, golden["features"], strict=True)):
        assert [*y.shape] == shape
        assert y.norm().item() == pytest.approx(norm, rel=1e-10)
        assert (y * _normal(f"probe:feature{i}", *shape)).sum().item() == pytest.approx(product, rel=1e-8)


@pytest.mark.parametrize(
    ("name", "parameters", "folded", "macs"),
    [
        ("replknet_31b", 79_864_168, 79_388_776, 15_431_298_048),  # the first as in the authors' code
        ("replknet_31l", 172_671_016, 171_957_928, 32_780_739_072),
        ("replknet_xl", 335_435_752, 335_110_632, 63_078_899_712),
    ],
)
def test_costs(name, parameters, folded, macs):
    with torch.device("meta"):
        model = create_model(name)
    cost = count(model)
    assert (cost.parameters, cost.macs) == (parameters, macs)
    model.reparameterize()
    assert sum(p.numel() for p in model.parameters()) == folded


@pytest.mark.parametrize(("name", "width"), [("replknet_31b", 128), ("replknet_31l", 192), ("replknet_xl", 256)])
def test_is_in_timms_registry(name, width):
    assert name in list_models() and timm.is_model(name)
    with torch.device("meta"):
        model, features = timm.create_model(name), timm.create_model(name, features_only=True)
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 3
    assert model.get_submodule(model.default_cfg["classifier"]).out_features == 1000
    maps = features(torch.empty(1, 3, 224, 224, device="meta"))
    channels, reduction = features.feature_info.channels(), features.feature_info.reduction()
    assert [y.shape[1:] for y in maps] == [(c, 224 // r, 224 // r) for c, r in zip(channels, reduction, strict=True)]
    assert reduction == [4, 8, 16, 32] and channels == [width, 2 * width, 4 * width, 8 * width]


@pytest.mark.parametrize("small_kernel_size", [5, 0])
@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", "catavgmax"])
def test_folded_gives_the_same(small_kernel_size, global_pool):
    model = _trained(_small(small_kernel_size=small_kernel_size, dw_ratio=1.5, global_pool=global_pool))
    x = _normal("x", 2, 3, 97, 75)
    expected = model(x)
    model.reparameterize()
    _close(model(x), expected)
    assert expected.std(0).mean() > 0.01  # or else no error would be seen
    left = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == ([] if global_pool == "avg" else ["norm"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.reparameterize()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_folded_backbones_and_parts_give_the_same():
    x = _normal("x", 2, 3, 64, 64)
    model = _trained(_small(feature_norm=True, num_classes=0, global_pool=""))
    (last, maps), y = model.forward_intermediates(x), model(x)
    model.reparameterize()
    again, folded = model.forward_intermediates(x)
    for a, b in zip([last, y, *maps], [again, model(x), *folded], strict=True):
        _close(b, a)
    whole = _trained(_small())
    _close(reparameterize_model(whole)(x), whole(x))


@pytest.mark.parametrize("size", [(32, 32), (33, 63), (35, 70)])
@pytest.mark.parametrize("in_chans", [1, 4])
def test_features_are_those_of_the_network(size, in_chans):
    arguments = dict(width=0.07, in_chans=in_chans)
    model = create_model("replknet_31b", **arguments).eval()
    features = create_model("replknet_31b", features_only=True, out_indices=(0, 2), **arguments).eval()
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    assert not features.load_state_dict(weights, strict=False).missing_keys
    assert features.feature_info.channels() == [8, 35]
    stages, x = [], torch.randn(2, in_chans, *size)
    for i in (0, 2):
        model.stages[i].blocks.register_forward_hook(lambda _, __, y: stages.append(y))
    with torch.no_grad():
        assert model(x).shape == (2, 1000)
        got = features(x)
    assert all(torch.equal(a, b) for a, b in zip(got, stages, strict=True))
    assert [y.shape[2:] for y in got] == [tuple(-(-n // r) for n in size) for r in (4, 16)]


def test_pruned_to_its_first_stages():
    model = _small(feature_norm=True).eval()
    x = torch.randn(1, 3, 40, 40)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1], prune_head=True) == [1]
    assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], expected[0])
    assert len(model.stages) == 2 and len(model.feature_norms) == 2 and model(x).shape == (1, 16, 5, 5)


def test_head():
    model = _trained(_small(num_classes=7))
    x = _normal("x", 2, 3, 40, 70)
    maps = model.forward_features(x)
    vector = model.forward_head(maps, pre_logits=True)
    assert maps.shape == (2, 32, 2, 3) and maps.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(vector, model.norm(maps).mean((2, 3)))
    assert torch.equal(model(x), model.get_classifier()(vector)) and model(x).shape == (2, 7)
    last, _ = model.forward_intermediates(x)
    assert torch.equal(model.forward_head(last), model(x))
    model.reset_classifier(3, global_pool="catavgmax")
    assert model.forward_head(maps).shape == (2, 3)
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model.forward_head(maps), model.norm(maps))


def test_starts_as_torch_starts():
    model = _small(depths=(1, 1, 1, 1), dims=(64, 64, 64, 64), num_classes=100)
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | DepthwiseBranch)]
    assert len(kernels) == 4 + 3 * 2 + 4 * 6 + 1
    for weight in kernels:
        bound = weight[0].numel() ** -0.5  # of Kaiming's uniform numbers with a = sqrt(5)
        assert 0.95 * bound < weight.abs().max() <= bound
    assert model.linear.bias.any()
    scaled = _small(num_classes=100, head_init_scale=1e-3)
    for _ in range(2):
        assert 0.95e-3 < scaled.linear.weight.abs().max() * 32**0.5 <= 1e-3
        scaled.reset_classifier(100)


def test_both_blocks_of_a_pair_have_one_drop_path_rate():
    model = _small(depths=(1, 2, 2, 1), drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5])
    plain, x = _small(depths=(1, 2, 2, 1)), torch.randn(4, 3, 64, 64)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model.eval()(x))
        assert not torch.equal(plain.train()(x), model.train()(x))


def test_gradients_reach_every_parameter():
    model = _small().train()
    F.cross_entropy(model(torch.randn(3, 3, 96, 96)), torch.tensor([1, 2, 3])).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_checkpointing_changes_nothing_but_memory():
    plain = _small().double().train()
    thrifty = copy.deepcopy(plain)
    thrifty.set_grad_checkpointing()
    for model in (plain, thrifty):
        F.cross_entropy(model(_normal("x", 2, 3, 64, 64)), torch.tensor([1, 2])).backward()
    for a, b in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for (key, a), b in zip(plain.state_dict().items(), thrifty.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.slow
def test_compiles_as_one_graph():
    plain = _small().train()
    model, x = copy.deepcopy(plain), torch.randn(2, 3, 64, 64)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    plain(x).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("replknet_31b", dict(kernel_sizes=31), TypeError, "kernel_sizes must be a sequence of 4, .* got 31"),
        ("replknet_31b", dict(kernel_sizes=(31, 29)), ValueError, "kernel_sizes must have one entry .* 4 stages"),
        ("replknet_31b", dict(kernel_sizes=(31, 29, 27, 0)), ValueError, "kernel_size must be at least 1, got 0"),
        ("replknet_31b", dict(small_kernel_size=-1), ValueError, "small_kernel_size must be at least 1, got -1"),
        ("replknet_31b", dict(small_kernel_size=2.5), TypeError, "small_kernel_size must be a whole number, got 2.5"),
        ("replknet_31l", dict(width=0), ValueError, "width must be above 0 and finite, got 0"),
        ("replknet_31l", dict(width=0.001), ValueError, "width=0.001 leaves no channel in a stage of 192"),
        ("replknet_31l", dict(dw_ratio="2"), TypeError, "dw_ratio must be a number, got '2'"),
        (
            "replknet_31l",
            dict(width=0.1, dw_ratio=0.01),
            ValueError,
            "dw_ratio=0.01 leaves no channel in a stage of 19",
        ),
        ("replknet_31l", dict(drop_path_rate=1), ValueError, r"drop_path_rate must be in \[0, 1\), got 1"),
        ("replknet_xl", dict(layer_scale=1.0), TypeError, "replknet_xl has no argument 'layer_scale'"),
        ("replknet_xl", dict(dw_ratio=2), TypeError, "replknet_xl has no argument 'dw_ratio'"),
        ("replknet_xl", dict(in_chans=0), ValueError, "in_chans must be at least 1, got 0"),
        ("replknet_31b", dict(pretrained=True), RuntimeError, "No pretrained weights exist for replknet_31b"),
    ],
)
def test_bad_arguments(name, arguments, error, match):
    with torch.device("meta"), pytest.raises(error, match=match):
        create_model(name, **arguments)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\], got \["):
        _small()(torch.zeros(shape))


@pytest.mark.parametrize("name", ["replknet_31b", "slak_tiny"])
def test_head_init_scale_counts_once(name):
    heads = []
    for scale in (1.0, 0.5):
        torch.manual_seed(0)
        heads.append(create_model(name, width=0.1, head_init_scale=scale).linear.weight)
    torch.testing.assert_close(heads[1], 0.5 * heads[0], rtol=0, atol=0)
