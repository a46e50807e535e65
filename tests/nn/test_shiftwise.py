"""ShiftwiseConv2d against the original formulation, written out: small convolutions, every map shifted and added."""

import copy
import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftconv.nn.arrangement import VARIANTS, ShiftwiseVariant, arrange, choose_ghosts
from shiftconv.nn.cross_kernels import CrossKernels
from shiftconv.nn.shiftwise import ShiftwiseConv2d

GOLDEN = Path(__file__).parent / "golden"
PLAIN = VARIANTS["plain"]
DRAWN = [name for name in VARIANTS if name not in ("split", "weighted")]

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant="plain", dim=6, kernel_size=13, small_kernel_size=3, ghost_ratio=0.3, dtype=torch.float64, **kw):
    """A module with weights and statistics that are all different."""
    settings = VARIANTS[variant] if isinstance(variant, str) else variant
    shifts = 2 if "shuffled" in (settings.wide, settings.tall) else 1
    arguments = dict(num_paths=2, num_shifts=shifts, ghost_ratio=ghost_ratio, variant=variant) | kw
    module = ShiftwiseConv2d(dim, kernel_size, small_kernel_size, **arguments).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and "constant" not in name and not tensor.is_meta:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return module


def image(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def moved(z, down, right, height, width):
    """``y[i, j] = z[i - down, j - right]``, zero where that lies outside of ``z`` ``[N, H', W']``."""
    reach = abs(down) + abs(right) + height + width
    padded = F.pad(z, (reach,) * 4)
    return padded[:, reach - down : reach - down + height, reach - right : reach - right + width]


def slots_of(module, branch):
    """``[C', S, R]``; kernels in their order have no table."""
    state, filters = module.state_dict(), -(-module.kernel_size // module.small_kernel_size)
    ordered = torch.arange(filters).view(1, -1, 1).expand(len(module.active), -1, -1)
    return state.get(f"{branch}_slots", ordered)


def branch_oracle(module, x, branch):
    """Small convolutions with padding s - 1 (k // 2 where the border is "same"), pads and crops as the original has."""
    state, s, big = module.state_dict(), module.small_kernel_size, module.kernel_size
    variant, (_, channels, height, width) = module.variant, x.shape
    if branch == "small" and variant.small == "own":
        return F.conv2d(F.pad(x, (s // 2, s - 1 - s // 2) * 2), state["small_weight"], groups=channels)
    prefix = "tall_weights." if variant.separate and branch == "tall" else "weights."
    weight = sum(value for name, value in state.items() if name.startswith(prefix))
    p = s - 1 if variant.border == "full" else s // 2
    z = F.conv2d(x, weight, padding=p, groups=channels)
    e, slots = p - s // 2, slots_of(module, branch)
    y = torch.zeros_like(x)
    for c, k, r in itertools.product(*map(range, slots.shape)):
        slot = int(slots[c, k, r])
        if slot < 0:
            continue
        long = big // 2 - slot * s - p
        square = 3 if variant.small == "square" else 1
        cell = [(square // 2 - at) * s - e for at in divmod(slot, square)]
        down, right = {"tall": (long, -e), "wide": (-e, long), "small": cell}[branch]
        factor, constant = 1, 0
        if variant.coefficient != "none":
            table = state[f"{branch}_coefficient"]
            factor = table[c, k if table.shape[1] > 1 else 0, r]
            factor = factor.sigmoid() if variant.coefficient == "sigmoid" else factor
        if variant.constants:
            table = state[f"{branch}_constant"]
            constant = table[c, k if table.shape[1] > 1 else 0, r]
        y[:, c] += moved(factor * z[:, c * slots.shape[1] + k] + constant, down, right, height, width)
    return y


def norm_oracle(module, name, y, training):
    norm = getattr(module, name)
    if norm is None:
        return y
    if training:
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    scale = norm.weight / (var + norm.eps).sqrt()
    return (y - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def oracle(module, x, training=False):
    part = x[:, module.active]
    y = torch.zeros_like(part)
    for branch in ("tall", "wide", "small"):
        if branch != "small" or module.variant.small != "own" or module.small_kernel_size < module.kernel_size:
            y = y + norm_oracle(module, f"{branch}_norm", branch_oracle(module, part, branch), training)
    y = norm_oracle(module, "norm", y, training)
    y = y + part if module.variant.identity else y
    if module.variant.ghosts_last:
        return torch.cat((y, x[:, module.ghosts]), 1)
    result = x.clone()
    result[:, module.active] = y
    return result


SIZES = [(13, 3), (13, 5), (9, 3), (7, 2), (8, 4), (3, 3), (3, 5), (31, 3)]  # few slots, one, even, too small to cover


@every_variant
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_original_formulation(variant, sizes):
    module = make(variant, 5, *sizes)
    x = image(2, 5, 8, 7)
    with torch.no_grad():
        torch.testing.assert_close(module.train()(x), oracle(module, x, True), rtol=1e-10, atol=1e-10)
        expected = oracle(module.eval(), x)
        torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)
        module.reparameterize()
        torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)
        module.reparameterize()
        assert not [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        with pytest.raises(RuntimeError, match="no weights to draw"):
            module.reset_parameters()


@every_variant
@pytest.mark.parametrize("change", [dict(border="same"), dict(ghosts_last=True), dict(even=True)], ids=str)
@pytest.mark.parametrize("small", [3, 4])
def test_other_rules(variant, change, small):
    module = make(replace(VARIANTS[variant], **change), 7, 13, small)
    x = image(2, 7, 6, 9)
    with torch.no_grad():
        torch.testing.assert_close(module.train()(x), oracle(module, x, True), rtol=1e-10, atol=1e-10)
        expected = oracle(module.eval(), x)
        torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)
        module.reparameterize()
        torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)


@every_variant
def test_without_norms(variant):
    module = make(variant, branch_norm=False)
    x = image(1, 6, 9, 5)
    expected = oracle(module, x)
    torch.testing.assert_close(module.train()(x), expected, rtol=1e-11, atol=1e-11)
    module.reparameterize()
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)


@every_variant
def test_gradients_and_statistics(variant):
    """Of every weight, by the oracle's own graph; and what the norms remember."""
    module, x = make(variant), image(2, 6, 8, 8)
    before = copy.deepcopy(module.state_dict())
    y = module.train()(x.requires_grad_())
    grad = torch.randn_like(y)
    leaves = [x, *module.parameters()]
    grads = torch.autograd.grad(y, leaves, grad)
    state = dict(module.named_parameters())
    module.state_dict = lambda: dict(module.named_buffers()) | state  # the oracle must see what carries a graph
    expected = torch.autograd.grad(oracle(module, x, True), leaves, grad)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    for branch in ("tall", "wide"):
        norm, maps = getattr(module, f"{branch}_norm"), branch_oracle(module, x[:, module.active], branch)
        kept = 0.9 * before[f"{branch}_norm.running_mean"] + 0.1 * maps.mean((0, 2, 3))
        torch.testing.assert_close(norm.running_mean, kept.detach(), rtol=1e-9, atol=1e-9)


@every_variant
def test_reparameterized_in_float32(variant):
    module = make(variant, 12, 51, 3, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(0.2)
        x = image(2, 12, 14, 14, dtype=torch.float32)
        exact = oracle(copy.deepcopy(module).double(), x.double())
        module.reparameterize()
        scale = exact.abs().max()
        assert (module(x) - exact).abs().max() < 1e-5 * scale
        assert set(dict(module.named_parameters())) <= {f"merged.{n}" for n in ("tall", "wide", "small", "bias")}
        assert (module.merged.small is None) == (variant != "blur")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "embedding"])
@pytest.mark.parametrize("last", [False, True])
def test_equivalent_kernel(variant, last):
    module = make(replace(VARIANTS[variant], ghosts_last=last), 6, 13, 4).eval()
    x = image(2, 6, 9, 10)
    for _ in range(2):
        kernel, bias = module.equivalent_kernel()
        reach = [(taps - 1) // 2 for taps in kernel.shape[2:]]
        assert kernel.shape[0] == 6 and all(taps % 2 for taps in kernel.shape[2:])
        y = F.conv2d(x[:, module.order], kernel, bias, padding=reach, groups=6)
        torch.testing.assert_close(y, module(x), rtol=1e-11, atol=1e-11)
        module.reparameterize()


def test_no_kernel_is_equivalent_to_what_is_no_convolution():
    for variant in ("embedding", replace(PLAIN, border="same")):
        with pytest.raises(ValueError, match="no convolution at the border"):
            make(variant).equivalent_kernel()
    module = make().train()
    module.wide_norm = nn.BatchNorm2d(len(module.active), track_running_stats=False).double()
    with pytest.raises(ValueError, match="without running statistics"):
        module.equivalent_kernel()
    assert module.eval()(image(2, 6, 5, 5)).shape == (2, 6, 5, 5)


def test_tables_are_the_originals():
    with np.load(GOLDEN / "shiftwise_tables.npz") as golden:
        tables = {name: torch.from_numpy(golden[name]) for name in golden.files}
    sizes = [name.split("|")[0] for name in tables if name.endswith("pad_hv")]
    for name in sizes:
        big, small, channels, shifts = (int(part.lstrip("Kkcg")) for part in name.split("_"))
        filters = -(-big // small)
        wide, tall, picks = arrange(PLAIN, channels, filters, shifts)
        pads = big // 2 - torch.cat((wide, tall), 2).flatten(0, 1) * small - (small - 1)
        assert torch.equal(pads, tables[f"{name}|pad_hv"])
        channel, index, way = (picks == 0).nonzero(as_tuple=True)
        ids = torch.zeros(channels, shifts, dtype=torch.int32)
        ids[channel, way] = (channel * filters + index).int()
        assert torch.equal(ids, tables[f"{name}|idx_identit"])
    ghosts = [name for name in tables if name.startswith("ghost")]
    assert len(ghosts) == 120 and len(sizes) == 7
    for name in ghosts:
        _, version, channels, ratio = name.split("_")
        active, chosen = choose_ghosts(int(channels[1:]), float(ratio[1:]), version == "v2")
        assert torch.equal(chosen, tables[name])
        assert torch.equal(torch.cat((active, chosen)).sort().values, torch.arange(int(channels[1:])))


def test_shuffled_draws_its_picks_anew():
    """One branch is shuffled; its original seeds torch once more before it picks."""
    tables = arrange(VARIANTS["shuffled"], 3, 11, 1)
    generator = torch.Generator().manual_seed(123)
    orders = [torch.randperm(11, generator=generator) for _ in range(3)]
    assert tables.wide[..., 0].eq(torch.arange(11)).all()
    assert all(order[tables.tall[c, :, 0].argsort()].shape == order.shape for c, order in enumerate(orders))
    assert all(torch.equal(tables.tall[c, :, 0].argsort(), order) for c, order in enumerate(orders))
    picks = torch.randint(0, 11, (3,), generator=torch.Generator().manual_seed(123))
    assert torch.equal((tables.small[..., 0] == 0).nonzero()[:, 1], picks)


@pytest.mark.parametrize(("filters", "cells"), [(17, [*range(9)]), (9, [0, 2, 6, 8]), (4, [0, 2, 6, 8]), (3, [4])])
def test_squares(filters, cells):
    table = arrange(VARIANTS["blur"], 5, filters, 3).small
    for column in table.permute(0, 2, 1).flatten(0, 1):
        assert sorted(column[column >= 0].tolist()) == cells
    assert len({tuple(column.tolist()) for column in table.permute(0, 2, 1).flatten(0, 1)}) > 1


def global_numpy_state():
    return np.random.get_state()[1].copy()  # noqa: NPY002


@every_variant
def test_construction_draws_weights_alone_from_the_global_generator(variant):
    """Two networks of different seeds differ, what is drawn afterwards does not depend on the tables."""
    states, numpy_state = [], global_numpy_state()
    for seed in (123, 7):
        torch.manual_seed(5)
        module = ShiftwiseConv2d(6, 13, ghost_ratio=0.3, variant=replace(VARIANTS[variant], seed=seed))
        states.append((torch.get_rng_state(), module.weights[0]))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert np.array_equal(numpy_state, global_numpy_state())
    torch.manual_seed(6)
    other = ShiftwiseConv2d(6, 13, ghost_ratio=0.3, variant=replace(VARIANTS[variant], seed=7))
    assert not torch.equal(other.weights[0], states[1][1])
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), module.buffers(), strict=True))


def test_start():
    module = ShiftwiseConv2d(400, 13, 3, variant="linear")
    assert abs(module.weights[0].std() - 0.02) < 1e-3
    assert module.wide_coefficient.eq(1).all()
    weighted = ShiftwiseConv2d(400, 13, 5, variant="weighted")
    assert -1 <= weighted.tall_coefficient.min() < -0.95 and 0.95 < weighted.tall_coefficient.max() <= 1


@every_variant
def test_state_dict_carries_the_tables(variant):
    module, x = make(variant).eval(), image(1, 6, 9, 9)
    other = make(replace(VARIANTS[variant], seed=9)).eval()
    if module.drawn:
        assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    fresh = make(variant).eval()
    module.reparameterize()
    fresh.reparameterize()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(fresh))(x), module(x))


