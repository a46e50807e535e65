"""The networks with large kernels against numbers of their authors' own code, from checkpoints to training steps.

Weights are functions of the authors' keys. Whatever has the authors' names here (``theirs``) is what their code saves.
"""

import copy
import json
import lzma
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import reparameterize_model
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from shiftconv.analysis.count import count
from shiftconv.models import create_model, shiftwise, slak
from shiftconv.models.convert import Identity, identify, load_checkpoint
from shiftconv.models.convert.layouts import LAYOUTS
from shiftconv.models.convert.translate import recognise, to_ours, to_theirs, unwrapped

GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = json.loads((GOLDEN / "large_kernels.json").read_text())
CASES, MERGED, TRAINED = (DOCUMENT[part] for part in ("cases", "merged", "train"))
with np.load(GOLDEN / "large_kernels.npz") as arrays:
    ARRAYS = {name: arrays[name] for name in arrays.files}
MANIFESTS = json.loads(lzma.decompress(ARRAYS["manifests"].tobytes()))
COUNTER = "num_batches_tracked"

RUN = [name for name, case in CASES.items() if case["inputs"]]  # of the largest ones there are manifests only
QUICK = ("slak_tiny_k51_w1.3", "slak_pww_tiny_k51_w1.3", "slak_gr_swsf_se_tiny", "sw_v2_tiny_readme", "unireplknet_t")
IN_ORDER = ("slak", "shiftwise", "shiftwise_v1", "unireplknet", "convnext")  # families written in the authors' order
WRAPPERS = (
    lambda weights: weights,
    lambda weights: {"model": weights, "epoch": 300, "optimizer": {"state": {}}},
    lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}, "args": None},
)


pytestmark = pytest.mark.usefixtures("one_thread")


def _normal(name, shape):
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(tuple(shape))


def _images(name, shape):
    return torch.from_numpy(_normal(name, shape))


def _weight(key, shape, salt=""):
    if key.endswith(COUNTER):
        return torch.zeros((), dtype=torch.int64)
    n, leaf = _normal(salt + key, shape), key.rpartition(".")[2]
    if leaf == "running_var":
        n = np.abs(n) + 0.5
    elif leaf == "gamma" and len(shape) == 1:
        n = 0.5 + 0.1 * n
    elif leaf == "weight" and len(shape) == 1:
        n = 1 + 0.1 * n
    elif leaf == "running_mean" or len(shape) == 1 or leaf in ("gamma", "beta"):
        n *= 0.1
    else:
        n *= (0.1 if ".LoRAs." in key else 1.0) / math.sqrt(math.prod(shape[1:]) if shape[0] > 1 else 1)
    return torch.from_numpy(n.astype(np.float32))


def _theirs(name, salt=""):
    return {key: _weight(key, shape, salt) for key, *shape in MANIFESTS[name]}


def _arguments(case):
    """As ``identify`` gives them."""
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in case["args"].items()}
    return arguments if "features_only" in arguments else arguments | {"num_classes": 1000}


def _close(got, expected, atol=1e-9):
    error = (got - torch.as_tensor(expected)).abs().max().item()
    assert error < atol, f"differs by {error:.1e}"


@dataclass
class Loaded:
    name: str
    theirs: dict[str, Tensor]
    network: nn.Module
    """In float64 and evaluation mode; nobody changes it."""
    in_float32: list[Tensor]

    @property
    def case(self):
        return CASES[self.name]

    def images(self):
        return {name: _images(name, shape) for name, shape in self.case["inputs"].items()}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name not in QUICK else []) for name in RUN],
)
def loaded(request, tmp_path_factory):
    name, case = request.param, CASES[request.param]
    theirs = _theirs(name)
    path = tmp_path_factory.mktemp("authors") / f"{name}.pth"
    torch.save(WRAPPERS[RUN.index(name) % 3](theirs), path)
    # what the file does not say is an argument of the network that it goes into
    extra = case.get("not_in_file")
    model = create_model(case["model"], **_arguments(case) | extra) if extra else None
    network = load_checkpoint(model, path).eval()
    path.unlink()
    x = _images("in64", (2, 3, 64, 64))
    with torch.no_grad():
        y = network(x.float())
    if "merged" in case:  # norms that do nothing are exact in float64 only
        exact = recognise({key: value.double() if value.ndim else value for key, value in theirs.items()})
        network.double().load_state_dict(to_ours(exact, network))
    return Loaded(name, theirs, network.double(), y if isinstance(y, list) else [y])


