"""Moved channels side by side: the folded network computes the same, in place, and leaves the others alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from shiftconv.nn import (
    ActiveShift2d,
    GroupShift1d,
    GroupShift2d,
    PartialShift1d,
    PartialShift2d,
    PartialShift3d,
    Shift2d,
    SparseShift2d,
    SparseShift3d,
    fold_shift,
    fold_shifts,
)
from shiftconv.ops import shift

RANKS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
PARTIAL = {1: PartialShift1d, 2: PartialShift2d, 3: PartialShift3d}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers: their sums are exact in every order."""
    return torch.randint(-4, 5, shape, generator=seeded(seed)).double()


def filled(module: nn.Module) -> nn.Module:
    """Whole numbers everywhere; a variance and its eps of 0.5 make 1, 4 or 16, so that a norm is exact, too."""
    for i, (name, values) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        if name.endswith("running_var"):
            values.data = 4.0 ** (whole(*values.shape, seed=i).long() % 3) - 0.5
        elif values.is_floating_point() and not name.endswith("offset"):
            values.data = whole(*values.shape, seed=i)
    return module.double().eval()


def offsets(channels: int, ndim: int, still: int, seed: int = 0) -> Tensor:
    offset = torch.randint(-2, 3, (channels, ndim), generator=seeded(seed))
    offset[torch.randperm(channels, generator=seeded(seed))[:still]] = 0
    return offset


def sparse_block(channels: int = 12, still: int = 7, padding_mode="zeros") -> nn.Sequential:
    moving = SparseShift2d(channels, padding_mode=padding_mode)
    moving.offset.data = offsets(channels, 2, still) + 0.4
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels, eps=0.5), nn.PReLU(channels),
        moving, nn.Conv2d(channels, 5, 1, stride=2),
    )  # fmt: skip


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("still", [0, 3, 7])
@pytest.mark.parametrize("inplace", [False, True])
def test_partial_shift_is_the_shift_of_the_first_channels(ndim, still, inplace):
    moved = offsets(7 - still, ndim, 0)
    partial = PARTIAL[ndim](7, moved, "reflect", inplace)
    x = torch.randn(2, 7, *(6, 5, 4)[:ndim], generator=seeded())
    expected = shift(x, torch.cat((moved, moved.new_zeros(still, ndim))), "reflect")
    given = x.clone()
    y = partial(given)
    assert torch.equal(y, expected)
    assert (y.data_ptr() == given.data_ptr()) == (inplace or still == 7)
    assert torch.equal(given, expected if inplace else x)
    x = x.double().requires_grad_()  # where a gradient is recorded, nothing is overwritten
    grad = torch.randn(x.shape, generator=seeded(1), dtype=x.dtype)
    (got,) = torch.autograd.grad(partial(x), x, grad)
    (want,) = torch.autograd.grad(shift(x, torch.cat((moved, moved.new_zeros(still, ndim))), "reflect"), x, grad)
    assert torch.equal(got, want)


def test_partial_shift_keeps_the_memory_format():
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    for inplace in (False, True):
        y = PartialShift2d(8, [[1, 0]] * 3, inplace=inplace)(x.clone(memory_format=torch.preserve_format))
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate", "circular", "reflect", "symmetric"])
def test_folded_network_is_the_same(padding_mode):
    model = filled(sparse_block(padding_mode=padding_mode))
    x = whole(2, 3, 7, 6, seed=9)
    expected = model(x)
    parameters = [id(p) for p in (*model[0].parameters(), *model[4].parameters())]
    model[3] = fold_shift(model[0], [model[1], model[2]], model[3], model[4])
    assert type(model[3]) is PartialShift2d and model[3].inplace and model[3].offset.shape[0] <= 5
    assert model[3].offset.any(1).all() and model[3].offset.tolist() == sorted(model[3].offset.tolist())
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)  # as it is with gradients
    assert [id(p) for p in (*model[0].parameters(), *model[4].parameters())] == parameters


def test_channels_that_stay_are_not_touched():
    model = filled(sparse_block())
    folded = fold_shift(model[0], [], model[3], model[4])
    x = torch.randn(1, 12, 4, 4)
    before, pointer = x.clone(), x.data_ptr()
    y = folded(x)
    moved = folded.offset.shape[0]
    assert y.data_ptr() == pointer and torch.equal(y[:, moved:], before[:, moved:])
    assert not torch.equal(y[:, :moved], before[:, :moved])


@pytest.mark.parametrize("ndim", [1, 3])
def test_other_ranks_and_integer_shifts(ndim):
    conv, norm = RANKS[ndim]
    moving = GroupShift1d(10) if ndim == 1 else SparseShift3d(10, 3.0, generator=seeded())
    model = filled(nn.Sequential(conv(2, 10, 1, bias=False), norm(10, eps=0.5), moving, nn.ReLU(), conv(10, 4, 1)))
    x = whole(2, 2, *(7, 6, 5)[:ndim])
    expected = model(x)
    model[2] = fold_shift(model[0], [model[1]], moving, model[4])
    assert torch.equal(model(x), expected)


