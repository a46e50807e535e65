"""The temporal shift against a plain statement of the paper, and the stream against the clip."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftconv.nn import OnlineTemporalShift, TemporalShift


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(clip: Tensor, each: int, bidirectional: bool = True) -> Tensor:
    """``[N, T, C, *S]``: the first group from the next frame, the second from the one before."""
    y = torch.zeros_like(clip)
    past = each if bidirectional else 0
    y[:, :-1, :past] = clip[:, 1:, :past]
    y[:, 1:, past : past + each] = clip[:, :-1, past : past + each]
    y[:, :, past + each :] = clip[:, :, past + each :]
    return y


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("channels", "divisor"), [(16, 8), (19, 8), (5, 8), (6, 2), (4, 4)])
@pytest.mark.parametrize("space", [(), (3,), (3, 4)])
def test_clips_in_both_layouts(channels, divisor, bidirectional, space):
    clip = image(2, 5, channels, *space)
    expected = plain(clip, channels // divisor, bidirectional)
    volume = TemporalShift(channels, None, divisor, bidirectional)
    assert torch.equal(volume(clip.transpose(1, 2)), expected.transpose(1, 2))
    frames = TemporalShift(channels, 5, divisor, bidirectional)
    x = clip.flatten(0, 1).requires_grad_()
    y = frames(x)
    assert torch.equal(y, expected.flatten(0, 1))
    grad = image(*y.shape, seed=1)
    (got,) = torch.autograd.grad(y, x, grad)
    (want,) = torch.autograd.grad(
        plain(x.unflatten(0, (2, 5)), channels // divisor, bidirectional).flatten(0, 1), x, grad
    )
    assert torch.equal(got, want)


def test_frames_keep_the_memory_format():
    x = image(6, 16, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    shift = TemporalShift(16, 3)
    assert shift(x).is_contiguous() and shift(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(shift(x), shift(last))


def test_equivalent_kernel():
    shift = TemporalShift(17)
    x = image(2, 17, 6)
    assert torch.equal(shift(x), F.conv1d(x, shift.equivalent_kernel().double(), padding=1, groups=17))


@pytest.mark.parametrize(("channels", "divisor"), [(16, 8), (5, 8), (6, 1)])
def test_stream_is_the_clip(channels, divisor):
    clip = image(2, 5, channels, 3, 4)
    offline = TemporalShift(channels, None, divisor, bidirectional=False)
    online = offline.online()
    expected = offline(clip.transpose(1, 2)).transpose(1, 2)
    for _ in range(2):
        for t in range(5):
            frame = clip[:, t].clone()
            assert torch.equal(online(frame), expected[:, t])
            frame.zero_()  # what follows may write into its input
        online.reset()


def test_state_in_and_out():
    online, clip = OnlineTemporalShift(8, 4), image(1, 3, 8, 2, 2)
    state = None
    for t in range(3):
        y, state = online.step(clip[:, t], state)
        assert torch.equal(y, plain(clip, 2, bidirectional=False)[:, t])
    assert online.state is None  # a step has no memory


def test_state_is_kept_apart():
    online = OnlineTemporalShift(8)
    x = image(2, 8, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    y = online(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.requires_grad
    assert online.state is not None and not online.state.requires_grad and not online.state_dict()
    assert torch.equal(copy.deepcopy(online)(x), pickle.loads(pickle.dumps(online))(x))
    assert online.float().state.dtype == torch.float32
    with pytest.raises(ValueError, match=r"was \[2, 1, 3, 3\], this is \[1, 1, 3, 3\]; call reset\(\)"):
        online(x[:1])
    model = nn.Sequential(nn.Identity(), online)
    model.apply(lambda m: isinstance(m, OnlineTemporalShift) and m.reset())
    assert online(x[:1]).shape == (1, 8, 3, 3)


def test_repr_says_what_is_not_usual():
    assert repr(TemporalShift(9)) == "TemporalShift(9)"
    assert repr(TemporalShift(9, 4, 3, False)) == "TemporalShift(9, frames=4, divisor=3, bidirectional=False)"
    assert repr(OnlineTemporalShift(9, 4)) == "OnlineTemporalShift(9, divisor=4)"


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("channels must be at least 1, got 0", lambda: TemporalShift(0)),
        ("divisor must be at least 2 for a shift both ways, got 1", lambda: TemporalShift(8, divisor=1)),
        ("frames must be at least 1, got 0", lambda: TemporalShift(8, 0)),
        (r"takes x \[N, 8, T, \*S\], got \[2, 7, 5\]", lambda: TemporalShift(8)(torch.zeros(2, 7, 5))),
        (r"takes x \[N \* 3, 8, \*S\] .* got \[4, 8, 2, 2\]", lambda: TemporalShift(8, 3)(torch.zeros(4, 8, 2, 2))),
        ("a bidirectional shift needs the next frame", lambda: TemporalShift(8).online()),
        (r"takes x \[N, 8, \*S\], got \[1, 9, 2\]", lambda: OnlineTemporalShift(8)(torch.zeros(1, 9, 2))),
    ],
)  # fmt: skip
def test_bad_arguments(match, call):
    with pytest.raises(ValueError, match=match):
        call()