def _outputs(network, x):
    """What the network gives for ``x``, a list, and the output of each of the eight layers that goldens have."""
    inner, seen = unwrapped(network), []
    pairs = [(stage.downsample if i else inner.stem, stage.blocks[-1]) for i, stage in enumerate(inner.stages)]
    layers = [layer for pair in pairs for layer in pair]
    handles = [layer.register_forward_hook(lambda _, __, y: seen.append(y)) for layer in layers]
    try:
        with torch.no_grad():
            y = network(x)
    finally:
        for handle in handles:
            handle.remove()
    return y if isinstance(y, list) else [y], seen


def _stats(maps, count):
    rows = [(y.mean(), y.std(unbiased=False), *y.flatten()[:count], *y.flatten()[-count:]) for y in maps]
    return torch.tensor(rows, dtype=torch.float64)


def _check_outputs(network, loaded, name, x):
    y, layers = _outputs(network, x)
    _close(_stats(layers, 8), ARRAYS[f"{loaded.name}/{name}/layers"])
    if "features_only" in loaded.case["args"]:
        _close(_stats(y, 64), ARRAYS[f"{loaded.name}/{name}/maps"])
        assert [m.shape[2:] for m in y] == [(x.shape[2] // s, x.shape[3] // s) for s in (4, 8, 16, 32)]
    else:
        _close(y[0], ARRAYS[f"{loaded.name}/{name}/logits"])


def _small_inputs(loaded):
    return {name: x for name, x in loaded.images().items() if name != "in224"}


def test_evaluation_equals_the_authors(loaded):
    for name, x in _small_inputs(loaded).items():
        _check_outputs(loaded.network, loaded, name, x)
    exact, _ = _outputs(loaded.network, _images("in64", (2, 3, 64, 64)))
    for single, double in zip(loaded.in_float32, exact, strict=True):
        _close(single.double(), double, atol=2e-5)


def test_folded_equals_the_authors(loaded):
    if isinstance(loaded.network, ConvNeXt):
        pytest.skip("timm's ConvNeXt has nothing to fold")
    ours, timms = (copy.deepcopy(loaded.network) for _ in range(2))
    unwrapped(ours).reparameterize()
    reparameterize_model(timms, inplace=True)
    for network in (ours, timms):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
        for name, x in _small_inputs(loaded).items():
            _check_outputs(network, loaded, name, x)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [name for name, case in CASES.items() if "in224" in case["inputs"]], indirect=True)
def test_evaluation_of_whole_images_equals_the_authors(loaded):
    """Their kernels are as large as the map, and not cropped by it."""
    network, x = loaded.network, loaded.images()["in224"]
    _check_outputs(network, loaded, "in224", x)
    folded = copy.deepcopy(network)
    folded.reparameterize()
    _check_outputs(folded, loaded, "in224", x)


def test_is_written_as_the_authors_have_it(loaded):
    weights, case = unwrapped(loaded.network).state_dict(), loaded.case
    weights = {key: value.to(_single(value)) for key, value in weights.items()}
    theirs = to_theirs(weights, loaded.network, case.get("merged", False))
    assert theirs.keys() == loaded.theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(value, loaded.theirs[key]), key
    assert all(value.is_contiguous() for value in theirs.values())
    if recognise(theirs).layout in IN_ORDER and "merged" not in case:
        assert [*theirs] == [*loaded.theirs]


@pytest.mark.parametrize(
    ("name", "loaded"),
    [
        pytest.param(name, merged["of"], marks=[] if name == "unireplknet_t_reparam" else [pytest.mark.slow])
        for name, merged in MERGED.items()
    ],
    indirect=["loaded"],
)
def test_is_merged_as_the_authors_merge(name, loaded):
    theirs = to_theirs(loaded.network.state_dict(), loaded.network, merge=True)
    assert sorted([key, *value.shape] for key, value in theirs.items()) == sorted(MANIFESTS[name])
    network = create_model(loaded.case["model"], **_arguments(loaded.case) | MERGED[name].get("args", {}))
    network = network.double().eval()
    for weights, atol in ((theirs, 1e-9), ({k: v.to(_single(v)) for k, v in theirs.items()}, 3e-6)):
        network.load_state_dict(to_ours(recognise(weights), network))
        with torch.no_grad():
            _close(network(_images("in64", (2, 3, 64, 64))), ARRAYS[f"{loaded.name}/in64/logits"], atol)


def _single(tensor):
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


@pytest.mark.parametrize("name", MERGED)
def test_merged_is_identified(name):
    """Whether there was a small kernel, and how many paths, no one can tell any more."""
    case, merged = CASES[MERGED[name]["of"]], MERGED[name]
    identity = identify({key: _empty(key, shape) for key, *shape in MANIFESTS[name]})
    assert identity == Identity(case["model"], _arguments(case) | merged.get("args", {}))
    assert sum(math.prod(shape) for key, *shape in MANIFESTS[name] if not _is_buffer(key)) == merged["params"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "sw_v2_large" else []) for name in CASES]
)
def test_is_identified(name):
    """And costs what the authors' network does. The MACs of small kernels by themselves are not those of large ones."""
    case = CASES[name]
    identity = identify({key: _empty(key, shape) for key, *shape in MANIFESTS[name]})
    assert identity == Identity(case["model"], _arguments(case))
    assert sum(math.prod(shape) for key, *shape in MANIFESTS[name] if not _is_buffer(key)) == case["params"]
    family = identity.model.rpartition("_")[0]
    if "merged" not in case and family in ("slak", "convnext", "unireplknet"):
        with torch.device("meta"):
            cost = count(create_model(identity.model, **identity.model_args))
        assert cost.parameters == case["params"]
        if "macs" in case:  # ours in evaluation has the branches of UniRepLKNet merged
            assert cost.macs == (MERGED["unireplknet_t_reparam"] if family == "unireplknet" else case)["macs"]


