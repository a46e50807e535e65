"""The counter against sums done by hand, and what it must leave alone."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from shiftconv.analysis.count import Count, count


class Odd(nn.Module):
    """Products outside of any layer, one layer used twice, one never, and a weight in two places."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.twice = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.twice.weight
        self.unused = nn.Linear(5, 7)
        self.register_buffer("steps", torch.zeros(()))
        self.scale = torch.ones(6)  # neither parameter nor buffer

    def forward(self, x):
        self.steps += 1
        y = self.conv(x).flatten(2).transpose(1, 2) * self.scale  # [1, L, 6]
        y = self.tied(self.twice(self.twice(y)))
        return F.softmax(y @ y.mT, -1) @ y


def test_sums_by_hand():
    cost = count(Odd(), (4, 10, 8))
    pixels = 5 * 4
    conv, linear, outside = pixels * 6 * 2 * 9, pixels * 36, 2 * pixels * pixels * 6
    assert cost.macs == conv + 3 * linear + outside
    assert cost.parameters == 6 * 2 * 9 + 6 + 36 + 6 + 5 * 7 + 7
    rows = {row.name: (row.parameters, row.macs, row.output) for row in cost.layers}
    assert rows == {
        "conv": (114, conv, (1, 6, 5, 4)),
        "twice": (42, 2 * linear, (1, 20, 6)),
        "tied": (0, linear, (1, 20, 6)),
        "": (0, outside, (1, 20, 6)),
        "unused": (42, 0, ()),
    }
    assert cost.activations == 6 * pixels * (1 + 2 + 1 + 1)


def test_rows_add_up():
    cost = count(timm.create_model("efficientvit_b0"))
    assert cost.size == (3, 224, 224) and cost.model == "efficientvit_b0"
    assert sum(row.macs for row in cost.layers) == cost.macs > 0
    assert sum(row.parameters for row in cost.layers) == cost.parameters


def test_known_networks():
    """ResNet-18 has 1.81 GMACs and 11.69 million parameters at 224 pixels, as published."""
    cost = count(timm.create_model("resnet18"))
    assert (cost.parameters, cost.macs) == (11_689_512, 1_814_073_344)
    assert count(timm.create_model("resnet18"), 112).macs < cost.macs / 3


def test_fused_attention_and_recurrence_are_not_missed():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.lstm = nn.LSTM(16, 8, batch_first=True)

        def forward(self, x):
            return self.lstm(self.encoder(x.flatten(2).transpose(1, 2)))

    n = 5 * 4
    attention = n * 16 * 48 + 2 * n * n * 16 + n * 16 * 16
    cost = count(Sequence().requires_grad_(False), (16, 5, 4))
    assert cost.macs == attention + 2 * n * 16 * 32 + n * 4 * 8 * (16 + 8)


def test_transposed_and_other_convolutions():
    class Ranks(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.line = nn.ConvTranspose2d(3, 5, 2, stride=2), nn.Conv1d(5, 2, 3)
            self.cube = nn.Conv3d(1, 2, (1, 2, 2))

        def forward(self, x):
            y = self.up(x)
            return self.line(y.flatten(2)), self.cube(y[:, None])

    expected = 4 * 4 * 3 * 5 * 4 + (64 - 2) * 5 * 2 * 3 + 5 * 7 * 7 * 2 * 4
    assert count(Ranks(), (3, 4, 4)).macs == expected


def test_the_model_is_as_it_was():
    model = nn.Sequential(Odd(), nn.BatchNorm1d(20), nn.Dropout())
    model[0].eval()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tensors, hooks = [id(p) for p in model.parameters()], len(model[1]._forward_hooks)
    mkldnn, cudnn = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    count(model, (4, 10, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [False, True, True] and model.training
    assert [id(p) for p in model.parameters()] == tensors and len(model[1]._forward_hooks) == hooks
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    assert type(model[0].steps) is torch.Tensor and calls == [1]
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == (mkldnn, cudnn)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_model_is_as_it_was_after_a_failure(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(7, 2)).train()
    weights = [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"Sequential does not run on an image \[1, 3, 16, 16\]: "):
        count(model, 16)
    assert not caplog.records
    assert model.training and [id(p) for p in model.parameters()] == weights
    assert type(model[0].weight) is nn.Parameter and model[0].weight.device.type == "cpu"
    assert model[0](torch.ones(1, 3, 2, 2)).shape == (1, 4, 2, 2)
    assert torch.backends.mkldnn.enabled and torch.backends.mha.get_fastpath_enabled()


def test_needs_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 1 << 14, 1), nn.Conv2d(1 << 14, 1 << 14, 3, padding=1))
    cost = count(model, 4096)
    assert cost.macs == 4096**2 * ((3 << 14) + 9 * (1 << 28))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    assert count(nn.Conv2d(3, 8, 1).to(dtype), 4).macs == 16 * 24


def test_wrapped_networks():
    network = nn.Sequential(nn.Conv2d(3, 8, 1))
    plain = count(network, 4)
    assert count(nn.DataParallel(network), 4) == plain
    assert count(torch.compile(network, backend="eager"), 4) == plain


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        (nn.Conv2d(5, 1, 1), None, (5, 224, 224)),
        (nn.Conv2d(5, 1, 1), 7, (5, 7, 7)),
        (nn.Conv2d(5, 1, 1), (7, 9), (5, 7, 9)),
        (nn.Conv2d(5, 1, 1), [5, 7, 9], (5, 7, 9)),
        (nn.Identity(), (7, 9), (3, 7, 9)),
        (timm.create_model("resnet18", in_chans=1), None, (1, 224, 224)),
    ],
    ids=str,
)
def test_sizes(model, size, expected):
    assert count(model, size).size == expected


@pytest.mark.parametrize(
    ("size", "error", "match"),
    [
        ("32", TypeError, "size must be of whole numbers, got '32'"),
        (32.0, TypeError, "size must be of whole numbers, got 32.0"),
        (0, ValueError, r"a side, \(H, W\) or \(C, H, W\) of at least 1, got 0"),
        ((1, 2, 3, 4), ValueError, r"got \(1, 2, 3, 4\)"),
        ((), ValueError, r"got \(\)"),
    ],
)
def test_bad_sizes(size, error, match):
    with pytest.raises(error, match=match):
        count(nn.Conv2d(3, 1, 1), size)


def test_bad_models():
    with pytest.raises(TypeError, match="count takes a module, got str"):
        count("resnet18")
    with pytest.raises(ValueError, match="every parameter; weight gets its own at the first forward pass"):
        count(nn.LazyConv2d(3, 1), (3, 4, 4))


def test_text():
    cost = count(nn.Sequential(nn.Conv2d(3, 1000, 3), nn.ReLU()), (34, 34))
    expected = "Sequential: 28,000 parameters (28 k), 27,648,000 MACs (27.6 M) for one 3x34x34 image"
    assert isinstance(cost, Count) and str(cost) == expected
    assert cost.table().splitlines() == [
        "layer  kind    output        parameters        MACs",
        "0      Conv2d  1x1000x32x32      28,000  27,648,000",
        "total                            28,000  27,648,000",
    ]
    assert str(count(nn.Conv2d(1, 1, 1, bias=False), 1)).startswith("Conv2d: 1 parameters (1), 1 MACs (1)")
