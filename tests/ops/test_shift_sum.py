"""shift_sum against the original operators (goldens), and against slices of NumPy arrays."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shiftconv.ops.compose import slot_offset
from shiftconv.ops.shift_sum import shift_sum

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "shift_sum.json").read_text())
FAR = 10**6


def golden(case: dict) -> dict[str, Tensor]:
    with np.load(GOLDEN / "shift_sum.npz") as arrays:
        keys = [key for key in arrays.files if key.startswith(f"{case['name']}/")]
        return {key.split("/")[1]: torch.from_numpy(arrays[key]) for key in keys}


def original(case: dict, data: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The outputs of an original operator: its pads count from the padded map, ours from the output."""
    size, channels = case["small_kernel_size"], case["channels"]
    edge = size - 1 - size // 2
    crop = ((edge, edge), (edge, edge))
    if case["op"] == "v0":
        long = (data["pads"].long() + edge).repeat(channels)
        moves = (torch.zeros_like(long), long) if case["horizontal"] else (long, torch.zeros_like(long))
        picked = x.index_select(1, data["idxes"].long())
        return [shift_sum(picked, torch.stack(moves, 1), channels, crop=crop)]
    pads, picks = data["pad_hv"].T.long() + edge, data["idx_identit"].long()
    ways = len(pads) // 2
    stay = torch.zeros_like(pads[:ways])
    tables = [data.get(f"w{i}") for i in (1, 2, 3)]
    weights = [w.view(-1, ways).T if w is not None else None for w in tables]
    if case["op"] == "vmp_blur":  # cell v of a square lies at (v // s - s // 2, v % s - s // 2), -1 nowhere
        down, right = picks.T.div(size, rounding_mode="floor") - size // 2, picks.T % size - size // 2
        third = torch.stack((down, right), 2) * size
        third[picks.T < 0] = FAR
    else:
        third = torch.full((ways, x.shape[1], 2), FAR)
        third[torch.arange(ways)[:, None], picks.T] = 0
        if weights[2] is not None:
            weights[2] = weights[2].repeat_interleave(x.shape[1] // channels, 1)
    offsets = [torch.stack((stay, pads[:ways]), 2), torch.stack((pads[ways:], stay), 2), third]
    place = "constant" if case["op"] == "vmp_em" else "coefficient"
    rest = [{place: weight, "crop": crop} for weight in weights]
    return [shift_sum(x, offset, channels, **kw) for offset, kw in zip(offsets, rest, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_the_original_operators(case):
    data = golden(case)
    names = [name for name in ("x", "w1", "w2", "w3") if name in data]
    leaves = {name: data[name].double().requires_grad_() for name in names}
    outputs = original(case, data | leaves, leaves["x"])
    keys = [""] if case["op"] == "v0" else ["0", "1", "2"]
    for key, y in zip(keys, outputs, strict=True):
        torch.testing.assert_close(y, data[f"out{key}"].double(), rtol=1e-5, atol=1e-4)
    learned = [name for name in names if f"grad_{name}" in data]
    grads = torch.autograd.grad(
        outputs, [leaves[name] for name in learned], [data[f"grad_out{key}"].double() for key in keys]
    )
    for name, grad in zip(learned, grads, strict=True):
        torch.testing.assert_close(grad, data[f"grad_{name}"].double(), rtol=1e-4, atol=1e-3)


def oracle(x, offset, groups, coefficient=None, constant=None, crop=None):
    """Every shifted map is a slice of one that NumPy padded; what a pad holds is not a pixel and gets no constant."""
    crop = crop or [(0, 0)] * (x.ndim - 2)
    ways, channels = offset.shape[:2]
    reach = int(np.abs(offset).max(initial=0)) + 20
    shape = [n - low - high for n, (low, high) in zip(x.shape[2:], crop, strict=True)]
    y = np.zeros((x.shape[0], groups, *shape))
    for r, c in itertools.product(range(ways), range(channels)):
        plane = x[:, c] * (1 if coefficient is None else coefficient[r, c]) + (
            0 if constant is None else constant[r, c]
        )
        padded = np.pad(plane, [(0, 0)] + [(reach, reach)] * (x.ndim - 2))
        starts = [reach + low - move for (low, _), move in zip(crop, offset[r, c], strict=True)]
        window = tuple(slice(start, start + n) for start, n in zip(starts, shape, strict=True))
        y[:, c // (channels // groups)] += padded[(slice(None), *window)]
    return y


def problem(shape=(2, 6, 7, 5), groups=2, ways=3, reach=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    offset = torch.randint(-reach, reach + 1, (ways, shape[1], len(shape) - 2), generator=generator)
    coefficient, constant = torch.randn(2, ways, shape[1], generator=generator, dtype=torch.float64)
    return x, offset, groups, coefficient, constant


CROPS = {3: ((1, 2),), 4: ((2, 1), (-1, 0)), 5: ((0, 1), (1, 0), (-2, -1))}


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 6, 7, 5), (1, 4, 3, 4, 5), (2, 2, 1, 1), (0, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("cropped", [False, True])
def test_equals_slices(shape, cropped):
    x, offset, groups, coefficient, constant = problem(shape)
    crop = CROPS[x.ndim] if cropped and min(shape[2:]) > 1 else None
    for tables in ((None, None), (coefficient, None), (None, constant), (coefficient, constant)):
        given = [None if table is None else table.numpy() for table in tables]
        expected = oracle(x.numpy(), offset.numpy(), groups, *given, crop)
        y = shift_sum(x, offset, groups, *tables, crop)
        torch.testing.assert_close(y, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shift_sum(x, offset[0], groups), shift_sum(x, offset[:1], groups))


def test_far_offsets_and_no_offsets_add_nothing():
    x, offset, groups, *_ = problem()
    for far in (FAR, -FAR, torch.iinfo(torch.int64).max):
        assert shift_sum(x, torch.full_like(offset, far), groups).eq(0).all()
    assert torch.equal(shift_sum(x, offset[:0], groups, crop=((1, 0), (0, 1))), torch.zeros(2, 2, 6, 4).double())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.complex128], ids=str
)
def test_keeps_dtype_and_format(dtype):
    """16-bit types are summed in float32 and rounded once."""
    x, offset, groups, *_ = problem((2, 40, 7, 5), ways=4)
    x = (x * 50).to(dtype)
    expected = shift_sum(x.to(torch.complex128 if x.is_complex() else torch.float64), offset, groups)
    for format_ in (torch.contiguous_format, torch.channels_last):
        y = shift_sum(x.contiguous(memory_format=format_), offset, groups)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=format_)
        if dtype.is_floating_point:
            torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-3)
        else:
            assert torch.equal(y, expected.to(dtype))


def test_gradients():
    x, offset, groups, coefficient, constant = problem((1, 4, 3, 4), ways=2, reach=3)
    leaves = [leaf.requires_grad_() for leaf in (x, coefficient, constant)]

    def run(x, coefficient, constant):
        return shift_sum(x, offset, groups, coefficient, constant, ((1, 0), (0, -1)))

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_transforms_and_compilation():
    x, offset, groups, coefficient, _ = problem(ways=2)
    xs = torch.stack((x, x.flip(0)))
    expected = torch.stack([shift_sum(each, offset, groups, coefficient) for each in xs])
    mapped = torch.vmap(lambda each: shift_sum(each, offset, groups, coefficient))(xs)
    torch.testing.assert_close(mapped, expected)

    def loss(coefficient, each):
        return shift_sum(each, offset, groups, coefficient).square().sum()

    grads = torch.vmap(torch.func.grad(loss), (None, 0))(coefficient, xs)
    leaf = coefficient.clone().requires_grad_()
    for each, grad in zip(xs, grads, strict=True):
        torch.testing.assert_close(grad, torch.autograd.grad(loss(leaf, each), leaf)[0])
    compiled = torch.compile(shift_sum, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, offset, groups, coefficient), expected[0])


