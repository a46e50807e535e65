"""State dicts of the authors' networks with large kernels: recognised, read, written, merged, or refused by name."""

import copy
import re

import pytest
import torch
from timm.models.convnext import ConvNeXt

from shiftconv.models import create_model, shiftwise, slak, unireplknet
from shiftconv.models.convert import convert, identify, load_checkpoint
from shiftconv.models.convert.layouts import LAYOUTS, layout_of
from shiftconv.models.convert.merged import merge, unmerge
from shiftconv.models.convert.translate import family_of, recognise, to_ours, to_theirs

DEPTHS, DIMS, SIZES = (1, 1, 2, 1), (8, 16, 24, 32), (13, 11, 9, 7)
MINI = {
    "convnext": lambda **kw: ConvNeXt(depths=DEPTHS, dims=DIMS, **kw),
    "slak": lambda **kw: slak.slak(DEPTHS, DIMS, SIZES, 3, **dict(width=1.0) | kw),
    "slak_split": lambda **kw: slak.slak_split(DEPTHS, DIMS, SIZES, 3, width=1.0, **kw),
    "slak_weighted": lambda **kw: slak.slak_weighted(DEPTHS, DIMS, SIZES, 3, width=1.0, **kw),
    "slak_shuffled": lambda **kw: slak.slak_shuffled(DEPTHS, DIMS, SIZES, 3, width=1.0, **kw),
    "shiftwise_v1": lambda **kw: shiftwise.shiftwise(DEPTHS, DIMS, 1, SIZES, **kw),
    "shiftwise": lambda **kw: shiftwise.shiftwise(DEPTHS, DIMS, 2, SIZES, **kw),
    "unireplknet": lambda **kw: unireplknet.unireplknet(DEPTHS, DIMS, ((3,), (7,), (9, 3), (13,)), **kw),
}
NAMED = {  # networks with names, as narrow as can be
    "slak": ("slak_tiny", dict(width=0.05)),
    "slak_split": ("slak_split_tiny", dict(width=0.05)),
    "slak_weighted": ("slak_weighted_tiny", dict(width=0.05)),
    "slak_shuffled": ("slak_shuffled_tiny", dict(width=0.1)),
    "shiftwise_v1": ("shiftwise_v1_tiny", dict(width=0.1)),
    "shiftwise": ("shiftwise_tiny", dict(width=0.1)),
}
every_layout = pytest.mark.parametrize("layout", MINI)
named_layout = pytest.mark.parametrize("layout", NAMED)


pytestmark = pytest.mark.usefixtures("one_thread")


