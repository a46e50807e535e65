"""What the networks do beyond the numbers of the originals: timm's protocols, options, and errors."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import load_checkpoint, reparameterize_model
from timm.optim import param_groups_layer_decay
from torch import nn

from shiftconv.models import create_model, list_models
from shiftconv.models.shiftresnet import DEPTHS, FAMILIES, CifarNet
from shiftconv.models.shiftresnet_blocks import DepthwiseBlock, ShiftBlock

SMALL = [f"{family}20" for family in FAMILIES]


def _images(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _params(name, **arguments):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **arguments).parameters())


def test_every_network_is_in_timms_registry():
    names = [f"{family}{depth}" for family in FAMILIES for depth in DEPTHS]
    assert set(names) <= set(list_models()) and set(names) <= set(timm.list_models())
    assert list_models("shiftresnet*") == [f"shiftresnet{depth}" for depth in DEPTHS]
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        main = [m for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in path]
        convs = {"resnet": 2, "shiftresnet": 2, "depthwiseresnet": 3, "shuffleresnet": 3, "mobileresnet": 4}
        family, depth = name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
        assert len(main) == 1 + (depth - 2) // 2 * convs[family]
        assert model.default_cfg["input_size"] == (3, 32, 32) and model.default_cfg["architecture"] == name


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [
        ("shiftresnet20", "expansion", {1: 34906, 3: 95642, 6: 186746, 9: 277850}),
        ("shiftresnet56", "expansion", {1: 102106, 3: 294554, 6: 583226, 9: 871898}),
        ("shiftresnet110", "expansion", {1: 202906, 3: 592922, 6: 1177946, 9: 1762970}),
        ("depthwiseresnet20", "reduction", {1.12: 34735, 0.38: 93956, 0.19: 183374, 0.125: 277050}),
        ("depthwiseresnet56", "reduction", {1.12: 101017, 0.37: 294283, 0.19: 569270, 0.124: 871085}),
        ("depthwiseresnet110", "reduction", {1.1: 204316, 0.37: 591580, 0.19: 1148114, 0.123: 1772518}),
    ],
)
def test_parameters_of_the_published_tables(name, argument, expected):
    assert {value: _params(name, **{argument: value}) for value in expected} == expected


def test_parameters_of_the_reduced_resnets():
    expected = {20: {7.2: 38030, 2.8: 96206, 1.5: 179936, 0.98: 275648}, 56: {7.6: 112118}, 110: {7.8: 223250}}
    for depth, row in expected.items():
        got = {r: _params(f"resnet{depth}", reduction=r, reduction_mode="block") for r in row}
        assert got == row
    early = {(20, 2.8): 107694, (20, 7.2): 49518, (56, 2.9): 341814, (110, 7.8): 318738}  # the first checkpoints
    for depth, r in early:
        got = _params(f"resnet{depth}", reduction=r, reduction_mode="block", project_shortcuts=True)
        assert got == early[depth, r]


@pytest.mark.parametrize("name", [name for name in SMALL if name != "mobileresnet20"])
def test_project_shortcuts_adds_one_to_every_block(name):
    narrow = dict(reduction=2, reduction_mode="block") if name == "resnet20" else {}
    model = create_model(name, project_shortcuts=True, **narrow)
    keys = {key for key in model.state_dict() if key.endswith("shortcut.0.weight")}
    assert keys == {f"layer{i}.{j}.shortcut.0.weight" for i in (1, 2, 3) for j in range(3)}
    assert model(_images(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (7, 2), (63, 40)])
def test_features_are_those_of_the_network(name, size):
    model = create_model(name, in_chans=2).eval()
    features = create_model(name, in_chans=2, features_only=True).eval()
    features.load_state_dict({key: v for key, v in model.state_dict().items() if not key.startswith("linear")})
    assert features.feature_info.channels() == [16, 32, 64] and features.feature_info.reduction() == [1, 2, 4]
    stages, x = [], _images(2, 2, *size)
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _, __, y: stages.append(y))
    with torch.no_grad():
        model(x)
        got = features(x)
    assert [y.shape[1:] for y in got] == [
        (c, -(-size[0] // r), -(-size[1] // r)) for c, r in ((16, 1), (32, 2), (64, 4))
    ]
    assert all(torch.equal(a, b) for a, b in zip(got, stages, strict=True))


def test_some_features():
    features = create_model("resnet20", reduction=2.8, features_only=True, out_indices=(0, 2))
    assert features.feature_info.channels() == [9, 38]
    assert [tuple(y.shape) for y in features(_images(1, 3, 16, 16))] == [(1, 9, 16, 16), (1, 38, 4, 4)]


def test_head():
    model = create_model("shiftresnet20", num_classes=7).eval()
    x = _images(2, 3, 40, 24)
    maps = model.forward_features(x)
    vector = model.forward_head(maps, pre_logits=True)
    assert maps.shape == (2, 64, 10, 6) and torch.allclose(vector, maps.mean((2, 3)), atol=1e-6)
    assert torch.equal(model(x), model.get_classifier()(vector))
    assert model.get_submodule(model.get_classifier(name_only=True)) is model.linear
    model.reset_classifier(3, global_pool="catavgmax")
    assert model(x).shape == (2, 3) and model.num_classes == 3 and model.head_hidden_size == 128
    assert not any(m.training for m in model.modules())
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(x), maps)
    bare = create_model("shiftresnet20", num_classes=0, global_pool="max")
    assert bare(x).shape == (2, 64) and isinstance(bare.get_classifier(), nn.Identity)


def test_a_new_head_keeps_modes_and_dtype():
    model = create_model("resnet20").double()
    model.bn1.eval()
    model.reset_classifier(5)
    assert model.training and model.linear.training and not model.bn1.training
    assert model(_images(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ["shiftresnet20", "resnet20"])
def test_checkpointing_changes_nothing_but_memory(name, fill, images):
    plain = fill(create_model(name).double()).train()
    thrifty = copy.deepcopy(plain)
    thrifty.set_grad_checkpointing()
    for model in (plain, thrifty):
        F.cross_entropy(model(images("checkpointing")), torch.tensor([1, 2, 3])).backward()
    for a, b in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for (key, a), b in zip(plain.state_dict().items(), thrifty.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    saved = [_saved_bytes(model, images("checkpointing")) for model in (plain, thrifty)]
    assert saved[1] < 0.5 * saved[0]


def _saved_bytes(model, x):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return total


def test_stochastic_depth_is_for_training_only():
    plain, model = create_model("shiftresnet20"), create_model("shiftresnet20", drop_path_rate=0.5)
    model.load_state_dict(plain.state_dict())
    first, *others = (*model.layer1, *model.layer2, *model.layer3)
    assert isinstance(first.drop_path, nn.Identity)
    assert [block.drop_path.drop_prob for block in others] == pytest.approx([i / 16 for i in range(1, 9)])
    x = _images(4, 3, 16, 16)
    assert torch.equal(plain.eval()(x), model.eval()(x))
    with torch.no_grad():
        assert not torch.equal(model.train()(x), plain.train()(x))


def test_dropout_is_before_the_classifier():
    model = create_model("shiftresnet20", drop_rate=0.5).train()
    vector = model.forward_head(torch.ones(2, 64, 2, 2), pre_logits=True)
    assert set(vector.unique().tolist()) == {0.0, 2.0}
    assert model.eval().forward_head(torch.ones(2, 64, 2, 2), pre_logits=True).eq(1).all()


def test_depthwise_without_skip():
    model = create_model("depthwiseresnet20", skip=False)
    assert not any("shortcut" in key for key in model.state_dict())
    with pytest.raises(ValueError, match="skip=False leaves out"):
        create_model("depthwiseresnet20", skip=False, drop_path_rate=0.1)


def test_blocks_by_themselves():
    x = _images(1, 8, 7, 5)
    assert ShiftBlock(8, 12, 2, expansion=2.5)(x).shape == (1, 12, 4, 3)
    assert ShiftBlock(8, 12, 1, expansion=2.5).shift2.channels == 30
    assert DepthwiseBlock(8, 8, 1, reduction=0.3).depth.weight.shape == (26, 1, 3, 3)


def test_widths_round_as_the_originals_do():
    """int(1 / r * out), not int(out / r): 1 / 49 * 49 is below 1, and 49 / 49 is not."""
    with pytest.raises(ValueError, match="no channel inside a block of 49"):
        DepthwiseBlock(8, 49, 1, reduction=49)
    assert DepthwiseBlock(8, 50, 1, reduction=50).depth.in_channels == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_as_one_graph(checkpointing):
    plain = create_model("shiftresnet20").train()
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing(checkpointing)
    x = _images(2, 3, 16, 16)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    plain(x).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for (key, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_channels_last_goes_through():
    model = create_model("shiftresnet20").eval().to(memory_format=torch.channels_last)
    x = _images(2, 3, 16, 16).to(memory_format=torch.channels_last)
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)


def test_layer_decay_knows_the_order_of_the_layers():
    groups = param_groups_layer_decay(create_model("shiftresnet20"), layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 11  # stem, nine blocks, head


def test_round_trip_through_a_file(tmp_path):
    model, other = create_model("shiftresnet20"), create_model("shiftresnet20")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    load_checkpoint(other, str(tmp_path / "net.pth"))
    assert torch.equal(model.eval()(_images(1, 3, 8, 8)), other.eval()(_images(1, 3, 8, 8)))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("shiftresnet21", "unknown model 'shiftresnet21'; did you mean 'shiftresnet"),
        ("ShiftResNet20", "did you mean 'shiftresnet20'"),
        ("resnt50", "did you mean 'resnet50'"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_names(name, match):
    with pytest.raises(ValueError, match=match):
        create_model(name)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("shiftresnet20", dict(expansoin=3), TypeError, "shiftresnet20 .* 'expansoin'; did you mean 'expansion'"),
        ("shiftresnet20", dict(reduction=3), TypeError, r"'reduction' \(it belongs to resnet, depthwiseresnet"),
        ("resnet20", dict(expansion=3), TypeError, r"no argument 'expansion' \(it belongs to shiftresnet\)"),
        ("depthwiseresnet20", dict(reduction_mode="net"), TypeError, r"'reduction_mode' \(it belongs to resnet\)"),
        ("mobileresnet20", dict(drop_path_rate=0.1), TypeError, "no argument 'drop_path_rate'"),
        ("resnet20", dict(depth=32), TypeError, "no argument 'depth'"),
        ("shiftresnet20", dict(expansion=0), ValueError, "expansion must be above 0 and finite, got 0"),
        ("shiftresnet20", dict(expansion=float("nan")), ValueError, "expansion must be above 0 and finite, got nan"),
        ("shiftresnet20", dict(expansion="3"), TypeError, "expansion must be a number, got '3'"),
        ("shiftresnet20", dict(expansion=0.06), ValueError, "expansion=0.06 leaves no channel inside a block of 16"),
        ("resnet20", dict(reduction=-1), ValueError, "reduction must be above 0 and finite, got -1"),
        ("resnet20", dict(reduction=257), ValueError, "reduction=257 leaves no channel in the first stage of 16"),
        ("resnet20", dict(reduction=17, reduction_mode="block"), ValueError, "reduction=17 leaves no channel"),
        ("shuffleresnet20", dict(reduction=5), ValueError, "reduction=5 leaves no channel inside a block of 16"),
        ("resnet20", dict(reduction_mode="nets"), ValueError, "unknown reduction_mode 'nets'; did you mean 'net'"),
        ("resnet20", dict(global_pool="agv"), ValueError, "unknown global_pool 'agv'; did you mean 'avg'"),
        ("resnet20", dict(global_pool=""), ValueError, "which a classifier of 10 classes cannot take"),
        ("resnet20", dict(num_classes=-1), ValueError, "num_classes must be at least 0, got -1"),
        ("resnet20", dict(in_chans=0), ValueError, "in_chans must be at least 1, got 0"),
        ("resnet20", dict(drop_rate=1.5), ValueError, r"drop_rate must be in \[0, 1\), got 1.5"),
        ("resnet20", dict(pretrained=True), RuntimeError, "No pretrained weights exist for resnet20"),
    ],
)  # fmt: skip
def test_bad_arguments(name, arguments, error, match):
    with pytest.raises(error, match=match):
        create_model(name, **arguments)
    with pytest.raises(error, match=match):  # timm's own door is guarded as well
        timm.create_model(name, **arguments)


def test_bad_name_type():
    with pytest.raises(TypeError, match="must be a string, got 20"):
        create_model(20)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\], got \["):
        create_model("shiftresnet20")(torch.zeros(shape))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("project", [False, True])
def test_reparameterized_networks_give_the_same_outputs(family, project):
    arguments = {"project_shortcuts": True} if project and family != "mobileresnet" else {}
    net = settle(create_model(f"{family}20", **arguments))
    x = torch.randn(2, 3, 20, 20)
    expected = net(x)
    assert isinstance(net, CifarNet)
    net.reparameterize()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    net.reparameterize()  # a second time changes nothing
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_timm_reparameterizes_a_copy():
    net = settle(create_model("shiftresnet20", expansion=2))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(reparameterize_model(net)(x), net(x), rtol=1e-4, atol=1e-4)
    assert "layer1.0.bn2.weight" in net.state_dict()


def settle(net: nn.Module) -> nn.Module:
    """A network with statistics and weights that fold into something, in evaluation mode."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    assert tensor is not None
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    assert tensor is not None
                    tensor.normal_(0, 0.2)
    return net.eval()
