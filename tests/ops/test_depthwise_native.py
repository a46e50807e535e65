"""The C++ kernels of the depthwise convolution against a sum over taps in float64, where they change their ways."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from .cases import native_or_skip

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
CROSS = ((51, 5), (5, 51), (5, 5))

# Maps as the kernels tell them apart: strips of 16 columns, tiles of up to 16 rows in several sizes, blocks of 16
# channels in channels_last; small ones whose lanes are channels.
SHAPES = [
    (2, 3, 56, 56),
    (1, 18, 29, 33),
    (2, 5, 7, 40),
    (1, 2, 40, 17),
    (3, 17, 14, 14),
    (2, 20, 7, 7),
    (1, 2, 1, 35),
    (1, 1, 35, 1),
    (5, 1, 1, 1),
]


@pytest.fixture(autouse=True, scope="module")
def _native():
    native_or_skip("depthwise")


def run_sum(x, weight, bias, padding, transpose=False):
    return torch.ops.shiftconv.depthwise_sum_direct.default(x, weight, bias, [*padding], transpose)


def run_each(x, weight, padding, transpose=False):
    return torch.ops.shiftconv.depthwise_each_direct.default(x, weight, [*padding], transpose)


def same(sizes):
    """Padding that keeps the size of the map, uneven where the kernel is even."""
    return [p for kh, kw in sizes for p in (kh // 2, kh - 1 - kh // 2, kw // 2, kw - 1 - kw // 2)]


def sample(shape, sizes, dtype=torch.float32, layout=torch.contiguous_format, maps=1):
    """Maps, kernels, bias."""
    generator = torch.Generator().manual_seed(len(sizes))

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    x = [random(*shape).contiguous(memory_format=layout) for _ in range(maps)]
    return x, [random(shape[1], 1, *size) for size in sizes], random(shape[1])


def one(x, weight, padding, transpose):
    """One branch in float64: each tap moves the map, ``F.pad`` with negative numbers cuts. No convolution is called."""
    top, bottom, left, right = padding
    kh, kw = weight.shape[2:]
    if transpose:
        weight = weight.flip(2, 3)
        top, bottom, left, right = kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right
    height, width = x.shape[2] + top + bottom - kh + 1, x.shape[3] + left + right - kw + 1
    y = x.new_zeros((*x.shape[:2], height, width), dtype=torch.float64)
    for u, v in itertools.product(range(kh), range(kw)):
        dy, dx = u - top, v - left
        i, j = slice(max(0, -dy), min(height, x.shape[2] - dy)), slice(max(0, -dx), min(width, x.shape[3] - dx))
        if i.start < i.stop and j.start < j.stop:
            source = x[:, :, i.start + dy : i.stop + dy, j.start + dx : j.stop + dx].double()
            y[:, :, i, j] += source * weight[:, 0, u, v].double()[:, None, None]
    return y


def branches(x, weight, padding, transpose=False):
    """Every branch in float64, and how large its terms are."""
    pads = [padding[i : i + 4] for i in range(0, len(padding), 4)]
    each = [one(x[b % len(x)], w, pads[b], transpose) for b, w in enumerate(weight)]
    sizes = [one(x[b % len(x)].abs(), w.abs(), pads[b], transpose) for b, w in enumerate(weight)]
    return each, sizes


def assert_close(y, truth, size, layout):
    assert y.shape == truth.shape
    assert y.is_contiguous(memory_format=layout)
    assert ((y.double() - truth).abs() <= TOLERANCE[y.dtype] * (size + 1e-3)).all()


def check(x, weight, bias, padding, transpose=False):
    """Both operators on the same call."""
    layout = LAYOUTS[0] if x[0].is_contiguous() else LAYOUTS[1]
    each, sizes = branches(x, weight, padding, transpose)
    y = run_sum(x, weight, bias, padding, transpose)
    offset = 0 if bias is None else bias.double()[:, None, None]
    assert_close(y, sum(each) + offset, sum(sizes) + abs(offset), layout)
    for b, (truth, size) in enumerate(zip(*branches(x[:1], weight, padding, transpose), strict=True)):
        assert_close(run_each(x[0], weight, padding, transpose)[b], truth, size, layout)


@every_dtype
@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crosses_on_maps_of_all_sizes(shape, layout, dtype):
    check(*sample(shape, CROSS, dtype, layout), same(CROSS))


@every_dtype
@pytest.mark.parametrize(
    "size", [(1, 1), (2, 2), (4, 3), (1, 7), (9, 2), (13, 13), (63, 64), (3, 80), (80, 3)], ids=str
)
def test_kernels_of_all_sizes(size, dtype):
    for shape, layout in itertools.product([(1, 3, 21, 37), (2, 2, 9, 9)], LAYOUTS):
        check(*sample(shape, [size], dtype, layout), same([size]))


@every_dtype
@pytest.mark.parametrize("height", [*range(17, 36), 61])
def test_rows_fill_tiles_or_not(height, dtype):
    check(*sample((1, 2, height, 18), [(7, 3)], dtype), same([(7, 3)]))


@every_dtype
@every_layout
@pytest.mark.parametrize("transpose", [False, True])
def test_padding_of_any_kind(transpose, layout, dtype):
    sizes = [(5, 3), (3, 5), (5, 3)]
    shape = (2, 3, 24, 22)
    x, weight, bias = sample(shape, sizes, dtype, layout)
    for pads in ([0] * 4, [9, 0, 0, 7], [0, 4, 11, 0], [13, 1, 2, 12] if transpose else [40, 1, 2, 30]):
        check(x, weight[:1], bias, pads, transpose)
        check(x, weight, None, [*pads, pads[0], pads[1] - 2, pads[2] + 1, pads[3] + 1, *pads], transpose)


def test_transposes_may_cut():
    """Padding beyond kernel - 1 becomes negative in the transpose."""
    x, weight, bias = sample((2, 3, 30, 26), [(3, 3)])
    check(x, weight, bias, [5, 4, 6, 3], True)
    x, weight, bias = sample((2, 3, 90, 70), [(3, 3), (1, 5)])
    check(x, weight, bias, [30, 20, 8, 26, 29, 19, 9, 27], True)


@every_dtype
@every_layout
def test_every_branch_may_have_its_own_map(layout, dtype):
    for shape in ((2, 18, 20, 24), (2, 5, 9, 6)):
        x, weight, bias = sample(shape, CROSS, dtype, layout, maps=3)
        x[1] = x[1].contiguous()  # another layout than the first has
        check(x, weight, bias, same(CROSS))
        check(x, weight, bias, same(CROSS), True)


def test_branches_with_results_of_different_sizes():
    x, weight, _ = sample((2, 3, 20, 21), [(5, 5), (3, 3), (5, 5)])
    pads = [2, 2, 2, 2, 0, 0, 0, 0, 2, 2, 2, 2]
    came = run_each(x[0], weight, pads)
    for b, (y, w) in enumerate(zip(came, weight, strict=True)):
        truth = one(x[0], w, pads[4 * b : 4 * b + 4], False)
        assert_close(y, truth, truth.abs() + 10, LAYOUTS[0])
    with pytest.raises(RuntimeError, match="one size"):
        run_sum(x, weight, None, pads)


@every_dtype
def test_strides_of_every_kind(dtype):
    (wide,), weight, bias = sample((4, 3, 40, 44), CROSS, dtype)
    strided = [
        wide[::2, :, ::2, 4:],
        wide.transpose(2, 3),
        wide[:, :1].expand(4, 3, 40, 44),
        wide.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, :, 1:, :-3],
    ]
    spread = [torch.stack([w, w], -1)[..., 0] for w in weight]
    for x in strided:
        each, sizes = branches([x], weight, same(CROSS))
        y = run_sum([x], spread, torch.stack([bias, bias], 1)[:, 0], same(CROSS))
        layout = LAYOUTS[x.stride(1) == 1]
        assert_close(y, sum(each) + bias.double()[:, None, None], sum(sizes), layout)


@every_layout
def test_nothing_to_do(layout):
    for shape in ((0, 3, 20, 20), (2, 0, 20, 20), (0, 3, 5, 5)):
        x, weight, bias = sample(shape, CROSS, layout=layout)
        assert run_sum(x, weight, bias, same(CROSS)).shape == shape
        assert [y.shape for y in run_each(x[0], weight, same(CROSS))] == [shape] * 3
    x, weight, bias = sample((2, 3, 20, 0), [(3, 3)], layout=layout)
    assert torch.equal(run_sum(x, weight, bias, [1, 1, 2, 1]), bias[:, None, None].expand(2, 3, 20, 1))
    x, weight, bias = sample((2, 3, 20, 4), [(3, 5)], layout=layout)
    assert run_sum(x, weight, bias, [1, 1, 0, 0]).shape == (2, 3, 20, 0)


@every_dtype
@every_layout
@pytest.mark.parametrize("shape", [(2, 18, 30, 34), (3, 17, 14, 14)], ids=str)
def test_dead_taps(shape, layout, dtype):
    """Rows, columns, segments, single taps, whole kernels and whole channels of zeros, of either sign."""
    x, weight, bias = sample(shape, CROSS, dtype, layout)
    generator = torch.Generator().manual_seed(0)
    for w in weight:
        w[0], w[1, :, ::2], w[2, :, :, 1::3] = 0, 0, -0.0
        w[3] *= torch.rand(w[3].shape, generator=generator) < 0.5
        w[4, :, : w.shape[2] // 2] = 0
        for start in range(0, max(w.shape[2:]), 10):
            (w[5] if w.shape[2] > w.shape[3] else w[5].transpose(1, 2))[:, start : start + 5] = 0
    weight[1][6] = 0
    check(x, weight, bias, same(CROSS))


@every_dtype
@every_layout
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_near(value, layout, dtype):
    """Memory beyond a map, a row or a channel may be loaded, but never counts."""
    for shape in ((2, 18, 20, 33), (2, 18, 9, 9)):
        x, weight, bias = sample(shape, [(5, 5)], dtype, layout)
        x[0][1, ::3, 4, 8] = x[0][0, ::7, 0, 0] = x[0][0, 17, 8, 8] = value
        lost = ~run_sum(x, weight, bias, [2] * 4).isfinite()
        reached = F.max_pool2d((~x[0].isfinite()).float(), 5, 1, 2) > 0
        # Taps of bfloat16 go in pairs, so that the column beside an odd kernel may be reached by a weight of zero.
        near = F.max_pool2d(reached.float(), (1, 3), 1, (0, 1)) > 0 if dtype is torch.bfloat16 else reached
        assert (reached <= lost).all()
        assert (lost <= near).all()


@every_dtype
@every_layout
@pytest.mark.parametrize("shape", [(3, 50, 33, 31), (2, 3, 300, 200), (5, 70, 10, 12)], ids=str)
def test_threads_do_not_change_a_bit(shape, layout, dtype):
    x, weight, bias = sample(shape, CROSS, dtype, layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([run_sum(x, weight, bias, same(CROSS)), *run_each(x[0], weight, same(CROSS))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_large_planes_pass_in_bands(layout):
    for shape, size in (((1, 1, 700, 600), (9, 9)), ((1, 2, 40, 9000), (51, 3)), ((1, 17, 150, 130), (5, 31))):
        check(*sample(shape, [size], torch.float32, layout), same([size]))


def test_what_does_not_fit_is_refused():
    x, weight, bias = sample((1, 3, 8, 8), [(3, 3)])
    for call, says in (
        (lambda: run_sum(x, weight, bias[:2], [1] * 4), "expected bias"),
        (lambda: run_sum(x, weight, None, [1] * 3), "4 numbers of padding"),
        (lambda: run_sum(x, [weight[0].double()], None, [1] * 4), "expected kernels"),
        (lambda: run_sum(x, [weight[0][:2]], None, [1] * 4), "expected kernels"),
        (lambda: run_sum([*x, *x], weight, None, [1] * 4), "expected 1 or 1 maps"),
        (lambda: run_sum([x[0], x[0][:, :, 1:]], [*weight, *weight], None, [1] * 8), "one size and dtype"),
        (lambda: run_each(x[0], [weight[0].new_zeros(3, 1, 11, 1)], [0] * 4), "no larger than the padded map"),
    ):
        with pytest.raises(RuntimeError, match=says):
            call()
