"""What holds for every shift: its dense kernel, copies, state, compilation."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftconv import nn as snn

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
WINDOW = dict(crop=((1, -2), (0, 1)), stride=(2, 1))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def every() -> list[nn.Module]:
    """One of each kind, seven channels."""
    learned = dict(init_range=2.0, generator=seeded())
    return [
        snn.SparseShift1d(7, **learned), snn.SparseShift2d(7, **learned, **WINDOW), snn.SparseShift3d(7, **learned),
        snn.ActiveShift1d(7, **learned, stride=3), snn.ActiveShift2d(7, **learned, **WINDOW),
        snn.ActiveShift3d(7, **learned, normalize_gradient=True),
        snn.Shift1d([[2], [0], [-1], [5], [0], [1], [-3]]), snn.Shift2d([[2, -1]] * 7, **WINDOW),
        snn.Shift3d([[0, 1, 2]] * 7), snn.GroupShift2d(7, (2, 3), **WINDOW),
        snn.PartialShift2d(7, [[1, -2]] * 3), snn.PartialShift2d(7, []),
        snn.AxialShift2d(7), snn.SpatialShift2d(7, padding_mode="zeros"), snn.FourConnectedShift2d(7),
    ]  # fmt: skip


def image(shift: nn.Module) -> Tensor:
    return torch.randn((2, 7, *(9, 8, 6)[: shift.ndim]), generator=seeded())


@pytest.mark.parametrize("shift", every(), ids=lambda shift: type(shift).__name__)
def test_equivalent_kernel_is_the_shift(shift):
    kernel = shift.equivalent_kernel()
    assert kernel.shape[:2] == (7, 1) and all(k % 2 for k in kernel.shape[2:])
    crop = getattr(shift, "crop", None) or [(0, 0)] * shift.ndim
    pads = [k // 2 - cut for k, pair in zip(kernel.shape[2:], crop, strict=True) for cut in pair]
    pads = [pad for i in reversed(range(shift.ndim)) for pad in pads[2 * i : 2 * i + 2]]
    x = image(shift)
    expected = CONVS[shift.ndim](F.pad(x, pads), kernel, stride=getattr(shift, "stride", 1), groups=7)
    torch.testing.assert_close(shift(x), expected)


@pytest.mark.parametrize("make", [snn.ActiveShift1d, snn.ActiveShift2d, snn.ActiveShift3d])
def test_equivalent_kernel_of_an_active_shift_has_its_gradient(make):
    shift = make(7, 2.0, generator=seeded()).double()
    with torch.no_grad():
        shift.offset[0] = 0
        shift.offset[1] = 2  # the farthest, on a pixel
        shift.offset[2] = -2
    x = image(shift).double()
    kernel = shift.equivalent_kernel()
    y = CONVS[shift.ndim](x, kernel, padding=[k // 2 for k in kernel.shape[2:]], groups=7)
    weight = torch.randn(y.shape, generator=seeded(), dtype=y.dtype)
    (got,) = torch.autograd.grad((y * weight).sum(), shift.offset)
    (want,) = torch.autograd.grad((shift(x) * weight).sum(), shift.offset)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shift", every(), ids=lambda shift: type(shift).__name__)
def test_copies_and_state(shift):
    x = image(shift)
    y = shift(x.clone())
    file = io.BytesIO()
    torch.save(shift, file)
    file.seek(0)
    for again in (copy.deepcopy(shift), pickle.loads(pickle.dumps(shift)), torch.load(file, weights_only=False)):
        assert torch.equal(again(x.clone()), y) and repr(again) == repr(shift)
    again = copy.deepcopy(shift)
    for values in (*again.parameters(), *again.buffers()):
        values.data.zero_()
    missing = again.load_state_dict(shift.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    if shift.state_dict():
        assert torch.equal(again(x.clone()), y)


@pytest.mark.parametrize("shift", every(), ids=lambda shift: type(shift).__name__)
def test_memory_format_and_half_precision(shift):
    x = image(shift)
    if x.ndim > 3:
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        assert shift(x.to(memory_format=last)).is_contiguous(memory_format=last)
    half = shift(x.to(torch.bfloat16))  # with offsets in float32, as autocast and mixed precision have it
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), shift(x.to(torch.bfloat16).float()), atol=0.05, rtol=0.02)


def test_compiles_as_a_whole():
    model = nn.Sequential(
        snn.ActiveShift2d(8, 2.0, normalize_gradient=True, stride=2), nn.Conv2d(8, 8, 1), snn.SparseShift2d(8, 2.0),
        snn.emulate_depthwise(nn.Conv2d(8, 8, 3, 2, groups=8)), snn.PartialShift2d(8, [[1, 0]] * 3, inplace=True),
        snn.AxialShift2d(8), snn.TemporalShift(8, 2),
    )  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 13, 12, requires_grad=True)
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected)
    inputs = [x, *model.parameters()]
    grads, wanted = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected))
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
