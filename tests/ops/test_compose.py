"""Composed kernels against sums written out in NumPy, and against small convolutions, maps shifted and added."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shiftconv.ops.compose import compose, composed_padding, placements, slot_count, slot_offset
from shiftconv.ops.cross_conv import cross_conv
from shiftconv.ops.depthwise import depthwise_conv
from shiftconv.ops.shift_sum import shift_sum


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(channels, filters, *size, dtype=torch.float64):
    return torch.randn(channels, filters, *size, generator=seeded(1), dtype=torch.float64).to(dtype)


def table(channels, filters, ways, count=None, lowest=0):
    return torch.randint(lowest, count or filters, (channels, filters, ways), generator=seeded(2))


def oracle(weight, slots, grid, coefficient=None):
    """Every small kernel added to its cell of a large array."""
    channels, _, kh, kw = weight.shape
    kernel = np.zeros((channels, 1, grid[0] * kh, grid[1] * kw))
    for index in np.ndindex(slots.shape):
        c, k, _ = index
        if slots[index] >= 0:
            row, column = divmod(int(slots[index]), grid[1])
            cell = kernel[c, 0, row * kh : (row + 1) * kh, column * kw : (column + 1) * kw]
            cell += weight[c, k] * (1 if coefficient is None else coefficient[index])
    return torch.from_numpy(kernel)


@pytest.mark.parametrize("grid", [(4, 1), (1, 4), (1, 1), (3, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (2, 2), (1, 1), (4, 3)], ids=str)
def test_equals_sums_of_cells(grid, size):
    weight, count = weights(3, 5, *size), grid[0] * grid[1]
    slots = table(3, 5, 4, count, -1)
    coefficient = torch.randn(slots.shape, generator=seeded(3), dtype=torch.float64)
    for given in (None, coefficient):
        expected = oracle(weight.numpy(), slots.numpy(), grid, None if given is None else given.numpy())
        matrix = placements(slots, count, given)
        torch.testing.assert_close(compose(weight, matrix, grid), expected, rtol=1e-12, atol=1e-12)
        as_conv = weight.reshape(15, 1, *size)
        torch.testing.assert_close(compose(as_conv, matrix, grid), expected, rtol=1e-12, atol=1e-12)
    few = weights(3, count, *size)
    ordered = torch.arange(count).view(1, -1, 1).expand(3, -1, 1)
    torch.testing.assert_close(compose(few, None, grid), oracle(few.numpy(), ordered.numpy(), grid))
    torch.testing.assert_close(compose(few.reshape(-1, 1, *size), None, grid), compose(few, None, grid))


def test_several_grids_are_one_after_the_other():
    weight, grids = weights(3, 5, 3, 3), [(5, 1), (1, 5), (1, 1)]
    parts = [placements(table(3, 5, 2, rows * columns), rows * columns) for rows, columns in grids]
    kernels = compose(weight, torch.cat(parts, 1), grids)
    for kernel, part, grid in zip(kernels, parts, grids, strict=True):
        torch.testing.assert_close(kernel, compose(weight, part, grid))
        assert kernel.is_contiguous()


def test_arrangements_add():
    """And small whole counts are exact, in whichever dtype they come."""
    weight, slots = weights(4, 6, 3, 3), table(4, 6, 5)
    each = [compose(weight, placements(slots[..., r : r + 1], 6), (1, 6)) for r in range(5)]
    matrix = placements(slots, 6)
    torch.testing.assert_close(compose(weight, matrix, (1, 6)), sum(each), rtol=1e-14, atol=1e-14)
    assert torch.equal(compose(weight, matrix.to(torch.int8), (1, 6)), compose(weight, matrix, (1, 6)))


def test_a_masked_small_kernel_leaves_its_cell_empty():
    weight = weights(2, 4, 3, 3)
    weight[0, 2] = 0
    kernel = compose(weight, placements(torch.arange(4).view(1, 4, 1).flip(1).expand(2, 4, 1), 4), (4, 1))
    assert kernel[0, 0, 3:6].eq(0).all()
    assert kernel[0].count_nonzero() == 27


def reachable(size, kernel_size, small):
    """The pixels for which no small map is read beyond the border where its kernel still reaches the map."""
    good = torch.ones(size, dtype=torch.bool)
    for slot in range(slot_count(kernel_size, small)):
        at = torch.arange(size) - int(slot_offset(torch.tensor(slot), kernel_size, small))
        good &= ((at >= 0) & (at < size)) | (at <= small // 2 - small) | (at >= size + small // 2)
    return good


@pytest.mark.parametrize("side", [56, 28, 14, 7, 9, (1, 5), (13, 8)], ids=str)
@pytest.mark.parametrize("small", [3, 5, 4])
@pytest.mark.parametrize("kernel_size", [61, 51, 49, 47, 45, 31, 13, 9, 7, 3])
def test_equals_shifted_small_maps(kernel_size, small, side):
    """To 1e-12 with what lies beyond the border (padding k - 1); with k // 2 where no such part is read."""
    height, width = side if isinstance(side, tuple) else (side, side)
    channels, count = 2, slot_count(kernel_size, small)
    weight = weights(channels * count, 1, small, small) / 5
    x = torch.randn(1, channels, height, width, generator=seeded(4), dtype=torch.float64)
    slots = {"tall": table(channels, count, 2), "wide": table(channels, count, 2).flip(1)}
    slots["small"] = torch.where(torch.rand(channels, count, 2, generator=seeded(5)) < 2 / count, 0, -1)
    grids = {"tall": (count, 1), "wide": (1, count), "small": (1, 1)}
    matrix = torch.cat([placements(slots[name], rows * columns) for name, (rows, columns) in grids.items()], 1)
    paddings = composed_padding(kernel_size, small)
    kernels = compose(weight, matrix, [*grids.values()])
    composed = cross_conv(x, *kernels, padding=paddings, summed=False)
    full, edge = F.conv2d(x, weight, padding=small - 1, groups=channels), small - 1 - small // 2
    same = F.conv2d(x, weight, padding=small // 2, groups=channels)
    for name, y, kernel, padding in zip(grids, composed, kernels, paddings, strict=True):
        long = slot_offset(slots[name], kernel_size, small)
        stay = torch.where(slots[name] < 0, 10**6, 0)
        moves = {"tall": (long, stay), "wide": (stay, long), "small": (stay, stay)}[name]
        offset = torch.stack([move.permute(2, 0, 1).flatten(1) for move in moves], 2)
        crop = ((edge, small - 1 - edge),) * 2
        expected = shift_sum(full, offset, channels, crop=crop)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(depthwise_conv(x, kernel, padding=padding), expected, rtol=1e-12, atol=1e-12)
        inner = shift_sum(same, offset, channels, crop=((0, 1 - small % 2),) * 2)
        alike = [reachable(n, kernel_size, small) if name == axis else torch.ones(n, dtype=torch.bool)
                 for n, axis in ((height, "tall"), (width, "wide"))]  # fmt: skip
        alike = alike[0][:, None] & alike[1]
        torch.testing.assert_close(inner[..., alike], expected[..., alike], rtol=1e-12, atol=1e-12)


def test_padding_puts_the_large_kernel_where_the_original_has_it():
    """Its half before the pixel, all other slots after; squares around the middle slot."""
    assert composed_padding(51, 3) == (((25, 25), (1, 1)), ((1, 1), (25, 25)), ((1, 1), (1, 1)))
    assert composed_padding(49, 3)[0] == ((24, 26), (1, 1))
    assert composed_padding(47, 3)[1] == ((1, 1), (23, 24))
    assert composed_padding(13, 5)[1] == ((2, 2), (6, 8))
    assert composed_padding(8, 4) == (((4, 3), (2, 1)), ((2, 1), (4, 3)), ((2, 1), (2, 1)))
    assert composed_padding(13, 3, third=3)[2] == ((4, 4), (4, 4))
    assert composed_padding(12, 4, third=3)[2] == ((6, 5), (6, 5))
    assert [slot_count(k, s) for k, s in ((51, 3), (49, 3), (13, 5), (7, 7), (3, 5))] == [17, 17, 3, 1, 1]


def test_gradients():
    weight, slots = weights(2, 3, 2, 3).requires_grad_(), table(2, 3, 2, 3, -1)
    coefficient = torch.randn(slots.shape, generator=seeded(3), dtype=torch.float64).requires_grad_()

    def run(weight, coefficient):
        matrix = torch.cat((placements(slots, 3, coefficient), placements(slots, 3)), 1)
        return compose(weight, matrix, [(3, 1), (1, 3)])

    assert torch.autograd.gradcheck(run, (weight, coefficient))
    assert torch.autograd.gradgradcheck(run, (weight, coefficient))
    assert torch.autograd.gradcheck(lambda weight: compose(weight, None, (1, 3)), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_rounded_once(dtype):
    weight, matrix = weights(3, 17, 3, 3, dtype=dtype), placements(table(3, 17, 4), 17)
    exact = compose(weight.double(), matrix, (1, 17))
    assert torch.equal(compose(weight, matrix, (1, 17)), exact.to(dtype))
    assert torch.equal(compose(weight, matrix, (1, 17), dtype=torch.float64), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compose(weight, matrix, (1, 17)), exact.to(dtype))


def test_transforms_and_compilation():
    weight, matrix = weights(3, 4, 2, 2), placements(table(3, 4, 2), 4)
    many = torch.stack((weight, weight.flip(0)))
    expected = torch.stack([compose(each, matrix, (1, 4)) for each in many])
    torch.testing.assert_close(torch.vmap(lambda each: compose(each, matrix, (1, 4)))(many), expected)
    grad = torch.func.grad(lambda each: compose(each, matrix, (1, 4)).square().sum())(weight)
    leaf = weight.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(compose(leaf, matrix, (1, 4)).square().sum(), leaf)[0])
    compiled = torch.compile(compose, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, matrix, (1, 4)), expected[0])
    for kernel, part in zip(
        compiled(weight, torch.cat((matrix, matrix), 1), [(1, 4), (4, 1)]), ((1, 4), (4, 1)), strict=True
    ):
        torch.testing.assert_close(kernel, compose(weight, matrix, part))
    slots = table(3, 4, 2)
    coefficient = torch.randn(2, *slots.shape, generator=seeded(), dtype=torch.float64)
    mapped = torch.vmap(lambda each: placements(slots, 4, each))(coefficient)
    torch.testing.assert_close(mapped[1], placements(slots, 4, coefficient[1]))


