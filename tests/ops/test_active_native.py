"""The CPU kernels of the active shift where they change their ways: sizes, channels, cells and threads."""

import math

import pytest
import torch

from shiftconv.ops.active_shift import reference, reference_backward
from shiftconv.ops.sampling import MODES

from .cases import native_or_skip

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ZEROS = MODES["zeros"]
last = torch.channels_last
# One plane is a few vectors, many, a whole number of them, one number less; channels fill blocks of 16 or 32, or not.
SHAPES = [
    (4, 40, 7, 7),
    (2, 20, 28, 28),
    (3, 33, 16, 32),
    (3, 33, 33, 31),
    (2, 64, 3, 1),
    (1, 9, 130, 50),
    (2, 48, 1, 5),
]


@pytest.fixture(autouse=True, scope="module")
def _native():
    native_or_skip("active_shift", "shift")


def forward(*arguments):
    return torch.ops.shiftconv.active_shift.default(*arguments)


def backward(*arguments):
    return torch.ops.shiftconv.active_shift_backward.default(*arguments)


def sample(shape, reach, dtype, layout=torch.contiguous_format):
    """x, grad and offsets up to ``reach``, some of them whole; -1 would widen the 3x3 pixels that near ones read."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    offset = (2 * torch.rand(shape[1], len(shape) - 2, generator=generator) - 1) * reach
    offset[::5] = offset[::5].round().clamp_min(0)
    return x, grad, offset.double()


def check(x, grad, offset, mode, rounded):
    """All that the kernels compute, against the reference in float64."""
    wide, wide_grad = x.double(), grad.double()
    for transpose, image in ((False, x), (True, grad)):
        y = forward(image, offset, mode, rounded, 0, transpose, [])
        bound = reference(image.double().abs(), offset, mode, rounded, 0, transpose)
        assert_within(y, reference(image.double(), offset, mode, rounded, 0, transpose), bound, x.dtype)
        assert y.stride() == image.stride()
    grad_x, grad_offset = backward(grad, x, offset, mode, rounded, [])
    truth = reference_backward(wide_grad, wide, offset, mode, rounded)
    bound = reference(wide_grad.abs(), offset, mode, rounded, 0, True)
    assert_within(grad_x, truth[0], bound, x.dtype)
    bound = wide_grad.abs().transpose(0, 1).flatten(1).sum(1)[:, None] + 1
    assert_within(grad_offset, truth[1], 4 * bound, torch.float64 if x.dtype is torch.float64 else torch.float32)


def assert_within(came, truth, bound, dtype):
    """Errors are of the size of what was added up."""
    assert ((came.double() - truth).abs() <= TOLERANCE[dtype] * (bound + 1e-3)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, last], ids=str)
@pytest.mark.parametrize("reach", [1, 2.5, 60])
def test_near_and_far_cells_of_all_sizes(shape, layout, reach):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for rounded in (False, True):
            check(*sample(shape, reach, dtype, layout), ZEROS, rounded)


@pytest.mark.parametrize("mode", MODES.values(), ids=[*MODES])
def test_one_and_three_axes(mode):
    for shape in ((2, 3, 1000), (2, 17, 3, 5, 18)):
        for dtype in (torch.float32, torch.bfloat16):
            check(*sample(shape, 1.5, dtype), mode, False)
    check(*sample((2, 17, 3, 5, 18), 1.5, torch.float32, torch.channels_last_3d), mode, False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, last], ids=str)
def test_threads_do_not_change_a_bit(shape, layout):
    """Where the planes of one thread end, another one has written already."""
    threads = torch.get_num_threads()
    shape = (shape[0] * 6, *shape[1:])
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for rounded in (False, True):
                x, grad, offset = sample(shape, 1, dtype, layout)
                results = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    y = forward(x, offset, ZEROS, rounded, 0, False, [])
                    results.append([y, *backward(grad, x, offset, ZEROS, rounded, [])])
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, last], ids=str)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_reaches_its_taps_only(dtype, layout, value):
    """Neighbouring channels, rows and images are loaded with it; whole cells read one pixel of it."""
    x, _, offset = sample((2, 64, 9, 9), 1, dtype, layout)
    where = torch.zeros(x.shape, dtype=torch.bool)
    where[1, ::3, 4, 8] = where[0, ::7, 0, 0] = where[0, 63, 8, 8] = True
    y = forward(x.clone().masked_fill_(where, value), offset, ZEROS, False, 0, False, [])
    assert y.stride() == x.stride()
    reached = reference(where.double(), offset, ZEROS, False, 0, False) > 0
    assert torch.equal(~y.isfinite(), reached)
    clean = forward(x, offset, ZEROS, False, 0, False, [])
    assert torch.equal(y[~reached], clean[~reached])


def test_one_plane_of_many_vectors_at_the_ends_of_memory():
    """The first and the last plane of a tensor have no neighbours to load from; these are both."""
    for shape in ((1, 1, 1, 1), (1, 1, 2, 3), (1, 1, 90, 70), (1, 1, 5)):
        check(*sample(shape, 2, torch.float32), ZEROS, False)