@every_variant
def test_is_made_on_the_default_device(variant):
    """And without memory, to be filled by a state dict."""
    module, x = make(variant, dtype=torch.float32).eval(), image(1, 6, 9, 9, dtype=torch.float32)
    with torch.device("meta"):
        other = make(variant, dtype=torch.float32)
    assert {t.device.type for t in (*other.parameters(), *other.buffers())} == {"meta"}
    other.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(other.eval()(x), module(x))


@pytest.mark.parametrize("last", [False, True])
def test_keeps_the_memory_format(last):
    module, x = make(replace(PLAIN, ghosts_last=last)), image(2, 6, 9, 7)
    for training in (True, False):
        module.train(training)
        for format_ in (torch.contiguous_format, torch.channels_last):
            leaf = x.clone(memory_format=format_).requires_grad_()
            y = module(leaf)
            assert y.is_contiguous(memory_format=format_)
            torch.testing.assert_close(y, oracle(module, x, training), rtol=1e-10, atol=1e-10)
            y.sum().backward()
            assert leaf.grad.stride() == leaf.stride()


def test_half_types_and_autocast():
    module, x = make(dtype=torch.float32, kernel_size=31), image(2, 6, 9, 9, dtype=torch.float32)
    with torch.no_grad():
        for training in (True, False):
            exact = module.train(training)(x)
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
            assert y.dtype == torch.bfloat16 or training
        low = copy.deepcopy(module).bfloat16()
        torch.testing.assert_close(low(x.bfloat16()).float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


@every_variant
def test_compiles_and_exports(variant):
    module, x = make(variant), image(2, 6, 8, 7)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    module.eval()
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


def test_vmap_and_func_grad():
    module, x = make().eval(), image(3, 2, 6, 7, 7)
    torch.testing.assert_close(torch.vmap(module)(x), torch.stack([module(each) for each in x]))
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, x).square().sum()

    grads = torch.func.grad(loss)(parameters, x[0])
    expected = torch.autograd.grad(loss(parameters, x[0]), [*parameters.values()])
    for grad, want in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(grad, want)


