"""A shift in the place of a depthwise convolution against the convolution itself, with one-hot kernels."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from shiftconv.nn import ActiveShift2d, GroupShift2d, SparseShift1d, emulate_depthwise

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ["zeros", "reflect", "replicate", "circular"]


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(conv: nn.Module, taps: list[tuple[int, ...]]) -> None:
    """Channel ``c`` of the convolution reads tap ``taps[c]`` alone."""
    with torch.no_grad():
        conv.weight.zero_()
        for channel, tap in enumerate(taps):
            conv.weight[(channel, 0, *tap)] = 1


def offset_of(conv: nn.Module, taps: list[tuple[int, ...]]) -> Tensor:
    """By the definition of the module: the middle of the kernel, rounded down to a pixel, is offset zero."""
    middle = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return torch.tensor([[m - d * t for m, d, t in zip(middle, conv.dilation, tap, strict=True)] for tap in taps])


def every_tap(conv: nn.Module) -> list[tuple[int, ...]]:
    return [*itertools.product(*map(range, conv.kernel_size))]


def test_as_many_outputs_and_the_same_taps_for_all_sizes():
    """Kernels 1..7, strides 1..3, paddings 0..4, five lengths: also where the padding enlarges the map."""
    checked = 0
    for k, stride, padding in itertools.product(range(1, 8), range(1, 4), range(5)):
        conv = nn.Conv1d(k, k, k, stride, padding, groups=k, bias=False).double()
        taps = every_tap(conv)
        one_hot(conv, taps)
        sparse, grouped = emulate_depthwise(conv), emulate_depthwise(conv, "group")
        with torch.no_grad():
            sparse.offset.copy_(offset_of(conv, taps))
        for length in (3, 6, 7, 12, 16):
            x = image(2, k, length)
            if length + 2 * padding < k:
                with pytest.raises(ValueError, match=r"crop .* leaves"):
                    sparse(x)
                continue
            expected = conv(x)
            assert torch.equal(sparse(x), expected)
            assert torch.equal(grouped(x), expected)
            checked += 1
    assert checked > 480


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kernel_size", "arguments"),
    [
        ((5,), dict(padding=3, dilation=2)), ((4,), dict(padding="same")), ((2,), dict(padding="same", dilation=3)),
        ((3, 4), dict(padding=(2, 1), stride=(1, 2))), ((4, 3), dict(padding="same", dilation=(1, 2))),
        ((4, 2), dict(padding="valid", dilation=(1, 3))), ((3, 3), dict(padding=3, dilation=(1, 2), stride=3)),
        ((2, 3, 2), dict(padding=(2, 0, 1), stride=(2, 1, 1), dilation=(1, 1, 2))), ((2, 2, 3), dict(padding="same")),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_tap_is_the_one_hot_convolution(kernel_size, arguments, mode):
    channels, ndim = 24, len(kernel_size)
    taps = every_tap(CONVS[ndim](1, 1, kernel_size))
    taps = (taps * channels)[:channels]
    conv = CONVS[ndim](channels, channels, kernel_size, **arguments, groups=channels, bias=False, padding_mode=mode)
    one_hot(conv.double(), taps)
    x = image(2, channels, *(9, 8, 7)[:ndim]).requires_grad_()
    expected = conv(x)
    grad = image(*expected.shape, seed=1)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    for kind in ("sparse", "active"):
        shift = emulate_depthwise(conv, kind)
        with torch.no_grad():
            shift.offset.copy_(offset_of(conv, taps))
        y = shift(x)
        assert torch.equal(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected_grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel_size", [(3, 3), (4, 3)])
def test_group_has_the_taps_in_turn(kernel_size, mode):
    conv = nn.Conv2d(26, 26, kernel_size, 2, 2, (1, 2), groups=26, bias=False, padding_mode=mode).double()
    count = kernel_size[0] * kernel_size[1]
    taps = every_tap(conv) * (26 // count)
    one_hot(conv, taps + [(kernel_size[0] // 2, 1)] * (26 - len(taps)))  # left-over channels stay
    shift = emulate_depthwise(conv, "group")
    assert type(shift) is GroupShift2d
    x = image(2, 26, 9, 10)
    assert torch.equal(shift(x), conv(x))


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "low", "high"),
    [(3, 1, -1, 1), (7, 1, -3, 3), (5, 3, -6, 6), (4, 1, -2, 1), (2, 2, -1, 1)],
)
@pytest.mark.parametrize("kind", ["sparse", "active"])
def test_starts_in_the_reach_of_the_kernel(kernel_size, dilation, low, high, kind):
    conv = nn.Conv1d(2000, 2000, kernel_size, dilation=dilation, groups=2000, device="meta")
    shift = emulate_depthwise(conv.to_empty(device="cpu"), kind, generator=torch.Generator().manual_seed(0))
    offset = shift.offset.detach()
    assert low <= offset.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < offset.max() <= high
    assert abs(offset.mean() - (low + high) / 2) < 0.04 * (high - low)


def test_takes_what_the_convolution_has():
    conv = nn.Conv2d(6, 6, 3, groups=6).to(torch.bfloat16).eval()
    shift = emulate_depthwise(conv, "active", normalize_gradient=True)
    assert type(shift) is ActiveShift2d and shift.normalize_gradient and not shift.training
    assert shift.offset.dtype == torch.float32
    assert shift(torch.zeros(1, 6, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert emulate_depthwise(nn.Conv2d(6, 6, 3, groups=6, device="meta")).offset.is_meta
    assert emulate_depthwise(conv.double()).offset.dtype == torch.float64


def test_draws_from_the_given_generator():
    conv = nn.Conv1d(8, 8, 3, groups=8)
    one, two = (emulate_depthwise(conv, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert type(one) is SparseShift1d and torch.equal(one.offset, two.offset)


class Padded(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


@pytest.mark.parametrize(
    ("error", "match", "conv", "kind"),
    [
        (TypeError, "expected an nn.Conv1d, .* got Linear", nn.Linear(3, 3), "sparse"),
        (TypeError, "expected an nn.Conv1d, .* got ConvTranspose2d", nn.ConvTranspose2d(3, 3, 3, groups=3), "sparse"),
        (TypeError, "Padded is no plain Conv2d: it has a forward of its own", Padded(3, 3, 3, groups=3), "sparse"),
        (ValueError, "got 4 inputs, 4 outputs and 2 groups", nn.Conv2d(4, 4, 3, groups=2), "sparse"),
        (ValueError, "got 4 inputs, 8 outputs and 4 groups", nn.Conv2d(4, 8, 3, groups=4), "active"),
        (ValueError, "unknown kind 'sparce'; did you mean 'sparse'", nn.Conv2d(4, 4, 3, groups=4), "sparce"),
    ],
)
def test_bad_arguments(error, match, conv, kind):
    with pytest.raises(error, match=match):
        emulate_depthwise(conv, kind)
