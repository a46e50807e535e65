"""The counter against sums done by hand, and what it must leave alone."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from shiftconv.analysis.count import Count, count
from shiftconv.analysis.zeros import thin
from shiftconv.nn import LargeKernelConv2d, ShiftLinear, ShiftwiseConv2d


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
    assert cost.macs == cost.effective_macs == 4096**2 * ((3 << 14) + 9 * (1 << 28))
    assert cost.nonzero_parameters == cost.parameters


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


def fill(model):
    """Positive numbers in all parameters and statistics, so that no sum is 0 by cancelling."""
    generator = torch.Generator().manual_seed(0)
    for value in (*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)):
        value.data.uniform_(0.5, 1, generator=generator)
    return model


def test_zeros_by_hand():
    model = fill(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 2, groups=2, stride=2), nn.ConvTranspose2d(6, 2, 3),
            nn.BatchNorm2d(2), nn.Flatten(2), nn.Linear(30, 5), nn.Linear(5, 5),
        )
    )  # fmt: skip
    whole, grouped, transposed, norm, _, line, last = model
    whole.weight.data[1] = 0
    grouped.weight.data[2, 1] = grouped.weight.data[5, 0, 0] = 0
    transposed.weight.data[0, 0, :, 1] = 0
    line.weight.data[:, ::2] = 0
    last.weight.data.zero_()
    for value in (whole.bias, norm.weight, norm.bias, last.bias):
        value.data.zero_()  # of one dimension: they count
    cost = count(model, (3, 7, 8))
    rows = {row.kind + row.name: (row.parameters - row.nonzero_parameters, row.effective_macs) for row in cost.layers}
    assert rows == {
        "Conv2d0": (27, 56 * 3 * 27),
        "Conv2d1": (6, 3 * 4 * (6 * 2 * 4 - 6)),
        "ConvTranspose2d2": (3, 3 * 4 * (6 * 2 * 9 - 3)),
        "BatchNorm2d3": (0, 0),
        "Linear5": (75, 2 * 75),
        "Linear6": (25, 0),
    }
    assert cost.nonzero_parameters == cost.parameters - (27 + 6 + 3 + 75 + 25)
    assert cost.effective_macs == sum(row.effective_macs for row in cost.layers) < cost.macs


def test_zeros_of_a_large_kernel():
    model = fill(LargeKernelConv2d(3, 7, 3))
    model.tall.weight.data[0, 0, 1:4] = 0
    model.wide.weight.data[1] = 0
    model.small.weight.data[:, 0, 0, 0] = 0
    taps = {name: getattr(model, name).weight[:, 0] for name in ("tall", "wide", "small")}
    used = {name: sum(x != 0 for x in weight.flatten().tolist()) for name, weight in taps.items()}
    cost = count(model, (3, 10, 11))
    assert (cost.macs, cost.effective_macs) == (110 * 3 * 51, 110 * sum(used.values()))
    assert cost.parameters - cost.nonzero_parameters == 3 * 51 - sum(used.values())
    together = 0  # the small kernel has moved into rows 2 to 4 of the tall one
    for c in range(3):
        for i in range(7):
            for j in range(3):
                inside = 2 <= i <= 4 and taps["small"][c, i - 2, j] != 0
                together += bool(inside or taps["tall"][c, i, j] != 0)
    model.reparameterize()
    cost = count(model, (3, 10, 11))
    assert (cost.macs, cost.effective_macs) == (110 * 3 * 42, 110 * (together + used["wide"]))
    assert cost.parameters - cost.nonzero_parameters == 3 * 42 - together - used["wide"]


def occupied(model, branch, alive):
    """The slots of each channel in which a small kernel stands that is not 0."""
    slots = model.get_buffer(f"{branch}_slots") if branch in model.drawn else None
    taken = set()
    for channel, kernel in alive:
        for r in range(model.num_shifts):
            slot = kernel if slots is None else int(slots[channel, kernel, r])
            if slot >= 0:
                taken.add((channel, slot))
    return taken


def test_zeros_of_small_kernels_that_compose_large_ones():
    channels, slots = 4, 5
    model = fill(ShiftwiseConv2d(channels, 13, 3, num_paths=2, num_shifts=2))
    dead = {(0, 0), (0, 3), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (3, 4)}
    for channel, kernel in dead:
        for path in model.weights:
            path.data[channel * slots + kernel] = 0
    model.weights[0].data[3 * slots + 1] = 0  # the other path has it
    alive = {(c, k) for c in range(channels) for k in range(slots)} - dead
    tall, wide, small = (occupied(model, branch, alive) for branch in ("tall", "wide", "small"))
    composing = 9 * sum({"tall": 5, "wide": 5, "small": 1}[branch] for branch in model.drawn)  # by one small kernel
    together = 0  # in evaluation the small kernel and the identity are in the tall one, which starts 6 rows above
    for c in range(channels):
        for i in range(15):
            for j in range(3):
                centre = (c, 0) in small and 5 <= i <= 7
                together += (c, i // 3) in tall or centre or (i, j) == (6, 1)
    cost = count(model, (channels, 20, 20))
    assert cost.macs == 400 * channels * 90 + composing * channels * slots
    assert cost.effective_macs == 400 * (together + 9 * len(wide)) + composing * len(alive)
    assert cost.parameters - cost.nonzero_parameters == 9 * (2 * len(dead) + 1)
    model.reparameterize()
    cost = count(model, (channels, 20, 20))
    assert (cost.macs, cost.effective_macs) == (400 * channels * 90, 400 * (together + 9 * len(wide)))
    assert cost.parameters - cost.nonzero_parameters == channels * 90 - together - 9 * len(wide)


@pytest.mark.parametrize("variant", ["linear", "embedding", "split"])
def test_other_ways_to_compose(variant):
    cost = count(ShiftwiseConv2d(4, 13, variant=variant), (4, 20, 20))
    assert cost.effective_macs >= 0.9 * cost.macs > 0


class Made(nn.Module):
    """A convolution by something that is made of its weight, whose first half has a mask of 0."""

    def __init__(self, how):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.ones(4, 2, 3, 3)), how
        self.plain = torch.ones(4, 1, 1, 1)
        self.plain[:2] = 0
        self.register_buffer("mask", self.plain.clone())

    def forward(self, x):
        return F.conv2d(x, self.how(self))


def write(model):
    model.weight.view(4, -1).mul_(model.mask.flatten(1))
    return model.weight


def normalise(model):
    return F.batch_norm(model.weight, model.mask[:2, 0, 0, 0], torch.ones(2), training=True)


@pytest.mark.parametrize(
    ("how", "effective"),
    [
        (lambda m: m.weight * m.mask, 36),
        (lambda m: m.weight * m.plain, 36),
        (lambda m: torch.cat([m.weight[2:], m.weight[:2] - 1]), 36),
        (lambda m: m.weight * int(m.mask.sum() > 3), 0),
        (lambda m: m.mask.expand(4, 2, 3, 3), 72),
        (lambda m: m.weight * torch.rand_like(m.weight).mul(0), 72),
        (normalise, 72),  # writes to the mask
        (write, 72),
        (lambda m: (m.weight * m.mask).add_(1), 72),
    ],
    ids=["mask", "attribute", "pieces", "choice", "buffer", "random", "normalised", "written", "no longer 0"],
)
def test_zeros_of_what_is_made_of_weights(how, effective):
    model, random = Made(how), torch.get_rng_state()
    cost = count(model, (2, 3, 3))
    assert (cost.macs, cost.effective_macs) == (72, effective)
    assert cost.nonzero_parameters == cost.parameters == 72
    assert model.weight.eq(1).all() and model.mask.flatten().tolist() == model.plain.flatten().tolist() == [0, 0, 1, 1]
    assert torch.equal(torch.get_rng_state(), random)


def test_zeros_in_other_products():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.query = nn.Parameter(torch.ones(1, 1, 4)), nn.Linear(4, 4, bias=False)
            self.mixed = ShiftLinear(torch.zeros(4, 2, dtype=torch.int64), 4)

        def forward(self, x):
            query = self.query(self.token.expand(len(x), -1, -1))
            return query @ self.mixed(x).flatten(2)

    model = fill(Products())
    model.query.weight.data[0] = 0
    model.mixed.weight.data[:3] = 0
    cost = count(model, (4, 5, 6))
    assert {row.name: (row.macs, row.effective_macs) for row in cost.layers if row.macs} == {
        "query": (16, 12),
        "mixed": (30 * 16, 30 * 4),
        "": (30 * 4, 30 * 3),
    }


def test_zeros_are_told_if_they_are_more_than_chance():
    model = fill(nn.Conv2d(300, 400, 1))
    model.weight.data[0, 0] = 0
    dense = "Conv2d: 120,400 parameters (120 k), 120,000 MACs (120 k) for one 300x1x1 image"
    assert str(count(model, (300, 1, 1))) == dense
    model.weight.data[0] = 0
    cost = count(model, (300, 1, 1))
    numbers = "120,400 parameters (120 k), 120,100 not 0 (120 k), 120,000 MACs (120 k), 119,700 effective (120 k)"
    assert str(cost) == f"Conv2d: {numbers} for one 300x1x1 image"
    assert cost.table().splitlines() == [
        "layer  kind    output     parameters    not 0     MACs  effective",
        "       Conv2d  1x400x1x1     120,400  120,100  120,000    119,700",
        "total                        120,400  120,100  120,000    119,700",
    ]


def test_a_class_token_may_need_a_gradient():
    cait = timm.create_model("cait_xxs24_224", img_size=32, depth=1)
    assert count(cait, 32).macs > 0


def test_quantized_weights_count_whole():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(TwoTensor(torch.zeros(2, 3), torch.zeros(2, 3)))

        def forward(self, x):
            return F.linear(x, self.weight)

    cost = count(Pair(), (1, 4, 3))
    assert (cost.nonzero_parameters, cost.effective_macs) == (6, cost.macs) == (6, 24)


def test_thin():
    def model():
        return fill(nn.Sequential(nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last), nn.Linear(5, 3)))

    thinned, again, other, random = model(), model(), model(), torch.get_rng_state()
    thin(thinned, 0.3)
    thin(again, 0.3)
    thin(other, 0.3, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), random)
    for value, same, different, dense in zip(*(m.parameters() for m in (thinned, again, other, model())), strict=True):
        share = 0.3 if value.ndim > 1 else 1
        assert int((value != 0).sum()) == round(share * value.numel())
        assert value.stride() == dense.stride() and torch.equal(value, same)
        assert torch.equal(value, different) == (share == 1)
        assert torch.equal(value, torch.where(value == 0, value, dense))
    thin(thinned, 1.0)
    assert count(thinned[0], (3, 9, 9)).nonzero_parameters == 7 + round(0.3 * 189)


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
def test_bad_densities(density):
    with pytest.raises(ValueError, match=rf"density must be in \(0, 1\], got {density}"):
        thin(nn.Linear(2, 2), density)
