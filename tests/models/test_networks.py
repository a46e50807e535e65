"""What the networks of the shift papers have in common: timm's protocols, costs, options, and errors."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from shiftconv.analysis.count import count
from shiftconv.models import create_model, list_models
from shiftconv.nn.learned_shift import LearnedShift

IMAGENET = ["asresnet_w32", "asresnet_w50", "asresnet_w68", "fenet_100", "fenet_137", "shiftnet_a", "shiftnet_b"]
SMALL = {  # the cheapest of each family
    "asresnet20": dict(expansion=0.5, width=4),
    "asresnet_w32": {},
    "fenet_100": {},
    "shiftnet_b": {},
}
CHANNELS = {
    "asresnet20": [4, 8, 16],
    "asresnet_w32": [32, 32, 64, 128, 256],
    "fenet_100": [16, 32, 64, 128, 256],
    "shiftnet_b": [16, 32, 64, 128, 256],
}


def _images(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _small(name, **arguments):
    return create_model(name, **SMALL[name], **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "parameters", "macs"),
    [
        ("asresnet_w32", {}, 901_256, 166_840_320),
        ("asresnet_w50", {}, 1_962_950, 397_574_400),
        ("asresnet_w68", {}, 3_424_460, 726_866_688),
        ("asresnet20", {}, 35_386, 5_948_032),
        ("asresnet20", dict(expansion=3), 97_466, 16_433_792),
        ("asresnet20", dict(expansion=6), 190_586, 32_162_432),
        ("asresnet20", dict(expansion=9), 283_706, 47_891_072),
        ("asresnet20", dict(width=46), 275_596, 46_776_112),
        ("asresnet20", dict(width=88), 992_914, 168_963_520),
        ("shiftnet_a", {}, 4_188_680, 1_424_306_176),
        ("shiftnet_b", {}, 1_183_480, 370_956_288),
        ("fenet_100", {}, 4_229_648, 307_152_608),
        ("fenet_137", {}, 6_002_486, 563_699_360),
        ("fenet_100", dict(expand="output"), 4_623_408, 417_941_216),  # as the released code has it
        ("fenet_137", dict(expand="output"), 6_745_470, 773_159_072),
    ],
)
def test_costs(name, arguments, parameters, macs):
    """The published figures, where there are such; the rest keeps what was counted once."""
    with torch.device("meta"):
        cost = count(create_model(name, **arguments))
    assert (cost.parameters, cost.macs) == (parameters, macs)


@pytest.mark.parametrize("name", [*IMAGENET, "asresnet20"])
def test_every_network_is_in_timms_registry(name):
    assert name in list_models() and timm.is_model(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    size, classes, strides = (224, 1000, [2, 4, 8, 16, 32]) if name in IMAGENET else (32, 10, [1, 2, 4])
    assert model.default_cfg["architecture"] == name and model.default_cfg["input_size"] == (3, size, size)
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 3
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, classes)
    with torch.device("meta"):
        features = timm.create_model(name, features_only=True)
    maps = features(torch.empty(1, 3, size, size, device="meta"))
    assert features.feature_info.reduction() == strides
    assert [y.shape[1:] for y in maps] == [
        (c, size // r, size // r) for c, r in zip(features.feature_info.channels(), strides, strict=True)
    ]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(32, 32), (33, 63), (31, 70)])
def test_features_are_those_of_the_network(name, size):
    model = _small(name, in_chans=2).eval()
    features = _small(name, in_chans=2, features_only=True).eval()
    weights = {key: value for key, value in model.state_dict().items() if key in features.state_dict()}
    features.load_state_dict(weights)
    assert features.feature_info.channels() == CHANNELS[name]
    stages, x = [], _images(2, 2, *size)
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda _, __, y: stages.append(y))
    with torch.no_grad():
        model(x)
        got = features(x)
    assert all(torch.equal(a, b) for a, b in zip(got, stages, strict=True))
    for y, reduction in zip(got, features.feature_info.reduction(), strict=True):
        if name == "fenet_100":  # its averages leave out a last row that has no partner
            assert [*y.shape[2:]] == [(n + 1) // 2 * 2 // reduction for n in size]
        else:
            assert [*y.shape[2:]] == [-(-n // reduction) for n in size]


@pytest.mark.parametrize("name", ["asresnet20", "asresnet_w32", "shiftnet_b"])
def test_the_smallest_images(name):
    features = _small(name, features_only=True).eval()
    assert [y.shape[2:] for y in features(_images(1, 3, 1, 2))][-1] == (1, 1)
    assert _small(name).eval()(_images(1, 3, 1, 2)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_head(name):
    model = _small(name, num_classes=7).eval()
    x = _images(2, 3, 40, 33)
    maps = model.forward_features(x)
    vector = model.forward_head(maps, pre_logits=True)
    assert maps.shape[1] == model.num_features and torch.allclose(vector, maps.mean((2, 3)), atol=1e-5)
    assert maps.min() == 0  # the last layer is a ReLU
    assert torch.equal(model(x), model.get_classifier()(vector)) and model(x).shape == (2, 7)
    model.reset_classifier(3, global_pool="catavgmax")
    assert model.linear.in_features == model.head_hidden_size == 2 * model.num_features
    assert model.forward_head(maps).shape == (2, 3)
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model.forward_head(maps), maps)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter(name):
    model = _small(name, drop_rate=0.0).train()
    F.cross_entropy(model(_images(3, 3, 64, 64)), torch.tensor([1, 2, 3])).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_offsets_have_no_weight_decay(name):
    model = _small(name)
    offsets = {f"{key}.offset" for key, m in model.named_modules() if isinstance(m, LearnedShift)}
    assert model.no_weight_decay() == offsets and bool(offsets) == (name != "shiftnet_b")
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.01)
    names = {id(p): key for key, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {key for key, p in model.named_parameters() if p.ndim > 1} - offsets


@pytest.mark.parametrize(("name", "blocks"), [("asresnet20", 9), ("asresnet_w32", 17), ("fenet_100", 7)])
def test_layer_decay_knows_the_order_of_the_layers(name, blocks):
    model = _small(name)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert {*scales.values()} == {0.5**i for i in range(blocks + 2)}  # head, blocks, stem
    assert scales["conv1.weight"] == min(scales.values())
    assert {scales[key] for key in scales if not key.startswith(("layer", "conv1", "bn1"))} == {1}


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_has_weights_and_statistics_only(name):
    kinds = {key.rpartition(".")[2] for key in _small(name).state_dict()}
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert kinds == {"weight", "bias", *statistics} | (set() if name == "shiftnet_b" else {"offset"})
    roots = {key.partition(".")[0].rstrip("12345") for key in _small(name).state_dict()}
    assert roots == {"conv", "layer", "linear", *(["bn"] if name == "fenet_100" else ["norm"])}


@pytest.mark.parametrize("name", ["asresnet20", "fenet_100"])
def test_checkpointing_changes_nothing_but_memory(name):
    plain = _small(name, drop_rate=0.0).double().train()
    thrifty = copy.deepcopy(plain)
    thrifty.set_grad_checkpointing()
    for model in (plain, thrifty):
        logits = model(_images(2, 3, 64, 64, dtype=torch.float64))
        F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    for a, b in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for (key, a), b in zip(plain.state_dict().items(), thrifty.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", SMALL)
def test_stochastic_depth_is_for_training_only(name):
    plain, model = _small(name, drop_rate=0.0), _small(name, drop_rate=0.0, drop_path_rate=0.5)
    model.load_state_dict(plain.state_dict())
    drops = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert drops == sorted(drops) and max(drops) == pytest.approx(0.5)
    x = _images(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model.eval()(x))
        assert not torch.equal(model.train()(x), plain.train()(x))


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_goes_through(name):
    model = _small(name).eval().to(memory_format=torch.channels_last)
    x = _images(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_compiles_as_one_graph(name):
    plain = _small(name, drop_rate=0.0).train()
    model = copy.deepcopy(plain)
    x = _images(2, 3, 64, 64)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    plain(x).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("asresnet_w32", dict(width=3), TypeError, "asresnet_w32 has no argument 'width'"),
        ("asresnet_w32", dict(expansion=3), TypeError, "asresnet_w32 has no argument 'expansion'. It takes: "),
        ("asresnet20", dict(expansoin=3), TypeError, "asresnet20 .* 'expansoin'; did you mean 'expansion'"),
        ("asresnet20", dict(expansion=0), ValueError, "expansion must be above 0 and finite, got 0"),
        ("asresnet20", dict(expansion="3"), TypeError, "expansion must be a number, got '3'"),
        ("asresnet20", dict(expansion=0.06), ValueError, "expansion=0.06 leaves no channel inside a block of 16"),
        ("asresnet20", dict(width=0), ValueError, "width must be at least 1, got 0"),
        ("asresnet20", dict(width=1.5), TypeError, "width must be a whole number, got 1.5"),
        ("asresnet20", dict(in_chans=0), ValueError, "in_chans must be at least 1, got 0"),
        ("shiftnet_a", dict(stem=3), TypeError, "shiftnet_a has no argument 'stem'"),
        ("shiftnet_a", dict(drop_path_rate=2), ValueError, r"drop_path_rate must be in \[0, 1\), got 2"),
        ("shiftnet_b", dict(global_pool="agv"), ValueError, "unknown global_pool 'agv'; did you mean 'avg'"),
        ("fenet_100", dict(width=2), TypeError, "fenet_100 has no argument 'width'"),
        ("fenet_100", dict(expand="inptu"), ValueError, "unknown expand 'inptu'; did you mean 'input'"),
        ("fenet_137", dict(num_classes=-1), ValueError, "num_classes must be at least 0, got -1"),
        ("fenet_137", dict(pretrained=True), RuntimeError, "No pretrained weights exist for fenet_137"),
    ],
)
def test_bad_arguments(name, arguments, error, match):
    with pytest.raises(error, match=match):
        create_model(name, **arguments)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3)])
def test_bad_images(name, shape):
    with torch.device("meta"), pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\], got \["):
        _small(name)(torch.zeros(shape))