def filled(network, seed=0):
    """In float64 and evaluation; weights and statistics are all different, tables as they were."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.double().state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64).mul_(0.3))
            if key.endswith(("running_var", "gamma")):
                value.abs_().add_(0.5)
    return network.eval()


def mini(layout, **kw):
    return filled(MINI[layout](**dict(num_classes=5) | kw))


def named(layout, **kw):
    name, arguments = NAMED[layout]
    return filled(create_model(name, **arguments | dict(num_classes=5) | kw))


def outputs(network, size=48):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with torch.no_grad():
        return network(x)


def same(state_dict, other):
    assert state_dict.keys() == other.keys()
    for key, value in state_dict.items():
        assert torch.equal(value, other[key]), key


def in_float32(state_dict):
    return {key: value.float() if value.is_floating_point() else value for key, value in state_dict.items()}


def saved(weights, tmp_path):
    torch.save(weights, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


# there and back


@every_layout
def test_every_family_round_trips(layout):
    network = mini(layout)
    theirs = to_theirs(network.state_dict(), network)
    assert family_of(network) == layout and layout_of(theirs) == layout
    assert not set(theirs) & {key for key in network.state_dict() if not key.startswith("norm.")}
    found = recognise(theirs)
    assert (found.layout, found.merged, found.unused) == (layout, [], [])
    same(to_ours(found, network), network.state_dict())
    same(to_theirs(to_ours(found, network), network), theirs)


@pytest.mark.parametrize(
    ("layout", "arguments"),
    [
        ("slak", dict(decomposed=False)),
        ("slak", dict(branch_norm=False, layer_scale=0, num_classes=0)),
        ("slak", dict(feature_norm=True, in_chans=1)),
        ("slak_split", dict(branch_norm=False)),
        ("slak_weighted", dict(in_chans=5)),
        ("slak_shuffled", dict(ghost_ratio=0.0, num_paths=2)),
        ("shiftwise_v1", dict(ghost_ratio=0.5, num_paths=3, num_shifts=1)),
        ("shiftwise", dict(ghost_ratio=0.0, feature_norm=True)),
        ("shiftwise", dict(branch_norm=False, layer_scale=None, num_classes=0)),
        ("unireplknet", dict(layer_scale=None, num_classes=0)),
    ],
)
def test_variants_round_trip(layout, arguments):
    network = mini(layout, **arguments)
    theirs = to_theirs(network.state_dict(), network)
    assert all(key.startswith(("downsample_layers.", "stages.", "norm", "head.")) for key in theirs)
    assert not [key for key in theirs if "mix" in key or "blocks" in key]
    same(to_ours(recognise(theirs), network), network.state_dict())


def test_ghosts_are_last_there_and_in_place_here():
    network = mini("shiftwise_v1", ghost_ratio=0.25)
    theirs = to_theirs(network.state_dict(), network)
    mix = network.stages[1].blocks[0].mix
    order = [*mix.active.tolist(), *mix.ghosts.tolist()]
    assert order != sorted(order) and len(mix.ghosts) == 4
    block, ours = "stages.1.0.", network.state_dict()
    assert torch.equal(theirs[f"{block}pwconv1.weight"], ours["stages.1.blocks.0.fc1.weight"][:, order])
    assert torch.equal(theirs[f"{block}norm.bias"], ours["stages.1.blocks.0.norm.bias"][order])
    for key in ("gamma", "pwconv2.weight", "pwconv1.bias"):  # the sum with the input is in place in both
        assert torch.equal(theirs[block + key], ours[f"stages.1.blocks.0.{key}".replace("pwconv", "fc")])


def test_tables_of_another_seed_are_refused():
    network = mini("shiftwise")
    weights = network.state_dict()
    weights["stages.2.blocks.1.mix.tall_slots"] = weights["stages.2.blocks.1.mix.tall_slots"].flip(2)
    with pytest.raises(ValueError, match=r"stages\.2\.blocks\.1\.mix\.tall_slots was not drawn with the authors' seed"):
        to_theirs(weights, network)


def test_what_the_authors_do_not_have_is_not_written():
    for network in (create_model("resnet20"), create_model("shiftresnet20"), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=rf"{type(network).__name__} has no counterpart|in this network"):
            to_theirs(network.state_dict(), network)
    network = mini("slak")
    network.reparameterize()
    with pytest.raises(ValueError, match=r"reparameterized|in this network"):
        to_theirs(network.state_dict(), network)


# merged forms


@pytest.mark.parametrize(
    ("layout", "forms", "arguments"),
    [
        ("slak", ["lkb_reparam"], dict(decomposed=False)),
        ("shiftwise_v1", ["LoRA"], {}),
        ("shiftwise", ["LoRA"], {}),
        ("shiftwise", ["pwconv2"], dict(num_paths=1)),
        ("shiftwise", ["LoRA", "pwconv2"], {}),
        ("unireplknet", ["pwconv2", "dwconv", "lk_origin"], {}),
        ("unireplknet", ["lk_origin"], {}),
    ],
    ids=str,
)
def test_merged_forms_round_trip(layout, forms, arguments):
    network = mini(layout, **arguments)
    plain = to_theirs(network.state_dict(), network)
    merged = to_theirs(network.state_dict(), network, merge=forms)
    assert len(merged) < len(plain) and all(v.dtype is torch.float64 or "num" in k for k, v in merged.items())
    found = recognise(merged)
    assert (found.layout, sorted(found.merged)) == (layout, sorted(forms))
    changes = dict(num_paths=1) if "LoRA" in forms else {}
    if layout == "slak":
        other = filled(slak.slak(DEPTHS, DIMS, SIZES, None, decomposed=False, width=1.0, num_classes=5))
    else:
        other = mini(layout, **arguments | changes)
    other.load_state_dict(to_ours(found, other))
    torch.testing.assert_close(outputs(other), outputs(network), rtol=1e-9, atol=1e-9)
    again = to_theirs(other.state_dict(), other, merge=forms)
    assert again.keys() == merged.keys()
    for key, value in again.items():
        torch.testing.assert_close(value, merged[key], rtol=1e-12, atol=1e-12, msg=key)


def test_merging_does_not_touch_what_it_is_given():
    network = mini("unireplknet")
    weights = to_theirs(network.state_dict(), network)
    before = copy.deepcopy(weights)
    merged = merge(weights, ("pwconv2", "dwconv", "lk_origin"))
    same(weights, before)
    kept = copy.deepcopy(merged)
    trained, forms = unmerge(merged)
    same(merged, kept)
    assert set(forms) == {"pwconv2", "dwconv", "lk_origin"} and trained.keys() >= before.keys()
    assert unmerge(weights)[1] == []


def test_impossible_merges_are_named():
    network = mini("slak")
    weights = to_theirs(network.state_dict(), network)
    with pytest.raises(ValueError, match="unknown merged form 'lora'"):
        merge(weights, ["lora"])
    with pytest.raises(ValueError, match="the network has nothing to merge into LoRA"):
        merge(weights, ["LoRA"])


# identification


@named_layout
def test_is_identified_under_either_names(layout):
    network = named(layout)
    expected = (NAMED[layout][0], NAMED[layout][1] | dict(num_classes=5))
    for weights in (network.state_dict(), to_theirs(network.state_dict(), network)):
        identity = identify(weights)
        assert (identity.model, identity.model_args) == expected


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("slak_small", dict(width=0.05)),
        ("slak_base", dict(width=0.07, in_chans=1)),
        ("slak_tiny", dict(width=0.05, decomposed=False)),
        ("slak_tiny", dict(width=0.05, kernel_sizes=(31, 29, 27, 13), branch_norm=False)),
        ("slak_tiny", dict(width=0.05, kernel_sizes=(7, 7, 7, 7), small_kernel_size=0, decomposed=False)),
        ("slak_split_tiny", dict(width=0.05, kernel_sizes=(51, 49, 45, 13))),
        ("slak_weighted_tiny", dict(width=0.05, num_paths=2)),
        ("slak_shuffled_tiny", dict(width=0.1, ghost_ratio=0.23, num_paths=1)),
        ("shiftwise_tiny", dict(width=0.1, ghost_ratio=0.3, num_paths=1)),
        ("shiftwise_tiny", dict(width=0.1, small_kernel_size=5, layer_scale=0)),
        ("shiftwise_v1_base", dict(width=0.08, feature_norm=True)),
        ("unireplknet_a", dict(in_chans=4)),
        ("unireplknet_p", dict(kernel_sizes=((3, 3), (13, 13), (7, 3) * 3, (17, 5)))),
    ],
    ids=str,
)
def test_arguments_come_back(name, arguments):
    with torch.device("meta"):
        weights = create_model(name, **arguments, num_classes=7).state_dict()
    identity = identify(weights)
    assert (identity.model, identity.model_args) == (name, arguments | dict(num_classes=7))


def test_the_number_of_shifts_is_the_published_one_where_the_file_does_not_say(tmp_path):
    network = named("shiftwise", num_shifts=2)
    assert identify(network.state_dict()).model_args["num_shifts"] == 2  # our tables do
    path = saved(to_theirs(network.state_dict(), network), tmp_path)
    assert load_checkpoint(None, path).stages[0].blocks[0].mix.num_shifts == 4
    given = load_checkpoint(named("shiftwise", num_shifts=2), path)
    same(given.state_dict(), network.state_dict())


def test_sizes_without_a_name_are_described():
    for layout, what in (
        ("slak", r"a slak of \(1, 1, 2, 1\) blocks and \(8, 16, 24, 32\) channels, a size without a name"),
        ("shiftwise", r"a shiftwise of \(1, 1, 2, 1\) blocks and \(8, 16, 24, 32\) channels, a size without a name"),
        ("unireplknet", r"a UniRepLKNet of \(1, 1, 2, 1\) blocks and \(8, 16, 24, 32\) channels, a size without"),
        ("convnext", r"a ConvNeXt with \(1, 1, 2, 1\) blocks and 8 channels in its first stage, a size without"),
    ):
        network = mini(layout)
        for weights in (network.state_dict(), to_theirs(network.state_dict(), network)):
            with pytest.raises(ValueError, match=what):
                identify(weights)


def test_kernel_sizes_that_no_one_published_are_not_guessed(tmp_path):
    """Ten kernels of 5x5 may be 46 to 50 pixels."""
    network = named("slak_split", kernel_sizes=(46, 31, 21, 13))
    theirs = to_theirs(network.state_dict(), network)
    message = r"\[10, 7, 5, 3\] kernels of 5x5 side by side in its stages, which may stand for several sizes"
    for weights in (theirs, network.state_dict()):
        with pytest.raises(ValueError, match=message):
            identify(weights)
    other = load_checkpoint(named("slak_split", kernel_sizes=(46, 31, 21, 13)), saved(theirs, tmp_path))
    same(other.state_dict(), network.state_dict())


def test_reparameterized_networks_are_not_guessed(tmp_path):
    network = named("slak")
    plain, network = network, copy.deepcopy(network)
    network.reparameterize()
    path = saved(network.state_dict(), tmp_path)
    with pytest.raises(ValueError, match="a reparameterized network, which do not say how it was built"):
        load_checkpoint(None, path)
    other = filled(create_model("slak_tiny", width=0.05, num_classes=5), seed=1)
    other.reparameterize()
    same(load_checkpoint(other, path).state_dict(), network.state_dict())
    torch.testing.assert_close(outputs(other), outputs(plain), rtol=1e-9, atol=1e-9)


# what does not fit


def refused(call, *wanted):
    """The one line of the ValueError that ``call`` raises."""
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in wanted), text
    return text


@pytest.mark.parametrize("layout", ["slak", "shiftwise_v1"])
def test_missing_and_left_over_keys_are_named_in_one_line(layout, tmp_path):
    network = named(layout)
    theirs = to_theirs(network.state_dict(), network)
    for weights, key, added in (
        (theirs, "stages.2.4.pwconv1.bias", "stages.2.4.pwconv3.bias"),
        (network.state_dict(), "stages.2.blocks.4.fc1.bias", "stages.2.blocks.4.fc3.bias"),
    ):
        key = key if key in weights else key.replace("pwconv1", "pwconv1.1")
        missing = saved({k: v for k, v in weights.items() if k != key}, tmp_path)
        for model in (None, network):
            refused(lambda m=model, p=missing: load_checkpoint(m, p), "missing: stages.2.blocks.4.fc1.bias", ".pth")
        more = saved(weights | {added: torch.zeros(3)}, tmp_path)
        for model in (None, network):
            refused(lambda m=model, p=more: load_checkpoint(m, p), f"left over: {added}", ".pth")
        shape = saved(weights | {key: torch.zeros(3)}, tmp_path)
        refused(lambda p=shape: load_checkpoint(network, p), "of another shape: stages.2.blocks.4.fc1.bias [3] instead")
    same(network.state_dict(), named(layout).state_dict())  # nothing was loaded in part


def test_a_profilers_counters_are_ignored(tmp_path):
    network = named("slak")
    theirs = to_theirs(network.state_dict(), network)
    counters = {f"{prefix}total_{what}": torch.zeros(1) for prefix in ("", "stages.0.1.") for what in ("ops", "params")}
    assert set(recognise(theirs | counters).unused) == {*counters}
    for weights in (theirs | counters, network.state_dict() | counters):
        other = load_checkpoint(None, saved(weights, tmp_path))
        same(other.state_dict(), in_float32(network.state_dict()))
        convert(tmp_path / "weights.pth", tmp_path / "clean.safetensors")
        same(load_checkpoint(None, tmp_path / "clean.safetensors").state_dict(), other.state_dict())


def test_old_files_without_counters_load(tmp_path):
    network = named("shiftwise")
    theirs = {k: v for k, v in to_theirs(network.state_dict(), network).items() if not k.endswith("tracked")}
    same(load_checkpoint(None, saved(theirs, tmp_path)).state_dict(), in_float32(network.state_dict()))


def test_another_network_is_named_and_left_as_it_was(tmp_path):
    path = saved(to_theirs(named("slak").state_dict(), named("slak")), tmp_path)
    held = "it holds slak_tiny(width=0.05, num_classes=5)"
    for other in (
        named("slak", kernel_sizes=(31, 29, 27, 13)),
        named("slak", num_classes=6),
        named("slak", decomposed=False),
        named("slak", branch_norm=False),
        named("slak_weighted"),
        named("shiftwise"),
        create_model("slak_tiny", width=0.06, num_classes=5),
        create_model("slak_small", width=0.05, num_classes=5),
        create_model("resnet20"),
    ):
        before = copy.deepcopy(other.state_dict())
        refused(lambda m=other: load_checkpoint(m, path), "does not fit", held)
        same(other.state_dict(), before)


@pytest.mark.parametrize("layout", ["slak", "shiftwise"])
def test_a_released_file_fills_a_backbone(layout, tmp_path):
    network, (name, arguments) = named(layout), NAMED[layout]
    path = saved(to_theirs(network.state_dict(), network), tmp_path)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for norm in (False, True):
        backbone = create_model(name, **arguments, features_only=True, out_indices=(0, 2, 3), feature_norm=norm)
        load_checkpoint(backbone.double(), path).eval()
        with torch.no_grad():
            for got, expected in zip(backbone(x), network.forward_intermediates(x, [0, 2, 3])[1], strict=True):
                scale = expected.permute(0, 2, 3, 1)
                scale = torch.nn.functional.layer_norm(scale, scale.shape[3:], eps=1e-6).permute(0, 3, 1, 2)
                torch.testing.assert_close(got, scale if norm else expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["slak", "shiftwise"])
def test_a_released_file_fills_a_backbone_that_ends_early(layout, tmp_path):
    """Timm's features_only drops the stages behind the last one that is asked for."""
    network, (name, arguments) = named(layout), NAMED[layout]
    path = saved(to_theirs(network.state_dict(), network), tmp_path)
    short = create_model(name, **arguments, features_only=True, out_indices=(0, 1))
    assert len(short.model.stages) == 2
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        maps = load_checkpoint(short.double(), path).eval()(x)
        expected = network.forward_intermediates(x, [0, 1], intermediates_only=True)
    torch.testing.assert_close(maps, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["slak", "shiftwise"])
