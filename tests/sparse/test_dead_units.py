"""Which hidden units go, which must stay, and that nothing else changes; by small models in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from shiftconv.models.large_kernel_block import ResponseNorm
from shiftconv.sparse.chains import chains
from shiftconv.sparse.dead_units import drop_dead_units

ROWS, COLUMNS = [1, 4], [2, 5]  # units, of eight, whose row, or column, is zero


def made(*between, first=None, last=None, seed=0):
    """A chain in which everything counts: no bias, statistic or weight is zero or one."""
    model = nn.Sequential(first or nn.Linear(3, 8), *between, last or nn.Linear(8, 2)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
                if name.endswith("var"):
                    value.abs_().add_(0.5)
    return model


def maps(*between, padding=0, **first):
    return made(*between, first=nn.Conv2d(3, 8, 3, **first), last=nn.Conv2d(8, 2, 3, padding=padding))


@torch.no_grad()
def kill(model, rows=(), columns=(), biases=True):
    rows, columns = [*rows], [*columns]
    model[0].weight[rows] = 0
    if biases and model[0].bias is not None:
        model[0].bias[rows] = 0
    model[-1].weight[:, columns] = 0
    return model


def images(model):
    shape = (
        (2, 3, 9, 8) if isinstance(model[0], nn.Conv2d) else (2, 3, 9) if isinstance(model[0], nn.Conv1d) else (5, 3)
    )
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dropped(model, multiple_of=1):
    """How many units go; the outputs must be those of before."""
    x = images(model)
    before = model(x)
    (chain,) = chains(model)
    count = drop_dead_units(chain, multiple_of)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert chain.units == 8 - count
    return count


class Divide(nn.Module):
    def forward(self, x):
        return 1 / x


GO = {
    "rows": lambda: kill(made(nn.GELU()), ROWS),
    "columns": lambda: kill(made(nn.GELU()), columns=COLUMNS),
    "constants go into the bias": lambda: kill(made(nn.GELU()), ROWS, biases=False),
    "in place": lambda: kill(made(nn.ReLU(inplace=True)), ROWS, biases=False),
    "that are not read, of which zero would be no number": lambda: kill(made(nn.Hardtanh(), Divide()), columns=COLUMNS),
    "of sigmoids": lambda: kill(made(nn.Sigmoid()), ROWS),
    "without a bias to go to": lambda: kill(made(nn.Sigmoid(), last=nn.Linear(8, 2, bias=False)), ROWS),
    "without a bias that makes them": lambda: kill(made(nn.Sigmoid(), first=nn.Linear(3, 8, bias=False)), ROWS),
    "through a norm": lambda: kill(made(nn.BatchNorm1d(8), nn.Tanh()), ROWS),
    "through a norm without weights": lambda: kill(made(nn.BatchNorm1d(8, affine=False), nn.Tanh()), ROWS),
    "through activations that learn": lambda: kill(made(nn.PReLU(8)), ROWS, biases=False),
    "of one slope": lambda: kill(made(nn.PReLU()), ROWS, biases=False),
    "through dropout": lambda: kill(made(nn.Dropout(0.5), nn.ReLU()), ROWS),
    "maps": lambda: kill(maps(nn.Sigmoid()), ROWS),
    "maps through a norm": lambda: kill(maps(nn.BatchNorm2d(8), nn.ReLU(inplace=True)), ROWS),
    "maps through a norm that activates": lambda: kill(maps(BatchNormAct2d(8)), ROWS),
    "maps through depthwise kernels": lambda: kill(maps(nn.Sigmoid(), nn.Conv2d(8, 8, 3, groups=8)), ROWS),
    "that wrap around": lambda: kill(
        maps(nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", groups=8)), ROWS
    ),
    "maps that are pooled": lambda: kill(maps(nn.Sigmoid(), nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1)), ROWS),
    "zeros that are padded": lambda: kill(maps(nn.GELU(), padding=1), ROWS),
    "zeros that are padded twice": lambda: kill(
        maps(nn.GELU(), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), padding=1), ROWS
    ),
    "columns of padded maps": lambda: kill(maps(nn.Sigmoid(), padding=1), columns=COLUMNS),
    "signals": lambda: kill(
        made(nn.BatchNorm1d(8), nn.Tanh(), first=nn.Conv1d(3, 8, 3), last=nn.Conv1d(8, 2, 3)), ROWS
    ),
}


@pytest.mark.parametrize("model", GO.values(), ids=GO)
def test_go(model):
    assert dropped(model()) == 2


STAY = {
    "all that live": lambda: made(nn.GELU()),
    "of a row": lambda: one_weight(kill(made(nn.GELU()), ROWS)),
    "constants that are padded": lambda: kill(maps(nn.GELU(), padding=1), ROWS, biases=False),
    "half, the sigmoid of zero": lambda: kill(maps(nn.Sigmoid(), padding=1), ROWS),
    "shifts of norms": lambda: kill(maps(nn.BatchNorm2d(8), padding=1), ROWS),
    "constants before kernels that pad": lambda: kill(
        maps(nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1, groups=8)), ROWS
    ),
    "biases of kernels that are padded": lambda: kill(maps(nn.Conv2d(8, 8, 3, groups=8), padding=1), ROWS),
    "constants in means over zeros": lambda: kill(maps(nn.Sigmoid(), nn.AvgPool2d(3, 1, 1)), ROWS),
    "no numbers": lambda: kill(made(nn.Hardtanh(), Divide()), ROWS),
}


def one_weight(model):
    with torch.no_grad():
        model[0].weight[ROWS, 2] = 1e-300
    return model


@pytest.mark.parametrize("model", STAY.values(), ids=STAY)
def test_stay(model):
    model = model()
    (chain,) = chains(model)
    before = copy.deepcopy(model.state_dict())
    assert drop_dead_units(chain) == 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_tests_of_constants_see_them():
    """A constant that is dropped, and not moved, makes a difference."""
    model = GO["of sigmoids"]()
    x, before = images(model), model(images(model))
    with torch.no_grad():
        model[-1].weight[:, ROWS] = 0
    assert (model(x) - before).abs().min() > 1e-3


def test_kernels_and_norms_of_zero_make_constants_too():
    model = maps(nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
    with torch.no_grad():
        model[2].weight[3] = 0
        model[3].weight[6] = 0
    assert dropped(model) == 2


def test_rows_and_columns_at_once():
    assert dropped(kill(made(nn.GELU()), ROWS, COLUMNS)) == 4


def test_numbers_are_rounded_up():
    for multiple, left in ((1, 3), (2, 4), (3, 3), (4, 4), (5, 5), (8, 8), (16, 8)):
        assert dropped(kill(made(nn.GELU()), [0, 1, 2, 5, 6]), multiple) == 8 - left
    model = kill(made(nn.GELU()), [0, 1, 2, 5, 6])
    assert [dropped(model, 2), drop_dead_units(chains(model)[0], 2)] == [4, 0]


def test_one_stays():
    model = kill(made(nn.GELU()), range(8), biases=False)
    assert dropped(model) == 7
    assert model[0].weight.shape == (1, 3)
    assert drop_dead_units(chains(model)[0]) == 0
    assert dropped(kill(made(nn.GELU()), columns=range(8)), 8) == 7


class Mixed(nn.Module):
    """A response norm between two linear layers, on maps."""

    def __init__(self, bias):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(3, 8), ResponseNorm(8), nn.Linear(8, 2)
        if not bias:
            self.norm.bias = None

    def forward(self, x):
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


@pytest.mark.parametrize("bias", [True, False])
def test_channels_that_meet(bias):
    """Only zeros may leave a response norm, but its bias makes constants of them."""
    model = Mixed(bias).double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
        model.fc1.weight[ROWS] = 0
        model.fc1.bias[ROWS] = 0
        model.fc1.weight[6] = 0  # a constant, but none of zero
        model.fc2.weight[:, COLUMNS] = 0  # not read, but seen by the others
        model.fc2.weight[:, ROWS[0]] = 0
    before = model(x)
    for left in (6, 6):
        drop_dead_units(chains(model)[0])
        assert model.fc1.out_features == len(model.norm.weight) == model.fc2.in_features == left
        torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert str(model.norm) == f"ResponseNorm(6 of 8, eps=1e-06, bias={bias})"


def test_layers_say_what_they_are():
    model = kill(maps(nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3, groups=8)), ROWS)
    dropped(model)
    conv, norm, relu, depthwise, last = model
    assert (conv.out_channels, norm.num_features, relu.num_parameters) == (6, 6, 6)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups, last.in_channels) == (6, 6, 6, 6)
    assert norm.num_batches_tracked.ndim == 0
    expected = dict.fromkeys(["0.bias", "2.weight", "3.bias"], (6,))
    expected |= {f"1.{name}": (6,) for name in ("weight", "bias", "running_mean", "running_var")}
    expected |= {"0.weight": (6, 3, 3, 3), "3.weight": (6, 1, 3, 3), "4.weight": (2, 6, 3, 3), "4.bias": (2,)}
    assert {key: (*value.shape,) for key, value in model.state_dict().items() if value.ndim} == expected


def test_formats_and_gradients_are_kept():
    model = kill(maps(nn.ReLU()), ROWS).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    dropped(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    dense = kill(maps(nn.ReLU()), ROWS)
    dropped(dense)
    assert dense[0].weight.is_contiguous()
    assert dense[2].weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype):
    model = kill(made(nn.Sigmoid()), ROWS).to(dtype)
    x = images(model).to(dtype)
    before = model(x)
    assert drop_dead_units(chains(model)[0]) == 2
    torch.testing.assert_close(model(x), before)
    assert all(value.dtype is dtype for value in model.parameters())
