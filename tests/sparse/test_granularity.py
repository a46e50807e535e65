"""What is masked, and what never is: norms, biases, scales, tables, embeddings."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import ScaledStdConv2d
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shiftconv.models  # noqa: F401  # our networks, for timm
from shiftconv.sparse import Granularity, SparseTraining, groups
from shiftconv.sparse.granularity import weights_of

from .cases import Fours, Large, Tiny, made, sgd

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)


def masked(model, granularity="weight", **arguments):
    return [member.name for group in groups(model, granularity, **arguments) for member in group.members]


def test_shapes_and_rows():
    model = made()
    shapes = {g.name: ([*g.shape], g.row, g.fixed) for g in groups(model)}
    assert shapes["stem.weight"] == ([7, 3, 3, 3], 189, None) and shapes["fc1.weight"] == ([11, 5], 55, None)
    assert {g.name: [*g.shape] for g in groups(model, "kernel")}["mix.weight"] == [5, 7]
    channels = {g.name: (g.shape[0], [m.name for m in g.members]) for g in groups(model, "channel")}
    assert channels["fc2.weight"] == (3, ["fc2.weight", "fc2.bias"]) and channels["depthwise.weight"][1] == [
        "depthwise.weight"
    ]
    assert {g.name: g.row for g in groups(model, "fan_in")} == {
        "stem.weight": 27,
        "depthwise.weight": 15,
        "mix.weight": 28,
        "fc1.weight": 5,
        "fc2.weight": 11,
    }
    hidden = {g.name: [m.name for m in g.members] for g in groups(model, "hidden")}
    assert hidden["fc1 units"] == ["fc1.weight", "fc1.bias", "fc2.weight"] and len(hidden) == 2
    fours = {g.name: ([*g.shape], g.row, g.fixed) for g in groups(made(Fours), "1:4")}
    assert fours["3.weight"] == ([4, 3, 3, 8], 4, 1) and fours["6.weight"] == ([12, 4], 4, 1)
    assert {g.name: [*g.shape] for g in groups(made(Fours), "kernel:2")}["0.weight"] == [4, 4]
    assert all(g.mask.all() and g.reachable is None for g in groups(model))


def test_paths_share_a_mask_unless_told_otherwise():
    model = made(Large, paths=3)
    shared = next(g for g in groups(model, "kernel") if g.name == "1.weights.0")
    assert [m.name for m in shared.members] == [f"1.weights.{i}" for i in range(3)] and shared.paths
    apart = [g for g in groups(model, Granularity("kernel", share_paths=False)) if g.name.startswith("1.weights")]
    assert [len(g.members) for g in apart] == [1, 1, 1] and not any(g.paths for g in apart)
    assert not any(g.paths for g in groups(made(Large, paths=1)))


def test_names():
    assert Granularity.parse("2:4") == Granularity("weight", pattern=(2, 4))
    assert Granularity.parse("kernel:4") == Granularity("kernel", chunk=4)
    for name in ("weight", "kernel", "channel", "hidden", "fan_in", "2:4", "kernel:4"):
        assert str(Granularity.parse(name)) == name and Granularity.parse(Granularity.parse(name)).kind
    for name, message in (
        ("wieght", "unknown granularity 'wieght'; did you mean 'weight'"),
        ("0:4", "0 < n <= m"),
        ("kernel:0", "chunk must be at least 1"),
        ("chanel", "did you mean 'channel'"),
    ):
        with pytest.raises(ValueError, match=message):
            Granularity.parse(name)
    with pytest.raises(ValueError, match="masks single weights"):
        Granularity("kernel", pattern=(2, 4))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        Granularity("fan_in", chunk=2)


def test_layers_are_selected_by_kind_or_by_a_predicate():
    model = made()
    assert masked(model, select=nn.Linear) == ["fc1.weight", "fc2.weight"]
    assert masked(model, select=(nn.Linear, nn.BatchNorm2d)) == ["fc1.weight", "fc2.weight"]
    depthwise = masked(model, select=lambda m: isinstance(m, nn.Conv2d) and m.groups > 1)
    assert depthwise == ["depthwise.weight"]
    with pytest.raises(ValueError, match="no weight is selected in Tiny"):
        groups(model, select=nn.BatchNorm2d)
    with pytest.raises(ValueError, match="no layer is selected whose outputs only one other layer reads"):
        groups(nn.Linear(3, 3), "hidden")


@pytest.mark.parametrize("granularity", ["2:4", "kernel:2"])
def test_sizes_that_do_not_fit(granularity):
    with pytest.raises(ValueError, match=r"stem\.weight .*no multiple of"):
        groups(made(Tiny), granularity)


def test_a_pattern_is_among_the_inputs_only():
    """Two taps of six inputs are twelve numbers, but no multiple of four inputs."""
    with pytest.raises(ValueError, match=r"\[8, 6, 1, 2\] has no multiple of 4 inputs"):
        groups(nn.Conv2d(6, 8, (1, 2)), "2:4")


def allowed(model, names):
    """The names of those that hold no norm's, bias's, scale's or table's numbers: each masked one has a right to be."""
    owners = {
        f"{path}.{name}".strip("."): owner
        for path, owner in model.named_modules()
        for name in dict(owner.named_parameters(recurse=False))
    }
    return [name for name in names if not isinstance(owners[name], NORMS) and not name.endswith(("bias", "gamma"))]


@pytest.mark.parametrize("granularity", ["weight", "kernel", "fan_in"])
@pytest.mark.parametrize(
    "name", ["convnextv2_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "shiftwise_tiny", "slak_tiny"]
)
def test_only_weights_of_networks_are_masked(name, granularity):
    small = dict(depths=(1, 1, 1, 1)) if "swin" in name or "convnext" in name else {}
    small = dict(depth=1) if "vit" in name else small
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5, **small)
    found = masked(model, granularity)
    assert found == allowed(model, found)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for parameter, shape in shapes.items():
        is_weight = (len(shape) >= 2 and shape[0] > 1 and parameter.endswith("weight")) or ".weights." in parameter
        small_one = "small_weight" in parameter
        table = "table" in parameter or ("embed" in parameter and not parameter.startswith("patch_embed"))
        assert (parameter in found) == ((is_weight or small_one) and not table), parameter
    assert len(found) > 3 and len({*found}) == len(found)


class Zoo(nn.Module):
    """What has weights and is none."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(9, 8)
        self.bag = nn.EmbeddingBag(9, 8)
        self.position = nn.Parameter(torch.ones(1, 4, 4, 8))
        self.table = nn.Parameter(torch.ones(49, 4))
        self.scale = nn.Parameter(torch.ones(8))
        self.wide_scale = nn.Parameter(torch.ones(8, 1, 1))
        self.temperature = nn.Parameter(torch.ones(4, 1, 1))
        self.norms = nn.ModuleList([nn.LayerNorm((4, 8)), nn.GroupNorm(2, 8), nn.BatchNorm3d(8), nn.PReLU(8)])
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.standard = ScaledStdConv2d(4, 8, 3)
        self.other = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.pair = nn.Bilinear(3, 4, 5)
        self.kernels = nn.Parameter(torch.ones(8, 1, 5, 3))