WEIGHT, MATRIX = torch.zeros(6, 1, 3, 3), torch.zeros(2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros(3), MATRIX, (1, 3)), TypeError, "small kernels of real numbers as weight, got ndarray"),
        ((WEIGHT.long(), MATRIX, (1, 3)), TypeError, r"got torch\.int64"),
        ((WEIGHT[0], MATRIX, (1, 3)), ValueError, r"\[C \* S, 1, kh, kw\] or \[C, S, kh, kw\], got \[1, 3, 3\]"),
        ((WEIGHT, MATRIX, (1, 4)), ValueError, r"placement must be \[C, P, S\] with P = 4 slots, got \[2, 3, 3\]"),
        ((WEIGHT, MATRIX[:1], (1, 3)), ValueError, r"weight must be \[3, 1, kh, kw\] or \[1, 3, kh, kw\] for"),
        ((WEIGHT, None, (1, 4)), ValueError, "4 slots in order take 4 kernels a channel"),
    ],
    ids=str,
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        compose(*arguments)


def test_refusals_of_tables():
    slots = table(2, 3, 2)
    with pytest.raises(TypeError, match=r"slots of integers, got torch\.float32"):
        placements(slots.float(), 3)
    with pytest.raises(ValueError, match=r"must be \[C, S, R\], got \[2, 3\]"):
        placements(slots[..., 0], 3)
    with pytest.raises(ValueError, match=r"got \[2, 3, 2\] and \[2, 3\]"):
        placements(slots, 3, torch.ones(2, 3))
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=r"slots must be in \[-1, 3\), got some from"):
            placements(slots.masked_fill(slots == 1, wrong), 3)
    for empty in itertools.product((0, 2), (0, 2)):
        assert placements(torch.zeros(2, *empty, dtype=torch.int64), 3).shape == (2, 3, empty[0])