def _empty(key, shape):
    return torch.empty(shape, device="meta", dtype=torch.int64 if key.endswith(COUNTER) else torch.float32)


def _is_buffer(key):
    return key.endswith((COUNTER, "running_mean", "running_var"))


ONE = (1, 1, 1, 1)
TINY, LARGE = (96, 192, 384, 768), (192, 384, 768, 1536)
DRAWN = {
    "sw_v1_tiny": lambda: shiftwise.shiftwise(ONE, TINY, 1),
    "sw_v2_tiny_readme": lambda: shiftwise.shiftwise(ONE, (80, 160, 320, 640), 2),
    "sw_v2_small": lambda: shiftwise.shiftwise(ONE, TINY, 2),
    "sw_v2_large": lambda: shiftwise.shiftwise(ONE, LARGE, 2),
    "sw_v2_tiny_k5_p1_r1": lambda: shiftwise.shiftwise(
        ONE, (80, 160, 320, 640), 2, small_kernel_size=5, num_paths=1, num_shifts=1
    ),
    "tput_sw_v2_tiny_deploy": lambda: shiftwise.shiftwise(
        ONE, (80, 160, 320, 640), 2, small_kernel_size=5, num_paths=1
    ),
    "sw_seg_tiny": lambda: shiftwise.shiftwise(ONE, (80, 160, 320, 640), 2),
    "slak_gr_swsf_se_tiny": lambda: slak.slak_shuffled(ONE, TINY, width=1.0),
}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "tables" in case])
def test_tables_are_what_the_authors_draw(name):
    expected = CASES[name]["tables"]
    for i, stage in enumerate(DRAWN[name]().stages):
        mix = stage.blocks[0].mix
        channels, filters, small = len(mix.active), mix.slots, mix.small_kernel_size
        drawn = {"rep": mix.active, "ghost": mix.ghosts}
        channel, index, way = (mix.small_slots == 0).nonzero(as_tuple=True)
        picks = torch.zeros(channels, mix.num_shifts if "lora2" not in expected else mix.small_slots.shape[2])
        picks[channel, way] = (channel * filters + index).to(picks.dtype)
        if "lora2" in expected:
            order = mix.tall_slots.flatten(2)[..., 0].argsort(1)
            drawn |= {"lora2": (order + torch.arange(channels)[:, None] * filters).flatten(), "small": picks[:, 0]}
        else:
            slots = torch.cat((mix.wide_slots, mix.tall_slots), 2).flatten(0, 1)
            drawn |= {"pad_hv": mix.kernel_size // 2 - slots * small - (small - 1), "idx_identit": picks}
        assert drawn.keys() == expected.keys()
        for what, table in drawn.items():
            assert zlib.crc32(table.to(torch.int64).numpy().tobytes()) == expected[what][i], f"{what} of stage {i}"


@pytest.fixture(params=TRAINED)
def trained(request):
    """A small network in float64 with the authors' weights, its golden, and the authors' key of each of its weights."""
    name, golden = request.param, TRAINED[request.param]
    family = {"convnext": ConvNeXt, "shiftwise": shiftwise.shiftwise} | slak.FAMILIES
    network = family[golden["family"]](**golden["args"], num_classes=10).double().train()
    found = recognise(_theirs(f"train_{name}", golden["salt"]))
    network.load_state_dict(to_ours(found, network))
    keys = LAYOUTS[found.layout].to_ours(key for key, *_ in MANIFESTS[f"train_{name}"])
    return f"train_{name}", network, golden, {ours: theirs for theirs, ours in keys.items()}


def _batch(golden):
    labels = np.random.Generator(np.random.PCG64(zlib.crc32(f"{golden['salt']}y".encode()))).integers(0, 10, size=4)
    return _images(f"{golden['salt']}x", (4, 3, 64, 64)), torch.from_numpy(labels)


def _as_theirs(network, values):
    """``values`` by our key, of parameters only, as the authors have them: in their order of keys and channels."""
    theirs = to_theirs(network.state_dict() | values, network)
    return [theirs[key] for key, *_ in MANIFESTS[network.golden] if not _is_buffer(key)]


def test_training_equals_the_authors(trained):
    name, network, golden, _ = trained
    network.golden = name
    x, labels = _batch(golden)
    logits = network(x)
    _close(logits, ARRAYS[f"{name}/logits"])
    loss = F.cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(golden["losses"][0], rel=1e-9)
    loss.backward()
    assert sum(p.numel() for p in network.parameters()) == golden["params"]
    gradients = _as_theirs(network, {key: p.grad for key, p in network.named_parameters()})
    for got, (total, norm, *first) in zip(gradients, ARRAYS[f"{name}/gradients"], strict=True):
        got = got.flatten()
        assert got.norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-13)
        assert got.sum().item() == pytest.approx(total, abs=1e-9 * norm + 1e-13)
        _close(got[:8], first[: len(got)], atol=1e-9 * norm + 1e-13)
    theirs = to_theirs(network.state_dict(), network)
    buffers = [theirs[key][:8] for key, *_ in MANIFESTS[name] if key.endswith(("running_mean", "running_var"))]
    if buffers:
        _close(torch.cat(buffers), ARRAYS[f"{name}/statistics"])
    assert all(value == 1 for key, value in theirs.items() if key.endswith(COUNTER))


