"""The learned shifts: the papers' layers and the original modules (goldens), how they start, and what they learn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shiftconv.nn import (
    ActiveShift1d,
    ActiveShift2d,
    ActiveShift3d,
    Shift2d,
    SparseShift1d,
    SparseShift2d,
    SparseShift3d,
    emulate_depthwise,
)

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "learned.json").read_text())
MODULES = [case for case in CASES if "dim" in case]
PAPERS = [case for case in CASES if "kind" in case]
SPARSE = {1: SparseShift1d, 2: SparseShift2d, 3: SparseShift3d}
CONVS = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
EVERY = [SparseShift1d, SparseShift2d, SparseShift3d, ActiveShift1d, ActiveShift2d, ActiveShift3d]


def golden(name: str, *keys: str) -> list[Tensor]:
    with np.load(GOLDEN / "learned.npz") as arrays:
        return [torch.from_numpy(arrays[f"{name}/{key}"]) for key in keys]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", MODULES, ids=lambda case: case["name"])
def test_equals_the_original_sparse_modules(case):
    """Where the original's output has the size of the convolution; its mean over a stride is taken afterwards here."""
    x, offset, out, loss = golden(case["name"], "x", "w", "out", "loss")
    channels, ndim = x.shape[1], case["dim"]
    emulated = case["emulate_dw"] or dict(kernel_size=1)
    stride = emulated.get("stride", 1)
    if 2 * emulated.get("padding", 0) > emulated["kernel_size"] - 1:
        emulated = dict(kernel_size=1)  # the original never enlarges the map
    conv = CONVS[ndim](channels, channels, **emulated | dict(stride=1), groups=channels)
    shift = emulate_depthwise(conv) if case["emulate_dw"] else SPARSE[ndim](channels)
    with torch.no_grad():
        shift.offset.copy_(offset[:channels])
        torch.testing.assert_close(POOLS[ndim](shift(x), stride, stride, ceil_mode=True), out)
    whole = SPARSE[ndim](len(offset)).double()
    whole.load_state_dict({"offset": offset})
    torch.testing.assert_close(5e-4 * whole.offset_penalty(), loss)


@pytest.mark.parametrize("case", PAPERS, ids=lambda case: case["name"])
def test_equals_the_authors_layers(case):
    """Their sign is the other one; the sparse layer's offset gradient is compared with the exact one."""
    active = case["kind"] == "asl"
    names = ("ypos", "xpos", "grad_ypos", "grad_xpos") if active else ("a", "b", "exact_grad_a", "exact_grad_b")
    x, out, grad, grad_x, down, right, *grads = golden(case["name"], "x", "out", "grad_out", "grad_x", *names)
    stride, pad = case.get("stride", 1), case.get("pad", 0)
    kind = ActiveShift2d if active else SparseShift2d
    shift = kind(x.shape[1], crop=((-pad, -pad), (-pad, -pad)), stride=stride).to(down.dtype)
    with torch.no_grad():
        shift.offset.copy_(-torch.stack((down, right), 1))
    x = x.to(out.dtype).requires_grad_()
    y = shift(x)
    y.backward(grad.to(out.dtype))
    torch.testing.assert_close(y, out)
    torch.testing.assert_close(x.grad, grad_x)
    assert shift.offset.grad is not None
    close = {torch.float32: 1e-5, torch.float64: 1e-9}[out.dtype]  # sums over maps of that dtype
    torch.testing.assert_close(-shift.offset.grad, torch.stack(grads, 1).to(down.dtype), rtol=close, atol=close)


@pytest.mark.parametrize("make", EVERY)
def test_starts_between_the_range(make):
    shift = make(4000, 2.0, generator=seeded())
    assert shift.offset.shape == (4000, shift.ndim) and shift.offset.dtype == torch.float32
    assert [name for name, _ in shift.named_parameters()] == ["offset"] == [*shift.state_dict()]
    assert shift.offset.abs().max() <= 2
    quartiles = torch.quantile(shift.offset.detach(), torch.tensor([0.25, 0.5, 0.75]), dim=0)
    torch.testing.assert_close(quartiles, torch.tensor([[-1.0], [0], [1]]).expand_as(quartiles), atol=0.1, rtol=0)


def test_range_of_each_axis():
    shift = ActiveShift2d(4000, (0.5, (-1, 3)), generator=seeded())
    low, high = shift.offset.detach().amin(0), shift.offset.detach().amax(0)
    torch.testing.assert_close(torch.stack((low, high)), torch.tensor([[-0.5, -1.0], [0.5, 3.0]]), atol=0.02, rtol=0)
    assert ActiveShift2d(8, 0.0).offset.eq(0).all()