@pytest.mark.parametrize("form", ["theirs", "ours"])
def test_a_folded_network_takes_the_file_of_a_trained_one(layout, form, tmp_path):
    network, (name, arguments) = named(layout), NAMED[layout]
    weights = network.state_dict()
    path = saved(weights if form == "ours" else to_theirs(weights, network), tmp_path)
    folded = create_model(name, **arguments, num_classes=5).double().eval()
    folded.reparameterize()
    load_checkpoint(folded, path)
    torch.testing.assert_close(outputs(folded), outputs(network), rtol=1e-9, atol=1e-9)
    other = create_model(name, **arguments, num_classes=6).eval()
    other.reparameterize()
    refused(lambda: load_checkpoint(other, path), "linear.weight", "num_classes=5")


def test_layouts_explain_what_they_write():
    """A rule that another one hides, or that no network has, would be dead."""
    used = {name: set() for name in LAYOUTS}
    variants = [mini(layout) for layout in MINI if layout != "unireplknet"] + [mini("unireplknet")]
    variants += [mini("slak", decomposed=False), *(mini(x, feature_norm=True) for x in ("slak", "shiftwise"))]
    for network in variants:
        name = family_of(network)
        for key in to_theirs(network.state_dict(), network):
            rule = next(
                r for r in LAYOUTS[name].rules if re.fullmatch(re.escape(r.theirs).replace(r"\{\}", "[^.]+"), key)
            )
            used[name].add(rule)
    allowed = ("norm{}.{}",)  # backbones of every family
    for name, layout in LAYOUTS.items():
        if name in MINI:
            dead = [rule.theirs for rule in layout.rules if rule not in used[name] and rule.theirs not in allowed]
            assert not dead, name