def test_steps_of_the_optimizer_equal_the_authors(trained):
    name, network, golden, keys = trained
    network.golden = name
    axes = {key: len(shape) for key, *shape in MANIFESTS[name]}
    spared = {ours for ours, theirs in keys.items() if axes[theirs] == 1 or theirs.endswith(".bias")}
    groups = [[p for key, p in network.named_parameters() if (key in spared) == flag] for flag in (False, True)]
    decay, plain = (dict(params=group, weight_decay=wd) for group, wd in zip(groups, (0.05, 0.0), strict=True))
    optimizer = torch.optim.AdamW([decay, plain], lr=0.004)
    x, labels = _batch(golden)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(golden["losses"], rel=1e-9)
    after = _as_theirs(network, {})
    got = torch.stack([torch.stack((value.sum(), value.norm())) for value in after])
    # a weight whose gradient is 0 moves by the noise in it, which Adam makes larger
    _close(got, ARRAYS[f"{name}/after"], atol=1e-8)


def test_first_weights_are_distributed_as_the_authors():
    golden = DOCUMENT["init"]
    network = create_model("slak_tiny", **golden["args"])
    theirs = to_theirs(network.state_dict(), network)
    for (key, *shape), (mean, deviation, low, high) in zip(
        MANIFESTS["slak_tiny_k51_w1.3"], ARRAYS["init/stats"].tolist(), strict=True
    ):
        value = theirs[key].double()
        if deviation == 0 or math.prod(shape) < 10:
            assert value.min().item() == pytest.approx(low) and value.max().item() == pytest.approx(high), key
            continue
        expected, n = 0.01 if key == "head.weight" else 0.02, math.prod(shape)
        error = 6 * expected / n**0.5
        assert abs(value.mean().item()) < error and abs(value.std().item() - expected) < error / 2**0.5, key
        assert abs(mean) < error and abs(deviation - expected) < error / 2**0.5 + 0.01 * expected, key
        assert value.abs().max() < 7 * expected, key  # cut off nowhere near it


def test_drop_path_rates_are_the_authors():
    golden = DOCUMENT["init"]
    with torch.device("meta"):
        network = create_model("slak_tiny", **golden["args"])
    rates = {name: m.drop_prob for name, m in network.named_modules() if isinstance(m, DropPath)}
    rates = {name.replace(".blocks", "").removesuffix(".drop_path"): rate for name, rate in rates.items()}
    assert rates == pytest.approx(golden["drop_path"]) and len(rates) == 17  # none in the first block