def test_slot_offset_is_the_tap_of_the_slot():
    """In a kernel of 13 taps of slots of 3, centred on tap 6, the middle of slot 0 is tap 1: it reads 5 to the left."""
    assert slot_offset(torch.tensor([0, 1, 4]), 13, 3).tolist() == [5, 2, -7]
    assert slot_offset(torch.tensor([0, 1]), 8, 4).tolist() == [2, -2]
    assert slot_offset(torch.tensor([-1]), 13, 3).item() > FAR


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=np.zeros(3)), TypeError, "two tensors, x .* got ndarray and Tensor"),
        (dict(groups=2.0), TypeError, r"groups must be a whole number, got 2\.0"),
        (dict(groups=4), ValueError, "groups must divide the 6 channels of x, got 4"),
        (dict(groups=0), ValueError, "groups must divide"),
        (dict(x=torch.zeros(2, 6)), ValueError, r"one to three spatial axes, got \[2, 6\]"),
        (dict(offset=torch.zeros(3, 6, 1).long()), ValueError, r"offset must be \[R, 6, 2\] for x"),
        (dict(offset=torch.zeros(3, 6, 2)), TypeError, r"integer offsets, got torch\.float32"),
        (dict(coefficient=torch.zeros(6)), ValueError, r"coefficient must be \[R, C\] = \[3, 6\] on cpu, got \[6\]"),
        (dict(constant=1.0), TypeError, "constant must be a tensor"),
        (dict(crop=((9, 9), (0, 0))), ValueError, "leaves -11 of 7 pixels"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    x, offset, groups, *_ = problem()
    with pytest.raises(error, match=message):
        shift_sum(**dict(x=x, offset=offset, groups=groups) | change)
