"""The fixed shifts of published networks, each against a plain statement of its paper in torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shiftconv.nn import AxialShift2d, FourConnectedShift2d, SpatialShift2d


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def axial(x: Tensor, size: int, axis: int, dilation: int, mode: str) -> Tensor:
    """Pad, cut into groups, roll each one further than the one before, and drop the padding."""
    reach = size // 2 * dilation
    groups = F.pad(x, [reach] * 4, mode).chunk(size, 1)
    rolled = [group.roll(dilation * (i - size // 2), axis) for i, group in enumerate(groups)]
    return torch.cat(rolled, 1)[:, :, reach : reach + x.shape[2], reach : reach + x.shape[3]]


def spatial(x: Tensor, width_first: bool) -> Tensor:
    """A quarter each takes over its neighbours' pixels; the border, which has no neighbour, stays."""
    y, quarter = x.clone(), x.shape[1] // 4
    if width_first:
        x, y = x.mT, y.mT
    one, two, three = (slice(i * quarter, (i + 1) * quarter) for i in range(3))
    four = slice(3 * quarter, None)
    y[:, one, 1:] = x[:, one, :-1]
    y[:, two, :-1] = x[:, two, 1:]
    y[:, three, :, 1:] = x[:, three, :, :-1]
    y[:, four, :, :-1] = x[:, four, :, 1:]
    return y.mT if width_first else y


def four_connected(x: Tensor, each: int, distance: int) -> Tensor:
    y = x.clone()
    y[:, : 4 * each] = 0
    for i, (axis, forward) in enumerate(((2, True), (2, False), (3, True), (3, False))):
        group = slice(i * each, (i + 1) * each)
        kept = x.shape[axis] - distance
        source = x[:, group].narrow(axis, 0 if forward else distance, kept)
        y[:, group].narrow(axis, distance if forward else 0, kept).copy_(source)
    return y


@pytest.mark.parametrize("channels", [5, 12, 15, 3])
@pytest.mark.parametrize(("size", "axis", "dilation"), [(5, 3, 1), (3, 2, 2), (1, 2, 1), (7, -1, 1), (4, -2, 1)])
@pytest.mark.parametrize(("mode", "padding"), [("zeros", "constant"), ("reflect", "reflect"), ("circular", "circular")])
def test_axial_shift(channels, size, axis, dilation, mode, padding):
    shift = AxialShift2d(channels, size, axis, dilation, mode)
    x = image(2, channels, 8, 9)
    assert torch.equal(shift(x), axial(x, size, axis, dilation, padding))


@pytest.mark.parametrize("channels", [4, 8, 11, 3])
@pytest.mark.parametrize("width_first", [False, True])
def test_spatial_shift(channels, width_first):
    x = image(2, channels, 5, 6)
    assert torch.equal(SpatialShift2d(channels, width_first)(x), spatial(x, width_first))


@pytest.mark.parametrize(
    ("channels", "moved", "distance"), [(10, None, 1), (13, None, 2), (24, 2, 1), (8, 2, 3), (4, None, 1)]
)
def test_four_connected_shift(channels, moved, distance):
    shift = FourConnectedShift2d(channels, moved, distance)
    x = image(2, channels, 5, 6)
    assert torch.equal(shift(x), four_connected(x, channels // 5 if moved is None else moved, distance))


def test_repr_says_what_is_not_usual():
    assert repr(AxialShift2d(9, 3, -2, 2)) == "AxialShift2d(9, shift_size=3, axis=2, dilation=2)"
    assert repr(SpatialShift2d(9, True)) == "SpatialShift2d(9, width_first=True, padding_mode='replicate')"
    assert repr(FourConnectedShift2d(9, 1, 2)) == "FourConnectedShift2d(9, moved=1, distance=2)"


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (ValueError, "axis must be 2 or -2 .* got 1", lambda: AxialShift2d(9, axis=1)),
        (ValueError, "shift_size must be at least 1, got 0", lambda: AxialShift2d(9, 0)),
        (TypeError, "dilation must be a whole number, got 1.5", lambda: AxialShift2d(9, dilation=1.5)),
        (ValueError, "moved must be at most a quarter of the 9 channels, got 3", lambda: FourConnectedShift2d(9, 3)),
        (ValueError, "unknown padding_mode 'zero'", lambda: SpatialShift2d(9, padding_mode="zero")),
    ],
)
def test_bad_arguments(error, match, make):
    with pytest.raises(error, match=match):
        make()
