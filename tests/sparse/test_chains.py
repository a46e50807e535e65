"""Where hidden units are found, and above all where none are."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision
from timm.layers import BatchNormAct2d, Mlp, ScaledStdConv2d
from torch import nn

from shiftconv.models.large_kernel_block import UNIREP, Block
from shiftconv.nn import LargeKernelConv2d
from shiftconv.sparse.chains import chains


class Hidden(nn.Module):
    """Two layers with a function between."""

    def __init__(self, between, first=None, last=None):
        super().__init__()
        self.first, self.last = first or nn.Linear(3, 8), last or nn.Linear(8, 2)
        self.between = between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Bottleneck(nn.Module):
    """A ReLU in two places, and a residual that reads what comes in."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Around(nn.Module):
    """Axes move between and around the layers."""

    def __init__(self, way, rows=False):
        super().__init__()
        self.conv, self.linear, self.way, self.rows = nn.Conv2d(3, 8, 1), nn.Linear(8, 2), way, rows

    def forward(self, x):
        x = self.conv(x)
        return self.linear(self.way(x.permute(0, 2, 3, 1) if self.rows else x))


class Leaning(nn.Module):
    """Does not couple channels until it has learned to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.weight * x.mean()


def sequence(*between, first=None, last=None):
    return nn.Sequential(first or nn.Linear(3, 8), *between, last or nn.Linear(8, 2))


def conv_sequence(*between, **last):
    return sequence(*between, first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 2, 3, **last))


def names(model):
    return [(chain.producer_name, chain.consumer_name) for chain in chains(model)]


FOUND = {
    "sequence": sequence(nn.GELU(), nn.Dropout(0.1)),
    "nothing between": sequence(),
    "nested sequences": nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 2))),
    "timm's": Mlp(3, 8, 2, drop=0.1),
    "F.relu": Hidden(F.relu),
    "torch.relu": Hidden(torch.relu),
    "method": Hidden(lambda x: x.relu()),
    "in place": Hidden(lambda x: x.mul_(2)),
    "scalars": Hidden(lambda x: (2 * x + 1).clamp(0, 6)),
    "PReLU": sequence(nn.PReLU(8)),
    "one PReLU": sequence(nn.PReLU()),
    "BatchNorm1d": sequence(nn.BatchNorm1d(8), nn.ReLU()),
    "maps": conv_sequence(nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout2d(0.1)),
    "padding": conv_sequence(nn.ReLU(), padding=1),
    "depthwise": conv_sequence(nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.ReLU()),
    "norm with activation": conv_sequence(BatchNormAct2d(8)),
    "pooling": conv_sequence(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4)),
    "pooled to one": sequence(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), first=nn.Conv2d(3, 8, 3)),
    "signals": sequence(nn.BatchNorm1d(8), nn.ReLU(), first=nn.Conv1d(3, 8, 3), last=nn.Conv1d(8, 2, 1)),
    "volumes": sequence(nn.BatchNorm3d(8), nn.ReLU(), first=nn.Conv3d(3, 8, 3), last=nn.Conv3d(8, 2, 1)),
    "permuted": Around(lambda x: x.permute(0, 2, 3, 1).relu()),
    "permuted by names": Around(lambda x: torch.permute(x, dims=(0, -2, -1, 1))),
    "tokens": Around(lambda x: x.flatten(2).transpose(1, 2)),
    "tokens by names": Around(lambda x: torch.transpose(torch.flatten(x, start_dim=2), dim0=1, dim1=2)),
    "any order of axes": Around(lambda x: x.swapaxes(-1, 1).contiguous().transpose(2, 3).transpose(2, 3)),
}


@pytest.mark.parametrize("model", FOUND.values(), ids=FOUND)
def test_found(model):
    (chain,) = chains(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    assert (chain.producer, chain.consumer) == (layers[0], layers[-1])
    assert chain.units == 8
    assert model.get_submodule(chain.producer_name) is chain.producer
    assert model.get_submodule(chain.consumer_name) is chain.consumer


class Dropping(nn.Module):
    """Dropout as a function, as many write it."""

    def __init__(self, always=False):
        super().__init__()
        self.fc1, self.fc2, self.always = nn.Linear(3, 8), nn.Linear(8, 2), always

    def forward(self, x):
        return self.fc2(F.dropout(self.fc1(x).relu(), 0.5, self.training or self.always))


def test_dropout_as_a_function_counts_if_evaluation_is_without():
    assert names(Dropping()) == [("fc1", "fc2")]
    assert names(Dropping(always=True)) == []


def test_middle_is_what_acts_on_the_units():
    model = conv_sequence(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Identity())
    assert chains(model)[0].middle == (*model[1:5],)
    (functions,) = chains(Hidden(lambda x: F.leaky_relu(2 * x, negative_slope=0.5)))
    x = torch.tensor([-1.0, 3.0])
    for step in functions.middle:
        x = step(x)
    assert x.tolist() == [-1.0, 6.0]
    assert chains(Around(lambda x: x.permute(0, 2, 3, 1)))[0].middle == ()


def test_bottlenecks_and_networks():
    assert names(nn.Sequential(Bottleneck(), Bottleneck())) == [("0.conv1", "0.conv2"), ("1.conv1", "1.conv2")]
    assert names(Block(4, nn.Identity())) == [("fc1", "fc2")]
    network = Block(4, LargeKernelConv2d(4, 7, 3), UNIREP)
    assert names(network) == [("fc1", "fc2"), ("squeeze.fc1", "squeeze.fc2")]
    assert chains(network)[0].middle == (network.act, network.response_norm)
    assert len(chains(torchvision.models.resnet18())) == 8
    assert len(chains(torchvision.models.mobilenet_v2())) == 16
    assert len(chains(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3))) == 3
    assert len(chains(timm.create_model("resnet18", features_only=True))) == 8


def test_a_consumer_may_be_the_next_producer():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    assert names(model) == [("0", "2"), ("2", "4")]


class Read(nn.Module):
    """Hidden units that something else reads, too."""

    def __init__(self, how):
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.how = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x):
        return self.how(self, x)


def residual(net, x):
    hidden = net.fc1(x)
    return hidden + net.fc2(hidden.relu())


def returned(net, x):
    hidden = net.fc1(x).relu()
    return net.fc2(hidden), hidden


def two_readers(net, x):
    hidden = net.fc1(x).relu()
    return net.fc2(hidden) + net.fc3(hidden)


def twice(net, x):
    return net.fc2(net.fc1(net.fc1(x)))


def weight_read(net, x):
    return net.fc2(net.fc1(x)) + net.fc1.weight.sum()


def other_in_training(net, x):
    hidden = net.fc1(x)
    return net.fc2(hidden) + (net.fc3(hidden) if net.training else 0)


def gone_in_training(net, x):
    hidden = net.fc1(x)
    return hidden if net.training else net.fc2(hidden)


def untraceable(net, x):
    return net.fc2(net.fc1(x)) if x.sum() > 0 else x


def by_name(net, x):
    return F.relu(input=net.fc2(input=net.fc1(x)))


READ = [residual, returned, two_readers, weight_read, other_in_training, gone_in_training, untraceable, by_name]


@pytest.mark.parametrize("how", READ, ids=lambda how: how.__name__)
def test_not_if_another_reads_it_or_it_cannot_be_seen(how):
    assert names(Read(how)) == []


def test_not_if_a_layer_serves_twice():
    assert names(Read(twice)) == []
    layer = nn.Linear(4, 4)
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == []
    assert names(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, nn.ReLU(), layer)) == []
    norm = nn.BatchNorm1d(4)
    assert names(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm, nn.Linear(4, 4))) == []
    hidden = Read(untraceable)  # a second place of which no graph tells
    hidden.fc1 = layer
    assert names(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, hidden)) == []
    relu = nn.ReLU()  # which has nothing of its own
    assert len(names(nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4)))) == 2


def test_not_with_a_parameter_that_is_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[0].weight
    assert names(model) == []
    model[3].weight = nn.Parameter(model[0].weight.detach().clone())
    assert names(model) == [("0", "2"), ("2", "3")]


class Reaches(nn.Module):
    """Uses what its child holds."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = sequence(nn.ReLU(), first=nn.Linear(3, 8)), how

    def forward(self, x):
        return self.inner(x) + self.how(self.inner, x)