def test_gradgradcheck():
    module, x = make(dim=2, kernel_size=5, ghost_ratio=0).eval(), image(1, 2, 4, 3)

    def run(x, weight):
        return torch.func.functional_call(module, {"weights.0": weight}, x)

    leaves = (x.requires_grad_(), module.weights[0].detach().requires_grad_())
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_square_kernels_and_dense_sums():
    """A small kernel that sticks out of the tall one stays by itself."""
    tall, wide, small = torch.ones(1, 1, 3, 1), torch.ones(1, 1, 1, 3), torch.ones(1, 1, 5, 1)
    paddings = (((1, 1), (0, 0)), ((0, 0), (1, 1)), ((2, 2), (0, 0)))
    kernels = CrossKernels(tall, wide, small, None, paddings)
    assert kernels.merged() is kernels
    assert kernels.dense()[0, 0].tolist() == [[0, 1, 0], [0, 2, 0], [1, 3, 1], [0, 2, 0], [0, 1, 0]]


def test_shows_itself():
    module = ShiftwiseConv2d(80, 51, ghost_ratio=0.23, num_paths=2, num_shifts=4, variant=replace(PLAIN, even=True))
    assert "80, 51, small_kernel_size=3, num_paths=2, num_shifts=4, ghosts=20" in repr(module)
    assert "variant='blur'" in repr(ShiftwiseConv2d(8, 13, variant="blur"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(dim=0), ValueError, "dim must be at least 1"),
        (dict(kernel_size=3.0), TypeError, "kernel_size must be a whole number"),
        (dict(small_kernel_size=0), ValueError, "small_kernel_size must be at least 1"),
        (dict(num_paths=0), ValueError, "num_paths"),
        (dict(num_shifts="4"), TypeError, "num_shifts"),
        (dict(ghost_ratio=1.0), ValueError, r"ghost_ratio must be in \[0, 1\) and leave channels"),
        (dict(ghost_ratio=-0.1), ValueError, "ghost_ratio"),
        (dict(ghost_ratio="a"), TypeError, "ghost_ratio must be a number"),
        (dict(variant="linaer"), ValueError, "unknown variant 'linaer'; did you mean 'linear'"),
        (dict(variant=3), TypeError, "variant must be a name or a ShiftwiseVariant, got int"),
        (dict(variant="split", num_shifts=2), ValueError, "num_shifts must be 1 for kernels in their own order, got 2"),
    ],
    ids=str,
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        ShiftwiseConv2d(**dict(dim=8, kernel_size=13) | arguments)


def test_refusals_of_variants_and_maps():
    with pytest.raises(ValueError, match="unknown border 'sane'; did you mean 'same'"):
        ShiftwiseVariant(border="sane")  # type: ignore
    for wrong in (dict(separate=True), dict(coefficient="sigmoid"), dict(wide="ordered", coefficient="linear")):
        with pytest.raises(ValueError, match="need"):
            ShiftwiseVariant(**wrong)
    with pytest.raises(ValueError, match="constants need"):
        ShiftwiseVariant(constants=True, small="square")
    for shape in ((2, 5, 8, 8), (6, 8, 8)):
        with pytest.raises(ValueError, match=r"takes x \[N, 6, H, W\], got \["):
            make()(torch.zeros(shape))