def test_what_is_no_weight_is_not_masked():
    assert masked(Zoo()) == [
        "kernels",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "standard.weight",
        "other.q_proj_weight",
        "other.k_proj_weight",
        "other.v_proj_weight",
        "other.out_proj.weight",
        "pair.weight",
    ]


def test_norms_of_weights_are_scales():
    model = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    assert not [name for name, weight, _ in weights_of(model) if weight[0].numel() == 1]


def test_an_embedding_that_is_an_output_too_is_an_embedding():
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "mix": nn.Linear(4, 4), "out": nn.Linear(4, 9, bias=False)})
    model["out"].weight = model["words"].weight
    assert masked(model) == ["mix.weight"]


def test_frozen_weights_are_none():
    model = made()
    model.fc1.requires_grad_(False)
    assert "fc1.weight" not in masked(model) and len(masked(model)) == 4


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_outputs_of_transposed_convolutions(kind):
    """Their weights are ``[I, O, ...]``: an output is a column, and its bias goes with it."""
    for inputs, outputs in ((6, 4), (4, 4)):
        layer = kind(inputs, outputs, 3)
        SparseTraining(layer, sgd(layer), 0.5, "uniform", "static", "channel")
        columns = (layer.weight != 0).transpose(0, 1).flatten(1)
        assert columns.any(1).sum() == 2 and torch.equal(columns.any(1), columns.all(1))
        assert torch.equal(columns.any(1), layer.bias != 0)
        layer = kind(inputs, outputs, 3)
        SparseTraining(layer, sgd(layer), 0.5, "uniform", "static", "fan_in")
        assert len((layer.weight != 0).transpose(0, 1).flatten(1).sum(1).unique()) == 1


def test_masks_of_every_granularity_lie_where_they_should():
    """With the weights set to their own places, in numpy."""
    for granularity, keep in (
        ("kernel", lambda m: m[:, :, None, None]),
        ("kernel:2", lambda m: np.repeat(m, 2, 0)[:, :, None, None]),
        ("channel", lambda m: m[:, None, None, None]),
        ("2:4", lambda m: m.transpose(0, 3, 1, 2)),
        ("fan_in", lambda m: m),
    ):
        model = made(Fours)
        before = model[0].weight.detach().numpy().copy()
        sparse = SparseTraining(model, sgd(model), 0.5, "uniform", "static", granularity)
        mask = np.broadcast_to(keep(sparse.masks["0.weight"].numpy()), before.shape)
        assert (model[0].weight.detach().numpy() == before * mask).all() and 0 < mask.sum() < mask.size


def test_parameters_in_pieces_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = made()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = sgd(model)
        hooks = len(model._load_state_dict_post_hooks)
        with pytest.raises(TypeError, match=r"stem\.weight is a DTensor.*takes whole parameters"):
            SparseTraining(model, optimizer, 0.5)
        assert len(model._load_state_dict_post_hooks) == hooks and not optimizer._optimizer_step_post_hooks
    finally:
        torch.distributed.destroy_process_group()
