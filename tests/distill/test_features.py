"""Losses on feature maps: values, sizes, precisions, masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftconv.distill import MGD, FeatureLoss

MODULES = {
    "smooth_l1": lambda c, d: FeatureLoss(c, d),
    "mse": lambda c, d: FeatureLoss(c, d, "mse"),
    "mgd": lambda c, d: MGD(c, d, mask_share=0.0),  # nothing hidden, so nothing random
    "mgd_pixels": lambda c, d: MGD(c, d, mask_share=0.0, hide="pixels"),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _maps(student=(2, 3, 5, 4), teacher=(2, 3, 5, 4), dtype=torch.float64):
    return torch.randn(student, dtype=dtype).requires_grad_(), torch.randn(teacher, dtype=dtype)


def _conv(x, conv):
    """A convolution with as much padding as keeps the size, of one map ``[C, H, W]``, in numpy."""
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    pad, (_, height, width) = weight.shape[-1] // 2, x.shape
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((len(weight), height, width))
    for i in range(height):
        for j in range(width):
            window = padded[:, i : i + 2 * pad + 1, j : j + 2 * pad + 1]
            out[:, i, j] = (weight * window).sum((1, 2, 3)) + bias
    return out


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_smooth_l1_is_a_square_below_beta_and_a_line_above(beta):
    student, teacher = _maps()
    value = FeatureLoss(3, 3, beta=beta)(student, teacher)
    expected = [
        d * d / (2 * beta) if d < beta else d - beta / 2 for d in (student - teacher).detach().abs().flatten().tolist()
    ]
    assert value.item() == pytest.approx(np.mean(expected), abs=1e-12)


def test_other_channels_are_aligned_by_a_convolution_of_one_pixel():
    student, teacher = _maps(teacher=(2, 6, 5, 4))
    loss = FeatureLoss(3, 6, "mse").double()
    aligned = np.stack([_conv(x, loss.align) for x in student.detach().numpy()])
    assert loss(student, teacher).item() == pytest.approx(((aligned - teacher.numpy()) ** 2).mean(), abs=1e-12)
    assert sorted(loss.state_dict()) == ["align.bias", "align.weight"]
    assert not FeatureLoss(3, 3).state_dict()


@pytest.mark.parametrize("hide", ["channels", "pixels"])
def test_mgd_makes_the_teachers_map_of_the_part_that_is_left(hide):
    student, teacher = _maps(teacher=(2, 6, 5, 4))
    loss = MGD(3, 6, mask_share=0.3, weight=0.01, hide=hide).double()
    value = loss(student, teacher, torch.Generator().manual_seed(5))
    shape = (2, 6, 1, 1) if hide == "channels" else (2, 1, 5, 4)
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(5)).numpy() >= 0.3
    assert 0 < kept.mean() < 1
    total = 0.0
    for n in range(2):
        x = _conv(student[n].detach().numpy(), loss.align) * kept[n]
        x = _conv(np.maximum(_conv(x, loss.generation[0]), 0), loss.generation[2])
        total += ((x - teacher[n].numpy()) ** 2).sum()
    assert value.item() == pytest.approx(0.01 * total / 2, abs=1e-12)


@pytest.mark.parametrize("hide", ["channels", "pixels"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_as_much_is_hidden_as_asked_for(share, hide):
    class Spy(nn.Module):
        def forward(self, x):
            seen.append((x == 0).double().mean())
            return x

    seen = []
    loss = MGD(200, 200, mask_share=share, hide=hide)
    loss.generation = nn.Sequential(Spy())
    loss(torch.ones(20, 200, 10, 10), torch.ones(20, 200, 10, 10), torch.Generator().manual_seed(0))
    assert seen[0].item() == pytest.approx(share, abs=0.05)


def test_masks_come_from_the_generator_or_else_from_torchs_own():
    loss = MGD(3, 3, weight=1.0).double()
    student, teacher = _maps()
    state = torch.get_rng_state()
    first = loss(student, teacher, torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, loss(student, teacher, torch.Generator().manual_seed(1)))
    torch.manual_seed(1)
    assert torch.equal(first, loss(student, teacher))
    assert not torch.equal(state, torch.get_rng_state())
    assert torch.allclose(
        first.float(), loss.float()(student.float(), teacher.float(), torch.Generator().manual_seed(1))
    )


@pytest.mark.parametrize("name", ["smooth_l1", "mse", "mgd"])
def test_maps_of_another_size_are_resized_to_the_teachers(name):
    loss = MODULES[name](3, 3).double()
    student, teacher = _maps((2, 3, 4, 6), (2, 3, 8, 9))
    bilinear = F.interpolate(student, (8, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(loss(student, teacher), loss(bilinear, teacher))
    student, teacher = _maps((2, 3, 12, 6), (2, 3, 4, 3))
    averages = student.reshape(2, 3, 4, 3, 3, 2).mean((3, 5))
    torch.testing.assert_close(loss(student, teacher), loss(averages, teacher))


@every_module
@pytest.mark.parametrize("size", [(5, 4), (2, 8), (1, 1)])
def test_gradients_are_those_of_finite_differences(make, size):
    loss = make(2, 3).double()
    student, teacher = _maps((2, 2, 4, 3), (2, 3, *size))
    parameters = tuple(loss.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: loss(x, teacher), (student, *parameters))


@every_module
def test_no_gradient_reaches_the_teacher(make):
    student, teacher = _maps(teacher=(2, 6, 7, 7))
    teacher.requires_grad_()
    loss = make(3, 6).double()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert all(p.grad is not None for p in loss.parameters())


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_under_autocast_too(make, dtype):
    student, teacher = _maps(teacher=(2, 6, 7, 7), dtype=dtype)
    loss = make(3, 6)
    expected = loss(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        for value in (loss(student, teacher), loss(student.float(), teacher)):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected, atol=0, rtol=0)
        loss(student, teacher).backward()
    assert student.grad.dtype == dtype


@every_module
def test_weights_of_another_precision_are_computed_in_that_of_the_maps(make):
    student, teacher = _maps(teacher=(2, 6, 5, 4))
    loss = make(3, 6)
    assert loss(student, teacher).dtype == torch.float64
    expected = loss.bfloat16().double()(student, teacher)
    torch.testing.assert_close(loss.bfloat16()(student, teacher), expected)


@pytest.mark.slow
@every_module
def test_a_loss_compiles_in_one_piece(make):
    student, teacher = _maps((2, 3, 14, 14), (2, 6, 7, 7), torch.float32)
    loss = make(3, 6)
    value = torch.compile(loss, fullgraph=True)(student, teacher)
    torch.testing.assert_close(value, loss(student, teacher))
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(student, teacher), student)[0])


MAP = torch.zeros(2, 3, 4, 4)


@every_module
@pytest.mark.parametrize(
    ("student", "teacher", "error", "words"),
    [
        (None, MAP, TypeError, r"student must be a tensor \[N, C, H, W\], got NoneType"),
        (MAP, MAP.long(), TypeError, "teacher must be a floating-point tensor, got torch.int64"),
        (MAP[0], MAP, ValueError, r"student must have shape \[N, C, H, W\], none of them 0, got \(3, 4, 4\)"),
        (MAP, MAP[:, :2], ValueError, r"teacher must have 3 channels, got shape \(2, 2, 4, 4\)"),
        (MAP[:1], MAP, ValueError, "student and teacher must be maps of as many images, got 1 and 2"),
        (MAP[:0], MAP[:0], ValueError, r"student must have shape .*, got \(0, 3, 4, 4\)"),
    ],
)
def test_wrong_maps_are_told(make, student, teacher, error, words):
    with pytest.raises(error, match=words):
        make(3, 3)(student, teacher)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FeatureLoss(0, 3), ValueError, "student_channels must be at least 1, got 0"),
        (lambda: FeatureLoss(3, 3.0), TypeError, "teacher_channels must be a whole number, got 3.0"),
        (lambda: MGD(True, 3), TypeError, "student_channels must be a whole number, got True"),
        (lambda: FeatureLoss(3, 3, "l2"), ValueError, "unknown kind 'l2'.*Known: mse, smooth_l1"),
        (lambda: FeatureLoss(3, 3, beta=0), ValueError, "beta must be above 0 and finite, got 0"),
        (lambda: MGD(3, 3, mask_share=1), ValueError, "mask_share must be at least 0 and below 1, got 1"),
        (lambda: MGD(3, 3, weight=-1), ValueError, "weight must be at least 0 and finite, got -1"),
        (lambda: MGD(3, 3, hide="pixel"), ValueError, "unknown hide 'pixel'; did you mean 'pixels'"),
    ],
)
def test_wrong_settings_are_told(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_settings_are_shown():
    assert "kind=smooth_l1, beta=2" in repr(FeatureLoss(3, 3))
    assert "mask_share=0.5, weight=7e-05, hide=channels" in repr(MGD(3, 3))
