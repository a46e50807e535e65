"""The temporal shift: part of the channels come from the next frame, part from the previous one.

Source: Lin et al., "TSM: Temporal Shift Module for Efficient Video Understanding", ICCV 2019, arXiv:1811.08383.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftconv.nn.arguments import positive
from shiftconv.nn.base import dense_kernel
from shiftconv.ops import shift
from shiftconv.ops.sampling import format_of


class TemporalShift(nn.Module):
    """Shift channels of a clip by one frame in time: the first group to the past, the second to the future.

    The first ``C // divisor`` channels of each frame come from the next frame, the next ``C // divisor`` from the
    previous one, the others stay; before the first and after the last frame there are zeros.

    Args:
        channels: ``C``.
        frames: ``T`` where clips lie in the batch, ``[N * T, C, *S]`` with up to two spatial axes, as 2-D layers take
            them; none for ``[N, C, T, *S]``.
        divisor: 8 in the paper, that is a quarter of the channels move in all; ``C // divisor`` may be zero.
        bidirectional: no: only the group that comes from the previous frame, and it is the first; a stream of frames
            gets the same from :class:`OnlineTemporalShift`.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, two groups that are more than all channels; in a call, an ``x`` of another shape.
    """

    def __init__(self, channels: int, frames: int | None = None, divisor: int = 8, bidirectional: bool = True):
        super().__init__()
        self.channels = positive("channels", channels)
        self.frames = None if frames is None else positive("frames", frames)
        self.divisor = positive("divisor", divisor)
        self.bidirectional = bidirectional
        each = channels // divisor
        steps = [-1, 1] if bidirectional else [1]
        if each * len(steps) > channels:
            raise ValueError(f"divisor must be at least 2 for a shift both ways, got {divisor}")
        offset = torch.tensor(steps).repeat_interleave(each)[:, None]
        self.register_buffer("offset", F.pad(offset, (0, 0, 0, channels - len(offset))), persistent=False)
        self.moved = len(offset)

    offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.frames is None:
            self._check(x, x.ndim in (3, 4, 5), "[N, {}, T, *S]")
            return shift(x, F.pad(self.offset, (0, x.ndim - 3)))
        expected = f"[N * {self.frames}, {{}}, *S] with up to two spatial axes"
        self._check(x, x.ndim in (2, 3, 4) and x.shape[0] % self.frames == 0, expected)
        # Only what moves goes through the operator, which wants time behind the channels.
        clips = x[:, : self.moved].unflatten(0, (-1, self.frames)).transpose(1, 2)
        moved = shift(clips, F.pad(self.offset[: self.moved], (0, clips.ndim - 3))).transpose(1, 2).flatten(0, 1)
        return torch.cat((moved.contiguous(memory_format=format_of(x)), x[:, self.moved :]), 1)

    def _check(self, x: Tensor, fits: bool, expected: str) -> None:
        if not fits or x.shape[1] != self.channels:
            raise ValueError(f"TemporalShift takes x {expected.format(self.channels)}, got {[*x.shape]}")

    def online(self) -> "OnlineTemporalShift":
        """The same shift for a stream of frames.

        Raises:
            ValueError: this one is bidirectional, so it needs a frame that has not come yet.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional shift needs the next frame; train with bidirectional=False to stream")
        return OnlineTemporalShift(self.channels, self.divisor).to(self.offset.device).train(self.training)

    def equivalent_kernel(self) -> Tensor:
        """The shift as a dense depthwise kernel over time, ``[C, 1, 3]``, for maps padded by one frame of zeros."""
        return dense_kernel(self.offset, [1])

    def extra_repr(self) -> str:
        text = f"{self.channels}" + (f", frames={self.frames}" if self.frames is not None else "")
        text += f", divisor={self.divisor}" if self.divisor != 8 else ""
        return text + ("" if self.bidirectional else ", bidirectional=False")


class OnlineTemporalShift(nn.Module):
    """The one-directional temporal shift of a stream, frame by frame: ``[N, C, *S]`` to the same shape.

    The first ``C // divisor`` channels come from the frame before, at the first frame zeros. Frame by frame it is what
    ``TemporalShift(channels, divisor=divisor, bidirectional=False)`` computes for the whole clip. Call :meth:`reset`
    before a new stream, for all of them ``model.apply(lambda m: isinstance(m, OnlineTemporalShift) and m.reset())``.
    What it remembers moves with the model, but is not part of the state dict, and no gradient flows into the past.

    Args:
        channels: ``C``.
        divisor: as in :class:`TemporalShift`.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1; in a call, a frame of another shape than those before it.
    """

    state: Tensor | None

    def __init__(self, channels: int, divisor: int = 8):
        super().__init__()
        self.channels = positive("channels", channels)
        self.divisor = positive("divisor", divisor)
        self.moved = channels // divisor
        self.register_buffer("state", None, persistent=False)

    def reset(self) -> None:
        """Forget the last frame."""
        self.state = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.state = self.step(x, self.state)
        return y

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One frame, without a memory of its own (for export): its output, and the state for the next frame.

        Args:
            x: the frame, ``[N, C, *S]``.
            state: what the frame before returned, ``[N, C // divisor, *S]``; none at the first.

        Raises:
            ValueError: ``x`` has another number of channels, or ``state`` another batch or size.
        """
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"OnlineTemporalShift takes x [N, {self.channels}, *S], got {[*x.shape]}")
        now = x[:, : self.moved].detach().clone()
        if state is None:
            state = torch.zeros_like(now)
        elif state.shape != now.shape:
            raise ValueError(f"the frame before was {[*state.shape]}, this is {[*now.shape]}; call reset() in between")
        return torch.cat((state.to(x.dtype), x[:, self.moved :]), 1), now

    def extra_repr(self) -> str:
        return f"{self.channels}" + (f", divisor={self.divisor}" if self.divisor != 8 else "")
