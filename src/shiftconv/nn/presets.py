"""Fixed shifts of published networks, each a table of offsets for the one operator. No parameters."""

from collections.abc import Sequence

import torch

from shiftconv.nn.arguments import positive
from shiftconv.nn.base import IntegerShift
from shiftconv.ops import PaddingMode


class AxialShift2d(IntegerShift):
    """Shift ``[N, C, H, W]`` along one axis, groups of channels by ``-(s // 2)`` ... ``s // 2`` pixels each.

    As ``torch.chunk`` cuts, the groups have ``ceil(C / s)`` channels and the last ones fewer. AS-MLP adds two of
    these, one along each axis. Source: Lian et al., "AS-MLP", ICLR 2022, arXiv:2107.08391, section 3.2.

    Args:
        channels: ``C``.
        shift_size: ``s``, the number of groups; an even one reaches ``s // 2 - 1`` pixels forward.
        axis: 2 shifts down and up, 3 right and left; or counted from the end.
        dilation: pixels between neighbouring groups.
        padding_mode: what the vacated border reads, as in :func:`shiftconv.ops.shift`.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, an axis that is no spatial one, an unknown padding mode.
    """

    ndim = 2

    def __init__(
        self,
        channels: int,
        shift_size: int = 5,
        axis: int = -1,
        dilation: int = 1,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__(channels, padding_mode)
        if axis not in (-2, -1, 2, 3):
            raise ValueError(f"axis must be 2 or -2 (height), 3 or -1 (width), got {axis!r}")
        self.shift_size = positive("shift_size", shift_size)
        self.dilation = positive("dilation", dilation)
        self.axis = axis % 4
        each = -(-channels // shift_size)
        steps = torch.arange(channels) // each - shift_size // 2
        offset = torch.zeros(channels, 2, dtype=torch.int64)
        offset[:, self.axis - 2] = dilation * steps
        self.register_buffer("offset", offset, persistent=False)

    def extra_repr(self) -> str:
        text = f"{self.channels}, shift_size={self.shift_size}, axis={self.axis}"
        text += f", dilation={self.dilation}" if self.dilation != 1 else ""
        return text + self._window_repr()


class SpatialShift2d(IntegerShift):
    """Shift a quarter of the channels of ``[N, C, H, W]`` by one pixel each: down, up, right and left.

    The border pixels stay in place (``replicate``). Channels beyond a multiple of four join the last group. Sources: Yu
    et al., "S2-MLP", WACV 2022, arXiv:2106.07477, section 3.2; "S2-MLPv2", arXiv:2108.01072, for the other order.

    Args:
        channels: ``C``.
        width_first: right, left, down, up, as the second of the two shifts of S2-MLPv2.
        padding_mode: what the vacated border reads, as in :func:`shiftconv.ops.shift`.

    Raises:
        TypeError: channels that are no whole number.
        ValueError: channels below 1, an unknown padding mode.
    """

    ndim = 2

    def __init__(self, channels: int, width_first: bool = False, padding_mode: PaddingMode = "replicate"):
        super().__init__(channels, padding_mode)
        self.width_first = width_first
        steps = [(0, 1), (0, -1), (1, 0), (-1, 0)] if width_first else [(1, 0), (-1, 0), (0, 1), (0, -1)]
        each = channels // 4
        offset = _groups(channels, each, steps)
        offset[4 * each :] = torch.tensor(steps[-1])
        self.register_buffer("offset", offset, persistent=False)

    def extra_repr(self) -> str:
        return f"{self.channels}{', width_first=True' if self.width_first else ''}, padding_mode={self.padding_mode!r}"


class FourConnectedShift2d(IntegerShift):
    """Shift groups of channels of ``[N, C, H, W]`` down, up, right and left; the channels after them stay.

    Source: Brown et al., "4-Connected Shift Residual Networks", ICCV Workshops 2019, arXiv:1910.09931. With
    ``moved=C // 12`` it is the shift of ShiftViT (Wang et al., AAAI 2022, arXiv:2201.10801), up to the groups' order.

    Args:
        channels: ``C``.
        moved: channels in each of the four groups; by default a fifth, as many as stay.
        distance: pixels by which they move.
        padding_mode: what the vacated border reads, as in :func:`shiftconv.ops.shift`.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, four groups that are more than all channels, an unknown padding mode.
    """

    ndim = 2

    def __init__(self, channels: int, moved: int | None = None, distance: int = 1, padding_mode: PaddingMode = "zeros"):
        super().__init__(channels, padding_mode)
        self.moved = channels // 5 if moved is None else positive("moved", moved)
        if 4 * self.moved > channels:
            raise ValueError(f"moved must be at most a quarter of the {channels} channels, got {moved}")
        self.distance = positive("distance", distance)
        steps = [(distance, 0), (-distance, 0), (0, distance), (0, -distance)]
        self.register_buffer("offset", _groups(channels, self.moved, steps), persistent=False)

    def extra_repr(self) -> str:
        text = f"{self.channels}, moved={self.moved}"
        text += f", distance={self.distance}" if self.distance != 1 else ""
        return text + self._window_repr()


def _groups(channels: int, each: int, steps: Sequence[tuple[int, int]]) -> torch.Tensor:
    """``each`` channels for every step in turn, ``[C, 2]``; the others zero."""
    offset = torch.zeros(channels, 2, dtype=torch.int64)
    offset[: each * len(steps)] = torch.tensor(steps).repeat_interleave(each, dim=0)
    return offset
