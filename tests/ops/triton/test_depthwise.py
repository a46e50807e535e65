"""The Triton kernels of depthwise convolution against torch: interpreted, compiled, and on a GPU if there is one.

The oracle is torch's convolution in float64, and its autograd.
"""

import importlib
import itertools
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def module(name="depthwise"):
    return importlib.import_module(f"shiftconv.ops.triton.{name}")


def operators():
    """The functions of both files of kernels."""
    both = {**vars(module()), **vars(module("depthwise_weight"))}
    return SimpleNamespace(**{name: both[name] for name in both if name.startswith("depthwise_")})


def half(*sizes):
    """The padding that keeps the size of a map, and is a pixel larger before than after for even kernels."""
    return [number for kh, kw in sizes for number in (kh // 2, kh - 1 - kh // 2, kw // 2, kw - 1 - kw // 2)]


def random(*shape, dtype=torch.float32, last=False, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def branch(x, weight, padding):
    """One branch by torch; ``F.pad`` crops where padding is negative."""
    top, bottom, left, right = padding
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, groups=x.shape[1])


def close(y, expected, like):
    """Values of the oracle in the dtype and memory format of ``like``."""
    scale = float(expected.abs().max()) if expected.numel() else 1
    tolerance = TOLERANCE[y.dtype]
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=tolerance * scale)
    assert y.dtype == like.dtype
    last = not like.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class Problem(NamedTuple):
    """A map, kernels, a bias, and what the operators make of them."""

    x: torch.Tensor
    weight: list[torch.Tensor]
    bias: torch.Tensor
    padding: list[int]
    each: list[torch.Tensor]
    grads: list[torch.Tensor]  # to each of the branches
    to_x: torch.Tensor
    to_weight: list[torch.Tensor]

    @staticmethod
    def of(shape, sizes, padding, dtype=torch.float32, last=False):
        x, bias = random(*shape, dtype=dtype, last=last), random(shape[1], dtype=dtype)
        weight = [random(shape[1], 1, *size, dtype=dtype, seed=b) for b, size in enumerate(sizes)]
        wide = [t.double().requires_grad_() for t in (x, *weight)]
        pads = [padding[4 * b : 4 * b + 4] for b in range(len(sizes))]
        each = [branch(wide[0], w, p) for w, p in zip(wide[1:], pads, strict=True)]
        grads = [random(*y.shape, dtype=dtype, last=last, seed=9 + b) for b, y in enumerate(each)]
        sent = torch.autograd.grad(each, wide, [g.double() for g in grads])
        return Problem(x, weight, bias, padding, [y.detach() for y in each], grads, sent[0], [*sent[1:]])

    def check(self, device="cpu"):
        x, bias = self.x.to(device), self.bias.to(device)
        weight, grads = ([t.to(device) for t in some] for some in (self.weight, self.grads))
        ops = torch.ops.shiftconv if device == "cuda" else operators()
        results = ops.depthwise_each_direct(x, weight, self.padding, False)
        for y, expected in zip(results, self.each, strict=True):
            close(y, expected, self.x)
        if len({y.shape for y in self.each}) == 1:
            y = ops.depthwise_sum_direct([x], weight, bias, self.padding, False)
            close(y, sum(self.each) + self.bias.double().view(-1, 1, 1), self.x)
        close(ops.depthwise_sum_direct(grads, weight, None, self.padding, True), self.to_x, self.x)
        results = ops.depthwise_weight_direct([x], grads, self.padding)
        for result, expected in zip(results, self.to_weight, strict=True):
            close(result, expected, expected.to(x.dtype))


CROSS = [(13, 5), (5, 13), (5, 5)]
CASES = [
    ((2, 3, 7, 7), CROSS, half(*CROSS)),
    ((3, 2, 14, 14), [(19, 3), (3, 18), (3, 3)], half((19, 3), (3, 18), (3, 3))),
    ((1, 2, 20, 20), [(5, 13), (13, 5)], half((5, 13), (13, 5))),
    ((2, 2, 9, 6), [(4, 3)], [0, 0, 0, 0]),
    ((1, 1, 5, 4), [(2, 7), (1, 1)], [1, 3, 5, 2, 0, 2, 0, 2]),
    ((1, 2, 1, 1), [(13, 3)], half((13, 3))),
    ((2, 1, 11, 13), [(13, 4), (4, 15)], [3, 11, 2, 1, 0, 5, 6, 8]),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "sizes", "padding"), CASES, ids=str)