def test_signed_init_draws_a_sign_for_every_entry():
    """Not one for the whole tensor; and the sides of a lopsided range have equal shares, which uniform's have not."""
    shift = SparseShift2d(4000, ((-1.0, 3.0), (-2.0, 2.0)), init="signed", generator=seeded())
    offset = shift.offset.detach()
    up, right = offset.unbind(1)
    for value, low, high in ((up, -1, 3), (right, -2, 2)):
        assert abs((value > 0).float().mean() - 0.5) < 0.03
        assert low <= value.min() < 0.97 * low and 0.97 * high < value.max() <= high
        assert abs(value[value > 0].mean() - high / 2) < 0.05 and abs(value[value < 0].mean() - low / 2) < 0.05
    assert abs(((up > 0) == (right > 0)).float().mean() - 0.5) < 0.03
    uniform = SparseShift2d(4000, ((-1.0, 3.0), (-2.0, 2.0)), generator=seeded())
    assert abs((uniform.offset[:, 0] > 0).float().mean() - 0.75) < 0.03


def test_grid_init_is_nine_groups():
    shift = SparseShift2d(20, init="grid")
    taps = [[a, b] for a in (-1, 0, 1) for b in (-1, 0, 1)]
    assert shift.offset.tolist() == [tap for tap in taps for _ in range(2)] + [[0, 0]] * 2
    assert SparseShift1d(7, ((-2, 1),), init="grid").offset.flatten().tolist() == [-2, -1, 0, 1, 0, 0, 0]
    assert SparseShift3d(26, init="grid").offset.eq(0).all()  # fewer channels than taps


def test_draws_from_the_given_generator_only():
    state = torch.get_rng_state()
    one, two = (ActiveShift2d(9, init=init, generator=seeded(3)) for init in ("uniform", "uniform"))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(one.offset, two.offset)
    torch.manual_seed(5)
    first = ActiveShift2d(9).offset.detach()
    torch.manual_seed(5)
    one.reset_parameters()
    assert torch.equal(one.offset, first)


def test_made_where_the_context_says():
    with torch.device("meta"):
        shift = SparseShift2d(9, init="signed")
    assert shift.offset.is_meta
    shift.to_empty(device="cpu").reset_parameters(seeded(1))
    assert torch.equal(shift.offset, SparseShift2d(9, init="signed", generator=seeded(1)).offset)


def test_penalty_trains():
    shift = SparseShift2d(5, generator=seeded())
    (3 * shift.offset_penalty()).backward()
    assert shift.offset.grad is not None
    assert torch.equal(shift.offset.grad, 3 * shift.offset.detach().sign())
    assert shift.to(torch.bfloat16).offset_penalty().dtype == torch.float32


@pytest.mark.parametrize("make", EVERY)
def test_normalized_gradient_has_unit_length(make):
    plain = make(6, generator=seeded()).double()
    unit = make(6, normalize_gradient=True).double()
    unit.load_state_dict(plain.state_dict())
    x = image(2, 6, *(5, 6, 4)[: plain.ndim]).requires_grad_()
    weight = image(*x.shape, seed=1)
    weight[:, 0] = 0  # a channel without gradient
    weight[:, 1] *= 1e-200  # and one whose square underflows
    grads = [torch.autograd.grad((shift(x) * weight).sum(), (x, shift.offset)) for shift in (plain, unit)]
    assert torch.equal(plain(x), unit(x)) and torch.equal(grads[0][0], grads[1][0])
    assert grads[1][1][0].eq(0).all()
    torch.testing.assert_close(grads[1][1][1:].norm(dim=1), torch.ones(5, dtype=torch.float64))
    scaled = grads[0][1][2:]
    torch.testing.assert_close(grads[1][1][2:], scaled / scaled.norm(dim=1, keepdim=True))


def test_normalized_gradient_leaves_the_penalty_alone():
    shift = ActiveShift2d(3, normalize_gradient=True, generator=seeded())
    (0.5 * shift.offset_penalty() + 0 * shift(torch.ones(1, 3, 4, 4)).sum()).backward()
    assert shift.offset.grad is not None and torch.equal(shift.offset.grad, 0.5 * shift.offset.detach().sign())


