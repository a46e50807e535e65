"""Calibration leaves no trace, and finds exactly what an output can read."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftconv.nn import LargeKernelConv2d
from shiftconv.sparse import Calibration, SparseTraining, groups
from shiftconv.sparse.calibration import Probe, find_reachable, grasp_scores, snip_scores

from .cases import Large, batch, calibration, made, sgd


class Restless(nn.Module):
    """Norms, chance, parts in other modes, and a gradient that is there already."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)) + torch.rand(1, device=x.device))


@pytest.mark.parametrize("allocate", ["snip", "snip_layers", "grasp", "uniform"])
def test_a_calibrated_model_is_as_it_was(allocate):
    model = Restless().eval()
    model.body[1].train()
    backward = F.cross_entropy(model(batch()[0]), batch()[1])
    backward.backward()
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    chance = torch.get_rng_state()
    data = calibration()
    inputs = [x.clone() for x, _ in data.batches]
    sparse = SparseTraining(model, optimizer, 0.5, allocate, calibration=data)
    assert torch.equal(chance, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))
    for name, value in model.state_dict().items():
        masked = before[name] * sparse.masks[name] if name in sparse.masks else before[name]
        assert torch.equal(value, masked), name
    assert all(map(torch.equal, inputs, [x for x, _ in data.batches]))
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())


def test_a_failed_calibration_leaves_no_trace_either():
    model = Restless().eval()
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def broken(outputs, targets):
        raise ArithmeticError("no loss")

    with pytest.raises(ArithmeticError, match="no loss"):
        SparseTraining(model, sgd(model), 0.5, "snip", calibration=Calibration(calibration().batches, broken))
    assert not any(m.training for m in model.modules()) and torch.equal(chance, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_data_give_the_same_masks_whatever_chance_does():
    results = []
    for seed in (1, 2):
        model = Restless()
        model.load_state_dict(results[0][1] if results else model.state_dict())
        start = copy.deepcopy(model.state_dict())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sparse = SparseTraining(model, sgd(model), 0.5, "snip", calibration=calibration())
        results.append((sparse.masks, start))
    assert all(torch.equal(mask, results[1][0][name]) for name, mask in results[0][0].items())


def test_an_iterator_of_batches_is_enough():
    model = made()
    both = SparseTraining(model, sgd(model), 0.5, "snip", calibration=Calibration(iter(calibration().batches)))
    other = made()
    again = SparseTraining(other, sgd(other), 0.5, "snip", calibration=calibration())
    assert all(torch.equal(mask, again.masks[name]) for name, mask in both.masks.items())


def test_scores_are_means_over_members():
    model = made().double().eval()
    found = groups(model, "channel")
    x, y = batch(100)

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets)

    probe = Probe(model, Calibration([(x.double(), y)], loss))
    scores = snip_scores(probe, found)
    twin = copy.deepcopy(model).train()
    loss(twin(x.double()), y).backward()
    layer = twin.fc1
    parts = (layer.weight * layer.weight.grad).abs().sum(1) + (layer.bias * layer.bias.grad).abs()
    torch.testing.assert_close(scores[3], (parts / 6).detach(), rtol=1e-9, atol=1e-15)
    assert all(score.shape == group.shape for score, group in zip(grasp_scores(probe, found), found, strict=True))


@pytest.mark.parametrize(
    ("size", "kernel", "padding"), [(3, 7, 3), (4, 7, 3), (3, 5, 2), (2, 9, 4), (1, 3, 1), (8, 7, 3)]
)
def test_taps_are_reachable_where_they_meet_the_map(size, kernel, padding):
    model = nn.Sequential(nn.Conv2d(2, 3, kernel, padding=padding), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (found,) = find_reachable(model, groups(model), torch.randn(4, 2, size, size))
    meets = [any(0 <= o - padding + k < size for o in range(size)) for k in range(kernel)]
    expected = np.outer(meets, meets)
    if expected.all():
        assert found is None
    else:
        assert (found.numpy() == expected).all()


def test_strides_and_dilation_leave_taps_out():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=4, padding=1),
        nn.Conv2d(3, 4, 3, dilation=3, padding=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    first, second = find_reachable(model, groups(model), torch.randn(4, 2, 4, 4))
    assert first[:, :, 1:, 1:].all() and first.sum() == 3 * 2 * 4  # the first row and column read padding
    assert second[:, :, 1, 1].all() and second.sum() == 4 * 3  # of a map of one pixel


def test_branches_of_large_kernels():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), LargeKernelConv2d(4, 13, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = groups(model)
    for group, reach in zip(found, find_reachable(model, found, torch.randn(4, 3, 4, 4)), strict=True):
        shape = group.members[0].weight.shape
        ways = [np.abs(np.arange(n) - n // 2) < 4 for n in shape[2:]]
        expected = np.broadcast_to(np.outer(*ways), shape)
        assert (reach is None and expected.all()) or (reach.numpy() == expected).all(), group.name


def test_what_chance_has_silenced_is_still_reachable():
    """A unit that is dead on these data, a gain of zero: the weights there may come to matter."""
    model = made(Large)
    with torch.no_grad():
        model[0].bias[0] = -1e4
        model[0].weight[0] = 0
    model.insert(1, nn.ReLU())
    found = groups(model)
    other = groups(twin := made(Large))
    reaches = find_reachable(model, found, torch.randn(4, 3, 40, 40))
    expected = find_reachable(twin, other, torch.randn(4, 3, 40, 40))
    for group, one, same in zip(found, reaches, expected, strict=True):
        assert (one is None) == (same is None), group.name


def test_a_parameter_without_any_gradient_tells_nothing():
    """As that of a head which only pretraining uses."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other = (nn.Conv2d(3, 4, 7, padding=3) for _ in range(2))

        def forward(self, x):
            return self.used(x)

    model = Two()
    used, other = find_reachable(model, groups(model), torch.randn(4, 3, 3, 3))
    assert other is None and used.sum() == 4 * 3 * 25


def test_a_gain_of_zero_hides_nothing():
    """That of the last norm of a residual block starts so."""
    model = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    nn.init.zeros_(model[1].weight)
    assert find_reachable(model, groups(model), torch.randn(4, 3, 3, 3))[0].sum() == 4 * 3 * 25


def test_taps_of_convolutions_are_the_same_for_all_channels():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 7, padding=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        model[0].bias[1:3] = -1e4  # units that these data leave dead
    found = groups(model, select=lambda m: m is model[2])
    (reach,) = find_reachable(model, found, torch.randn(4, 3, 3, 3))
    assert reach[:, :, 1:-1, 1:-1].all() and reach.sum() == 5 * 4 * 25
    assert find_reachable(model, found, torch.randn(4, 3, 9, 9)) == [None]


def test_words_are_inputs_too():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    data = Calibration([(torch.randint(0, 9, (5, 3)), torch.randint(0, 3, (5,)))])
    sparse = SparseTraining(model, sgd(model), 0.5, "snip", calibration=data)
    assert [*sparse.masks] == ["2.weight"] and sparse.active == 18


def test_outputs_may_be_several():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.one(x), self.two(x)

    model = Two()
    data = Calibration([(torch.randn(6, 4), torch.randn(6, 1))], lambda out, y: ((out[0].sum(1) - y[:, 0]) ** 2).mean())
    assert SparseTraining(model, sgd(model), 0.5, "snip", calibration=data).active == 10