def test_not_if_an_outer_module_reaches_in():
    assert names(Reaches(lambda inner, x: 0)) == [("inner.0", "inner.2")]
    assert names(Reaches(lambda inner, x: inner[0](x).sum())) == []
    assert names(Reaches(lambda inner, x: inner[2].bias)) == []


def hooked(position, kind):
    model = sequence(nn.ReLU())
    getattr(model[position], f"register_{kind}")(lambda *given: None)
    return model


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_not_with_hooks(position, kind):
    assert names(hooked(position, kind)) == []


def test_hooks_around_a_chain_see_none_of_it():
    model = nn.Sequential(sequence(nn.ReLU()))
    model[0].register_forward_hook(lambda *given: None)
    assert names(model) == [("0.0", "0.2")]


def test_not_with_parametrizations():
    model = sequence(nn.ReLU())
    nn.utils.parametrizations.weight_norm(model[0])
    assert names(model) == []
    model = sequence(nn.ReLU())
    torch.nn.utils.prune.l1_unstructured(model[2], "weight", 3)
    assert names(model) == []
    model = sequence(nn.ReLU())
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    assert names(model) == []


def test_not_with_a_forward_of_its_own():
    for position in range(3):
        model = sequence(nn.ReLU())
        model[position].forward = model[position].forward
        assert names(model) == []
    model = sequence(nn.ReLU())
    model.forward = model.forward
    assert names(model) == []


