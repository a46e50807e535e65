"""The receptive field against hand-made networks and numbers that the original program gave."""

import math
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shiftconv.analysis.receptive_field import ERF, Rectangle, erf


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def conv(kernel: Tensor, **kwargs) -> nn.Conv2d:
    layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:], bias=False, **kwargs)
    with torch.no_grad():
        layer.weight.copy_(kernel)
    return layer


class TinySLaK(nn.Module):
    """SLaK of depths 1 1 2 1 from plain layers, with the originals' parameter names; gives the last stage's map."""

    def __init__(self):
        super().__init__()
        dims, depths, kernels = (8, 12, 16, 24), (1, 1, 2, 1), (13, 11, 9, 7)
        down = [nn.Sequential(nn.Conv2d(3, 8, 4, 4), ChannelNorm(8))]
        down += [nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, 2)) for a, b in pairwise(dims)]
        self.downsample_layers = nn.ModuleList(down)
        stages = [
            nn.Sequential(*(Block(d, k) for _ in range(n))) for d, k, n in zip(dims, kernels, depths, strict=True)
        ]
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return x


class ChannelNorm(nn.LayerNorm):
    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    def __init__(self, dim: int, k: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        shapes = {"LoRA1": (k, 3), "LoRA2": (3, k), "small_conv": (3, 3)}
        self.large_kernel = nn.ModuleDict({name: self.branch(dim, shape) for name, shape in shapes.items()})
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    @staticmethod
    def branch(dim: int, shape: tuple[int, int]) -> nn.ModuleDict:
        padding = (shape[0] // 2, shape[1] // 2)
        return nn.ModuleDict(
            dict(conv=nn.Conv2d(dim, dim, shape, padding=padding, groups=dim, bias=False), bn=nn.BatchNorm2d(dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = sum(branch["bn"](branch["conv"](x)) for branch in self.large_kernel.values())
        y = self.pwconv2(nn.functional.gelu(self.pwconv1(self.norm(y.movedim(1, -1)))))
        return x + (self.gamma * y).movedim(-1, 1)


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)


def golden_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    n, leaf = normal("e0/" + key, shape), key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        n = np.abs(n) + 0.5
    elif leaf == "gamma":
        n = 0.5 + 0.1 * n
    elif len(shape) == 1:
        n = 0.1 * n + (leaf == "weight")
    else:
        n = n / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(n.astype(np.float32)).double()


def test_equals_the_original_program_on_a_small_slak():
    model = TinySLaK().double().eval()
    state = {k: v if k.endswith("tracked") else golden_weight(k, tuple(v.shape)) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    pictures = torch.cat([torch.from_numpy(normal(f"e0/img{i}", (1, 3, 256, 256))) for i in range(3)])
    field = erf(model, pictures, batch_size=2)
    assert field.images == 3
    assert field.matrix.dtype == torch.float64
    assert field.matrix.sum().item() == pytest.approx(309.871620389867, rel=1e-9)
    assert field.matrix.max().item() == pytest.approx(0.389153492691652, rel=1e-9)
    assert field.matrix[128, 128].item() == pytest.approx(0.0512493987247258, rel=1e-9)
    sides = {0.2: 47, 0.3: 59, 0.5: 91, 0.99: 249}
    for threshold, side in sides.items():
        assert field.rectangle(threshold) == Rectangle(side, pytest.approx((side / 256) ** 2))


def test_a_linear_network_shows_the_positive_part_of_its_kernel():
    kernel = images(1, 1, 3, 5)
    x = images(1, 1, 9, 9).abs() + 1
    field = erf(conv(kernel.abs(), padding=(1, 2)), x)
    want = torch.zeros(9, 9, dtype=torch.float64)
    want[3:6, 2:7] = kernel.abs()[0, 0]
    torch.testing.assert_close(field.matrix, want)
    field = erf(nn.Sequential(conv(kernel, padding=(1, 2)), BigBias()), x)
    want[3:6, 2:7] = kernel[0, 0].relu()
    torch.testing.assert_close(field.matrix, want)


class BigBias(nn.Module):
    """Keeps the feature map positive, so that only the sign of the gradient matters."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 100


def test_positive_part_is_taken_per_input_channel_before_the_sum():
    kernel = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
    field = erf(nn.Sequential(conv(kernel), BigBias()), images(1, 2, 5, 5))
    assert field.matrix[2, 2] == 1
    assert field.matrix.sum() == 1


def test_the_feature_maps_positive_part_counts_only():
    kernel = torch.tensor([1.0, 1.0]).view(2, 1, 1, 1)
    model = nn.Sequential(conv(kernel), Split())
    assert erf(model, images(1, 1, 5, 5)).matrix[2, 2] == 1


class Split(nn.Module):
    """The first channel positive, the second negative."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([100.0, -100.0]).view(2, 1, 1)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1))


def test_neither_batch_size_nor_form_of_the_images_matters():
    model, x = small_network(), images(5, 3, 12, 12)
    whole = erf(model, x)
    torch.testing.assert_close(erf(model, x, batch_size=2).matrix, whole.matrix)
    torch.testing.assert_close(erf(model, [x[:3], x[3:]]).matrix, whole.matrix)
    torch.testing.assert_close(erf(model, ((part, 0) for part in x.split(1))).matrix, whole.matrix)
    singles = torch.stack([erf(model, part).matrix for part in x.split(1)])
    torch.testing.assert_close(singles.mean(0), whole.matrix)


def test_the_model_and_the_images_stay_as_they_were():
    model, x = small_network(), images(2, 3, 12, 12)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        erf(model, x)
    assert [module.training for module in model] == [True, False, True, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x.requires_grad
    torch.testing.assert_close(dict(model.state_dict()), state)
    assert not model[3]._forward_hooks
    with pytest.raises(ValueError, match="does not exist"):
        erf(nn.Sequential(model, Twice()), x, stage=2)
    assert model[0].training


class Twice(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [2 * x, x]


def test_images_with_numbers_that_are_not_finite_are_skipped():
    model, x = small_network(), images(3, 3, 12, 12)
    want = erf(model, x[::2])
    x[1, 0, 6, 6] = torch.nan
    field = erf(model, x)
    assert (field.images, field.skipped) == (2, 1)
    torch.testing.assert_close(field.matrix, want.matrix)
    with pytest.raises(ValueError, match=r"not finite for any of the 1 images"):
        erf(model, x[1:2])


def test_layer_by_name_by_module_and_by_function():
    model, x = small_network(), images(2, 3, 12, 12)
    by_name = erf(model, x, layer="0").matrix
    torch.testing.assert_close(erf(model, x, layer=model[0]).matrix, by_name)
    torch.testing.assert_close(erf(model, x, layer=lambda x: model[0](x)).matrix, by_name)
    torch.testing.assert_close(erf(model, x, layer=lambda x: [model(x), model[0](x)]).matrix, by_name)
    torch.testing.assert_close(erf(model, x, layer=lambda x: [model[0](x), model(x)], stage=0).matrix, by_name)
    assert not torch.equal(erf(model, x).matrix, by_name)


def test_a_later_layer_that_works_in_place_changes_nothing():
    model, x = small_network(), images(2, 3, 12, 12)
    want = erf(model, x, layer="1").matrix
    model[2] = nn.Hardtanh(-0.1, 0.1, inplace=True)
    torch.testing.assert_close(erf(model, x, layer="1").matrix, want)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "test_vit"])
def test_timm_networks_give_their_last_map_before_the_final_norm(name):
    import timm

    model = timm.create_model(name, num_classes=3).eval()
    side = model.default_cfg["input_size"][-1] if "vit" in name else 64
    x = images(1, 3, side, side)
    last = erf(model, x)
    assert last.matrix.shape == (side, side)
    assert last.matrix.sum() > 0
    if name == "resnet10t":
        torch.testing.assert_close(last.matrix, erf(model, x, layer="layer4").matrix)
        features = timm.create_model(name, features_only=True)
        features.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(erf(features, x).matrix, last.matrix)
    if name == "test_vit":
        model.norm = nn.Identity()
        torch.testing.assert_close(last.matrix, erf(model, x).matrix)
    if name == "convnext_atto":
        torch.testing.assert_close(last.matrix, erf(model, x, layer="stages").matrix)


def test_rectangle_counts_from_the_centre():
    matrix = torch.zeros(10, 10, dtype=torch.float64)
    matrix[5, 5] = 9.0
    matrix[5, 8] = 9.0
    field = ERF(matrix, 1)
    assert field.rectangle(0.4) == Rectangle(3, 0.09)
    assert field.rectangle(0.5) == Rectangle(7, 0.49)  # more than half, not half
    matrix[0, 0] = 1e6
    assert field.rectangle(0.9) is None  # the farthest pixel is in no centred odd square
    assert ERF(torch.zeros(10, 10), 1).rectangle(0.5) is None
    assert ERF(torch.ones(1, 1), 1).rectangle(0.5) is None
    with pytest.raises(ValueError, match=r"between 0 and 1, got 50"):
        field.rectangle(50)


def test_plot_appears_whole_or_not_at_all(tmp_path):
    field = erf(small_network(), images(1, 3, 12, 12))
    path = field.plot(tmp_path / "field.png", title="A & B", thresholds=(0.5, 0.9))
    assert path.read_bytes().startswith(b"\x89PNG")
    field.plot(str(tmp_path / "field.svg"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["field.png", "field.svg"]
    with pytest.raises(ValueError, match=r"must end in one of .*png.*got 'field.xyz'"):
        field.plot(tmp_path / "field.xyz")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        field.plot(tmp_path / "nowhere" / "field.png")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("pictures", "options", "error", "message"),
    [
        (images(3, 12, 12), {}, ValueError, r"images must be \[N, C, H, W\], got \[3, 12, 12\]"),
        (torch.zeros(1, 3, 12, 12, dtype=torch.uint8), {}, TypeError, "floating-point .* got torch.uint8"),
        (["a.png"], {}, TypeError, "got str"),
        ([], {}, ValueError, "images is empty"),
        (images(0, 3, 12, 12), {}, ValueError, "images is empty"),
        ([images(1, 3, 12, 12), images(1, 3, 9, 9)], {}, ValueError, r"one size, got \[12, 12\] and \[9, 9\]"),
        (images(1, 3, 12, 12), dict(batch_size=0), ValueError, "at least 1, got 0"),
        (images(1, 3, 12, 12), dict(layer="layer"), ValueError, "unknown layer 'layer'"),
        (images(1, 3, 12, 12), dict(layer=nn.ReLU()), ValueError, "a ReLU, is not a part of the model"),
        (images(1, 3, 12, 12), dict(layer=3), TypeError, "its name or a function, got int"),
        (images(1, 3, 12, 12), dict(layer=lambda x: x.mean((2, 3))), ValueError, r"got \[1, 3\]; give layer="),
        (images(1, 3, 12, 12), dict(layer=lambda x: "map"), TypeError, "tensor, got str"),
        (images(1, 3, 12, 12), dict(layer=torch.zeros_like), ValueError, "does not depend on the images"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(pictures, options, error, message):
    with pytest.raises(error, match=message):
        erf(small_network(), pictures, **options)