def test_normalized_gradient_under_transforms():
    shift = ActiveShift2d(3, normalize_gradient=True, generator=seeded()).double()
    x = image(4, 3, 5, 5)

    def loss(offset: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(shift, {"offset": offset}, (x[None],)).square().sum()

    offset = shift.offset.detach()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(offset, x)
    torch.testing.assert_close(each.norm(dim=2), torch.ones(4, 3, dtype=torch.float64))
    torch.testing.assert_close(each[2], torch.func.grad(loss)(offset, x[2]))


def test_hardened_shift_is_the_same():
    shift = SparseShift2d(40, 3.0, "reflect", ((1, -2), (0, 1)), (2, 1), generator=seeded()).eval()
    with torch.no_grad():
        shift.offset[:4] = torch.tensor([[0.5, 1.5], [2.5, -0.5], [-1.5, -2.5], [0.4999, -0.5001]])
    hard = shift.harden()
    assert type(hard) is Shift2d and hard.offset.dtype == torch.int64 and not hard.training
    assert hard.offset[:4].tolist() == [[0, 2], [2, 0], [-2, -2], [0, -1]]  # halves to even
    x = image(2, 40, 7, 6)
    assert torch.equal(hard(x), shift(x))
    assert not [*hard.parameters()] and [*hard.state_dict()] == ["offset"]
    assert torch.equal(shift.fuse().offset, hard.offset)


def test_diverged_offsets_are_refused():
    shift = SparseShift2d(3)
    with torch.no_grad():
        shift.offset[1, 0] = float("nan")
    with pytest.raises(ValueError, match="SparseShift2d has offsets that are NaN or infinite"):
        shift.harden()
    with pytest.raises(ValueError, match="SparseShift2d has offsets that are NaN or infinite"):
        shift.equivalent_kernel()
    with pytest.raises(ValueError, match="offset must be finite"):
        shift(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("make", [SparseShift2d, ActiveShift2d])
def test_recovers_an_offset(make):
    """The toy task on which the original's gradients diverge: find the shift by (2, -1) of a smooth image."""
    grid = torch.linspace(0, 6.28, 24)
    x = torch.stack([torch.sin(grid + i)[:, None] * torch.cos(grid * (1 + i % 2)) for i in range(4)])[None]
    target = torch.roll(x, (2, -1), (2, 3))
    shift = make(4, 0.0, "circular", normalize_gradient=True)
    optimizer = torch.optim.SGD(shift.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(shift(x), target).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.93
    assert F.mse_loss(shift(x), target) < 1e-3
    assert shift.offset.round().tolist() == [[2, -1]] * 4


def test_repr_says_what_is_not_usual():
    assert repr(SparseShift2d(9)) == "SparseShift2d(9, init_range=1.0)"
    shift = ActiveShift1d(9, ((-1, 2),), "circular", ((1, 0),), 2, "signed", True)
    text = "9, init_range=(-1.0, 2.0), padding_mode='circular', crop=((1, 0),), stride=(2,), init='signed'"
    assert repr(shift) == f"ActiveShift1d({text}, normalize_gradient=True)"
    assert "init_range=(1.0, 2.0)" in repr(ActiveShift2d(3, (1, 2)))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "channels must be a whole number, got 9.0", dict(channels=9.0)),
        (ValueError, "channels must be at least 1, got 0", dict(channels=0)),
        (ValueError, "init_range must be a finite number of at least 0 .* got -1", dict(init_range=-1)),
        (ValueError, "init_range must be a finite number .* got nan", dict(init_range=float("nan"))),
        (ValueError, r"init_range .* or a rising pair per axis, got \(2, 1\)", dict(init_range=(1, (2, 1)))),
        (ValueError, r"init_range must be one number or 2, .* got \(1, 2, 3\)", dict(init_range=(1, 2, 3))),
        (TypeError, "init_range must be a number or a pair .* got '1'", dict(init_range="1")),
        (TypeError, "init_range must be a number or a pair .* got True", dict(init_range=(1, True))),
        (ValueError, "init 'grid' takes whole numbers as init_range, got 0.5", dict(init_range=0.5, init="grid")),
        (ValueError, "unknown init 'uniforn'; did you mean 'uniform'", dict(init="uniforn")),
        (ValueError, "unknown padding_mode 'zero'; did you mean 'zeros'", dict(padding_mode="zero")),
        (ValueError, r"crop must be none or 2 pairs .* got \(1, 1\)", dict(crop=(1, 1))),
        (ValueError, r"crop must be none or 2 pairs .* got \(\(1, 1\),\)", dict(crop=((1, 1),))),
        (TypeError, "crop must be of whole numbers", dict(crop=((1, 1.0), (0, 0)))),
        (ValueError, "stride must be at least 1, got 0", dict(stride=(1, 0))),
    ],
)  # fmt: skip
def test_bad_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        SparseShift2d(**dict(channels=9) | arguments)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[C, D\] = \[8, 2\] .* got \[9, 2\]"):
        ActiveShift2d(9)(torch.zeros(1, 8, 4, 4))
    with pytest.raises(TypeError, match="floating point x"):
        ActiveShift2d(9)(torch.zeros(1, 9, 4, 4, dtype=torch.int32))