def test_nothing_moves():
    model = filled(sparse_block())
    model[3].offset.data.zero_()
    x = whole(1, 3, 5, 5)
    expected = model(x)
    assert fold_shifts(model) == 1
    assert torch.equal(model(x), expected) and repr(model[3]) == "PartialShift2d(12, moved=0, inplace=True)"


def test_folds_every_chain_of_a_sequential():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8, eps=0.5), nn.ReLU())
    act = nn.ReLU()
    model = nn.Sequential(
        sparse_block(), act, nn.Conv2d(5, 6, 1), GroupShift2d(6), inner, act, SparseShift2d(8, 2.0), nn.Conv2d(8, 4, 1),
        ActiveShift2d(4), nn.Conv2d(4, 4, 1), GroupShift2d(4), nn.ChannelShuffle(2), nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    filled(model)
    x = whole(1, 3, 9, 9)
    expected = model(x)
    assert fold_shifts(model) == 3
    kinds = [type(model[i]) for i in (3, 6, 8, 10)]
    assert kinds == [PartialShift2d, PartialShift2d, ActiveShift2d, GroupShift2d]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-9)
    assert fold_shifts(model) == 0


def test_a_module_that_comes_twice_is_seen_twice():
    shuffle = nn.ChannelShuffle(3)
    conv = nn.Conv2d(9, 9, 1)
    assert fold_shifts(nn.Sequential(shuffle, conv, shuffle, GroupShift2d(9), nn.Conv2d(9, 9, 1))) == 0
    assert fold_shifts(nn.Sequential(shuffle, conv, GroupShift2d(9), nn.Conv2d(9, 9, 1), shuffle)) == 1


def test_weights_used_elsewhere_stay():
    shared = nn.Conv2d(9, 9, 1)
    model = nn.Sequential(shared, GroupShift2d(9), nn.Conv2d(9, 9, 1), nn.ReLU(), shared)
    before = copy.deepcopy(model.state_dict())
    assert fold_shifts(model) == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_folded_network_keeps_its_state():
    model = filled(sparse_block())
    fold_shifts(model)
    again = copy.deepcopy(model)
    again[3] = PartialShift2d(12, torch.zeros_like(model[3].offset), inplace=True)
    again.load_state_dict(model.state_dict())
    x = whole(1, 3, 5, 5)
    assert torch.equal(again(x), model(x))


def conv(inputs: int = 9, outputs: int = 9, **arguments) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **arguments)


@pytest.mark.parametrize(
    ("error", "match", "before", "between", "moving", "after"),
    [
        (TypeError, "only a shift by whole pixels .* got ActiveShift2d", conv(), [], ActiveShift2d(9), conv()),
        (TypeError, "expected an nn.Conv1d, .* got Linear", nn.Linear(9, 9), [], GroupShift2d(9), conv()),
        (ValueError, "9 channels lie between 8 outputs and 9 inputs", conv(9, 8), [], GroupShift2d(9), conv()),
        (ValueError, "crop or stride cannot", conv(), [], SparseShift2d(9, stride=2), conv()),
        (ValueError, "crop or stride cannot", conv(), [], Shift2d([[0, 1]] * 9, crop=[(1, 0), (0, 0)]), conv()),
        (ValueError, "with 3 groups", conv(), [], GroupShift2d(9), conv(groups=3)),
        (ValueError, "with 9 groups", conv(groups=9), [], GroupShift2d(9), conv()),
        (ValueError, "Conv2d beside it has another number of axes", conv(), [], GroupShift1d(9), conv()),
        (ValueError, "ChannelShuffle between is not known", conv(), [nn.ChannelShuffle(3)], GroupShift2d(9), conv()),
        (ValueError, "BatchNorm2d between has 8 channels", conv(), [nn.BatchNorm2d(8)], GroupShift2d(9), conv()),
        (
            ValueError,
            "the weight of .*Conv2d is computed from others",
            nn.utils.parametrizations.weight_norm(conv()),
            [],
            GroupShift2d(9),
            conv(),
        ),
    ],
)
def test_refusals_change_nothing(error, match, before, between, moving, after):
    modules = nn.ModuleList([before, *between, moving, after])
    state = copy.deepcopy(modules.state_dict())
    with pytest.raises(error, match=match):
        fold_shift(before, between, moving, after)
    assert all(torch.equal(state[key], value) for key, value in modules.state_dict().items())


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "PartialShift2d takes integer offsets, got torch.float32", (9, [[0.0, 1.0]])),
        (ValueError, r"offset must be \[M, 2\], M at most 9, got \[10, 2\]", (9, [[0, 1]] * 10)),
        (ValueError, r"offset must be \[M, 2\], M at most 9, got \[1, 3\]", (9, [[0, 1, 2]])),
        (ValueError, "unknown padding_mode 'zero'; did you mean 'zeros'", (9, [[0, 1]], "zero")),
    ],
)
def test_bad_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        PartialShift2d(*arguments)


def test_bad_input():
    with pytest.raises(ValueError, match=r"takes x \[N, 9, \*S\] with 2 spatial axes, got \[1, 8, 4, 4\]"):
        PartialShift2d(9, [[0, 1]])(torch.zeros(1, 8, 4, 4))