class Double(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Same(nn.Linear):
    def forward(self, input):
        return input @ self.weight.t() + self.bias


class Adapted(Same):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.more = nn.Parameter(torch.zeros(1))


class Squared(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight.square(), bias)


def test_a_class_of_ones_own_counts_if_it_computes_the_same():
    assert names(sequence(first=Same(3, 8))) == [("0", "1")]
    for layer in (Double(3, 8), Adapted(3, 8)):
        assert names(sequence(first=layer)) == []
    for layer in (Squared(8, 2, 3), ScaledStdConv2d(8, 2, 3)):
        assert names(sequence(first=nn.Conv2d(3, 8, 1), last=layer)) == []


NOT = {
    "channels meet in a softmax": sequence(nn.Softmax(-1)),
    "in a layer norm": sequence(nn.LayerNorm(8)),
    "in one without weights": sequence(nn.LayerNorm(8, elementwise_affine=False)),
    "in a group norm": conv_sequence(nn.GroupNorm(2, 8)),
    "in a local response norm": conv_sequence(nn.LocalResponseNorm(3)),
    "in groups": conv_sequence(nn.Conv2d(8, 8, 1, groups=2)),
    "in a function": Hidden(lambda x: F.normalize(x, dim=-1)),
    "in a module's function": Hidden(lambda x: x.softmax(-1)),
    "in sorting": Hidden(lambda x: x.sort().values),
    "places matter": Hidden(lambda x: x.roll(1, -1)),
    "more maps than channels": sequence(
        nn.Conv2d(8, 16, 1, groups=8), first=nn.Conv2d(3, 8, 1), last=nn.Conv2d(16, 2, 1)
    ),
    "grouped reader": conv_sequence(nn.ReLU(), groups=2),
    "transposed reader": sequence(nn.ReLU(), first=nn.Conv2d(3, 8, 1), last=nn.ConvTranspose2d(8, 2, 1)),
    "norm by the batch": conv_sequence(nn.BatchNorm2d(8, track_running_stats=False)),
    "norm of another axis": sequence(nn.BatchNorm2d(5), first=nn.Linear(3, 8), last=nn.Linear(8, 2)),
    "axes of maps": sequence(first=nn.Conv2d(3, 8, 1)),
    "axes of maps in a line": sequence(first=nn.Linear(3, 8), last=nn.Conv2d(8, 2, 1)),
    "axes that are moved elsewhere": Around(lambda x: x.permute(0, 3, 1, 2)),
    "axes that are moved to and fro": Around(lambda x: x.permute(0, 2, 3, 1).transpose(1, 3)),
    "axes that are flattened": Around(lambda x: x.flatten(0, 1)),
    "axes whose number is not known": Hidden(lambda x: x.transpose(1, 2)),
    "a view": Around(lambda x: x.permute(0, 2, 3, 1).view(-1, 8)),
    "several pixels each": sequence(nn.Flatten(), first=nn.Conv2d(3, 8, 3), last=nn.Linear(8 * 9, 2)),
    "rows of several channels": sequence(nn.Flatten(1, 2), first=nn.Conv2d(3, 8, 3), last=nn.Conv1d(8 * 9, 2, 1)),
    "norm of rows": Around(nn.BatchNorm2d(8), rows=True),
    "activations that learn of rows": Around(nn.PReLU(8), rows=True),
    "what may couple one day": sequence(Leaning()),
    "indices": conv_sequence(nn.MaxPool2d(2, return_indices=True)),
    "sums": conv_sequence(nn.AvgPool2d(2, divisor_override=1)),
    "activations that learn": sequence(nn.PReLU(8), first=nn.Linear(3, 8), last=nn.Conv1d(8, 2, 1)),
    "two inputs": Hidden(lambda x: x * x.sum()),
    "lazy": nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2)),
    "no children": nn.Linear(3, 3),
    "attention": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
}


@pytest.mark.parametrize("model", NOT.values(), ids=NOT)
def test_not_found(model):
    assert names(model) == []


class Remembers(nn.Module):
    """Draws a number and keeps a tensor."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.last, self.all = nn.Linear(3, 8), nn.Linear(8, 2), None, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        self.last = self.fc1(x)
        self.all.append(self.last)
        return self.fc2(self.last * float(torch.rand(())))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_is(training):
    layers = Remembers(), nn.Dropout(), sequence(nn.BatchNorm1d(8)), BatchNormAct2d(8)
    model = nn.Sequential(*layers).train(training)
    model[1].train(not training)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    assert names(model) == [("2.0", "2.2"), ("0.fc1", "0.fc2")]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert (model[0].last, model[0].all) == (None, [])
    copy.deepcopy(model)


def test_weights_without_values_and_other_default_devices():
    with torch.device("meta"):
        assert names(sequence(nn.GELU())) == [("0", "2")]
    with torch.device("meta"):
        assert names(FOUND["norm with activation"]) == [("0", "2")]


def test_takes_modules_only():
    with pytest.raises(TypeError, match=r"chains takes a torch.nn.Module, got list"):
        chains([nn.Linear(1, 1)])