def test_equals_torch(shape, sizes, padding, dtype):
    for last in (False, True):
        Problem.of(shape, sizes, padding, dtype, last).check()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    for last in (False, True):
        Problem.of((2, 3, 6, 7), [(5, 3), (3, 6)], half((5, 3), (3, 6)), dtype, last).check()


@pytest.mark.interpreted
@pytest.mark.parametrize(("size", "kernel"), [((66, 18), (51, 2)), ((18, 66), (2, 51)), ((66, 67), (4, 13))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_several_tiles(size, kernel, dtype):
    """A band reaches over blocks of inputs where a map is larger than a tile."""
    Problem.of((1, 1, *size), [kernel], half(kernel), dtype).check()
    Problem.of((1, 1, *size), [kernel], [0, 1, 2, 3], dtype).check()


@pytest.mark.interpreted
def test_short_kernels_of_float32_go_tap_by_tap(monkeypatch):
    monkeypatch.delattr(module("_depthwise_band"), "convolve")
    monkeypatch.delattr(module("_depthwise_band"), "weigh")
    Problem.of((2, 40, 3, 4), [(3, 3), (5, 5)], half((3, 3), (5, 5)), last=True).check()
    Problem.of((2, 2, 25, 30), [(3, 5)], half((3, 5))).check()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_more_branches_than_a_launch_takes(dtype, last):
    sizes = [(3, 3), (1, 5), (13, 1), (5, 1), (1, 1)]
    problem = Problem.of((2, 2, 9, 10), sizes, half(*sizes), dtype, last)
    problem.check()
    # A map for each, and their sum.
    maps = [random(2, 2, 9, 10, dtype=dtype, last=last, seed=b) for b in range(5)]
    y = operators().depthwise_sum_direct(maps, problem.weight, problem.bias, problem.padding, False)
    pads = [problem.padding[4 * b : 4 * b + 4] for b in range(5)]
    parts = [branch(x.double(), w.double(), p) for x, w, p in zip(maps, problem.weight, pads, strict=True)]
    close(y, sum(parts) + problem.bias.double().view(-1, 1, 1), problem.x)
    results = operators().depthwise_weight_direct(maps[:2], problem.grads[:1], problem.padding[:4] * 2)
    for x, result in zip(maps, results, strict=False):
        weight = torch.zeros(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(branch(x.double(), weight, [1] * 4), weight, problem.grads[0].double())
        close(result, expected, expected.to(dtype))


@pytest.mark.interpreted
@pytest.mark.parametrize("padding", [[-2, 3, -1, 1], [2, -3, 9, -4], [-7, 12, 0, 0], [15, 0, 0, 15]], ids=str)
def test_padding_of_any_sign(padding):
    for kernel, dtype in itertools.product([(3, 3), (2, 13)], [torch.float32, torch.float16]):
        Problem.of((2, 2, 8, 20), [kernel], padding, dtype).check()


@pytest.mark.interpreted
def test_any_strides_long_indices_and_parts(monkeypatch):
    """Few programs, so that one walks over several images, few channels at a time, and 64-bit indices."""
    monkeypatch.setattr(module("_depthwise_work"), "INT32", 0)
    monkeypatch.setattr(module("_depthwise_plain"), "_ENOUGH_PROGRAMS", 8)
    monkeypatch.setattr(module("_depthwise_band"), "_ENOUGH_PROGRAMS", 24)
    monkeypatch.setattr(module("_depthwise_band"), "_STACK", 0)
    monkeypatch.setattr(module("_depthwise_band"), "_SUMS", 0)
    for dtype, shape, sizes in (
        (torch.float32, (5, 3, 5, 4), [(3, 2)]),
        (torch.float16, (3, 9, 5, 4), [(5, 2), (3, 5)]),
        (torch.float16, (5, 9, 9, 8), [(5, 2), (3, 5)]),
    ):
        problem = Problem.of(shape, sizes, half(*sizes), dtype)
        problem.check()
        wider = torch.empty(shape[0], 2 * shape[1], shape[2], shape[3] + 3, dtype=dtype)
        results = operators().depthwise_each_direct(
            wider[:, ::2, :, 1:-2].copy_(problem.x), problem.weight, problem.padding, False
        )
        for y, expected in zip(results, problem.each, strict=True):
            close(y, expected, problem.x)


@pytest.mark.interpreted
def test_nothing_to_do():
    x, weight, bias = torch.empty(0, 2, 5, 4), [random(2, 1, 3, 3)], random(2)
    assert operators().depthwise_sum_direct([x], weight, bias, [1, 1, 0, 0], False).shape == (0, 2, 5, 2)
    assert operators().depthwise_each_direct(x, weight, [1, 1, 0, 0], True)[0].shape == (0, 2, 5, 6)
    results = operators().depthwise_weight_direct([x], [torch.empty(0, 2, 5, 2)], [1, 1, 0, 0])
    assert torch.equal(results[0], torch.zeros(2, 1, 3, 3))
    beside = operators().depthwise_sum_direct(
        [random(1, 2, 3, 3)], weight, bias, [9, -6, 0, 0], False
    )  # sees zeros only
    assert torch.equal(beside, bias.view(1, 2, 1, 1).expand(1, 2, 4, 1))


class Launches:
    """Stands for a kernel and keeps what it would be launched with."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        return lambda *arguments, **flags: self.calls.append((arguments, flags))


@pytest.fixture
def compiled(machine_code, monkeypatch):
    """``(capability, operator, *arguments) -> {kernel: machine code}`` of the first launch of every kernel."""

    def run(capability, operator, *arguments):
        band, plain = module("_depthwise_band"), module("_depthwise_plain")
        with monkeypatch.context() as patch:
            patch.setattr(band, "capability", lambda x: divmod(capability, 10))
            recorders = {
                name: Launches(getattr(owner, name))
                for owner in (band, plain)
                for name in vars(owner)
                if name.endswith("_kernel")
            }
            for name, recorder in recorders.items():
                patch.setattr(band if name in vars(band) else plain, name, recorder)
            getattr(operators(), operator)(*arguments)
        return {
            name: machine_code(recorder.kernel, *recorder.calls[0], capability)
            for name, recorder in recorders.items()
            if recorder.calls
        }

    return run


STAGES = [(124, 56, 51), (249, 28, 49), (499, 14, 47), (998, 7, 13)]  # channels, pixels and taps of SLaK-T
PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
every_gpu = pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))]
)


def blank(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.compiled
@every_gpu
@pytest.mark.parametrize(("channels", "pixels", "taps"), STAGES, ids=str)
def test_compiles_to_tensor_cores(channels, pixels, taps, capability, compiled):
    """For GPUs that need not be there: no spills, and vectors as wide as the alignment of rows allows.

    Tall kernels move along the rows, to where no vector is aligned, so their map is read number by number.
    """
    sizes = [(taps, 5), (5, taps), (5, 5)]
    x, weight = blank(64, channels, pixels, pixels), [blank(channels, 1, *size) for size in sizes]
    codes = [
        compiled(capability, "depthwise_sum_direct", [x] * 3, weight, blank(channels), half(*sizes), True),
        compiled(capability, "depthwise_each_direct", x, weight, half(*sizes), False),
        compiled(capability, "depthwise_sum_direct", [x], weight[1:2], None, half(sizes[1]), False),
    ]
    for code in codes:
        assert code["band_kernel"].spills == code["stack_kernel"].spills == 0
        assert code["band_kernel"].count(PRODUCTS[capability]) > 0
    vector = {56: "128", 28: "64"}.get(pixels)
    if vector:
        assert codes[2]["band_kernel"].count(rf"LDGSTS\.{vector}") > 0
        assert codes[2]["band_kernel"].count(r"LDG(\.U16)?") == 0
        for code in codes:
            assert code["band_kernel"].count(rf"STG\.{vector}") > 0
            assert code["band_kernel"].count(r"STG(\.U16)?") == 0


@pytest.mark.compiled
@every_gpu
@pytest.mark.parametrize(("channels", "pixels", "taps"), STAGES, ids=str)
def test_weight_gradient_compiles_to_tensor_cores(channels, pixels, taps, capability, compiled):
    x = blank(64, channels, pixels, pixels)
    for size in ((taps, 5), (5, taps)):
        codes = compiled(capability, "depthwise_weight_direct", [x], [x], half(size))
        assert codes["band_weight_kernel"].spills == codes["diagonals_kernel"].spills == 0
        assert codes["band_weight_kernel"].count(PRODUCTS[capability]) > 0
        if pixels == 56:
            assert codes["band_weight_kernel"].count(r"(LDGSTS|LDG)\.128") > 0


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("shape", "size", "dtype"),
    [
        ((64, 124, 56, 56), (51, 51), torch.bfloat16),
        ((64, 96, 56, 56), (7, 7), torch.float16),
        ((1, 96, 200, 136), (5, 51), torch.bfloat16),
        ((64, 124, 56, 56), (5, 51), torch.float32),
        ((64, 124, 56, 56), (51, 5), torch.float32),
        ((64, 499, 14, 14), (47, 5), torch.float32),
        ((64, 998, 7, 7), (13, 13), torch.float32),
        ((64, 96, 56, 56), (5, 5), torch.float32),
        ((64, 96, 56, 56), (5, 5), torch.float64),
    ],
    ids=str,
)
def test_compiles_without_spills(shape, size, dtype, capability, compiled):
    if capability == 80 and dtype is torch.float32 and pytest.importorskip("triton").__version__.startswith("3.8."):
        pytest.skip("Triton 3.8 spills registers on sm_80 where 3.6 and 3.9 do not")
    x, weight = blank(*shape, dtype=dtype), blank(shape[1], 1, *size, dtype=dtype)
    codes = compiled(capability, "depthwise_sum_direct", [x], [weight], None, half(size), False)
    codes |= compiled(capability, "depthwise_weight_direct", [x], [x], half(size))
    assert all(code.spills == 0 for code in codes.values())
    if max(size) > 5:
        assert codes["band_kernel"].count(PRODUCTS[capability]) > 0


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("shape", "size", "dtype"),
    [
        ((1, 1, 1, 1), (1, 1), torch.float32),
        ((1, 1, 1, 9), (1, 5), torch.float16),
        ((2, 1, 16, 8), (13, 1), torch.float16),
        ((1, 3, 100, 1), (51, 1), torch.float32),
    ],
    ids=str,
)
def test_sizes_of_one_compile(shape, size, dtype, compiled):
    """Triton replaces an argument of 1 by a constant."""
    x, weight = blank(*shape, dtype=dtype), blank(shape[1], 1, *size, dtype=dtype)
    codes = compiled(90, "depthwise_sum_direct", [x], [weight], None, half(size), False)
    codes |= compiled(90, "depthwise_weight_direct", [x], [x], half(size))
    assert all(code.spills == 0 for code in codes.values())


@pytest.mark.compiled
def test_tap_by_tap_in_channels_last(compiled):
    """A warp's threads lie along the channels."""
    x = blank(64, 96, 28, 28, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    code = compiled(90, "depthwise_sum_direct", [x], [blank(96, 1, 3, 3, dtype=torch.float32)], None, [1] * 4, False)
    assert code["plain_kernel"].spills == 0
    assert code["plain_kernel"].orders == {"[1, 0]"}


@pytest.mark.compiled
def test_float32_is_multiplied_in_full_unless_tf32_was_asked_for():
    precision_of = module().precision_of
    assert precision_of(torch.float32, 51) == "tf32x3"
    assert precision_of(torch.float32, 3) is precision_of(torch.float64, 51) is None
    kept = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert precision_of(torch.float32, 51) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept


@pytest.mark.on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "sizes", "padding"),
    [
        *CASES,
        ((5, 20, 56, 56), [(51, 5), (5, 51), (5, 5)], half((51, 5), (5, 51), (5, 5))),
        ((9, 20, 28, 28), [(49, 3), (3, 49), (3, 3)], half((49, 3), (3, 49), (3, 3))),
        ((40, 9, 14, 14), [(47, 5), (5, 47), (5, 5)], half((47, 5), (5, 47), (5, 5))),
        ((70, 9, 7, 7), [(13, 13)], half((13, 13))),
        ((1, 4, 200, 136), [(51, 51)], half((51, 51))),
    ],
    ids=str,
)
def test_cuda_equals_torch(shape, sizes, padding, dtype):
    for last in (False, True):
        Problem.of(shape, sizes, padding, dtype, last).check("cuda")


@pytest.mark.on_gpu
def test_cuda_is_deterministic():
    x, grad = (random(40, 30, 28, 28, dtype=torch.bfloat16, seed=b).cuda() for b in range(2))
    results = [torch.ops.shiftconv.depthwise_weight_direct([x], [grad], half((3, 49)))[0] for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
