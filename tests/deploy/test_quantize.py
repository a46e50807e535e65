"""Eight bits by torchao: shifts share the numbers of what they move, and fill with the zero point."""

import pytest
import torch
from torch import nn

from shiftconv import nn as snn
from shiftconv import ops
from shiftconv.deploy import export
from shiftconv.deploy.quantize import quantize_program, shift_integers, shift_quantizer

QUANTIZE = torch.ops.quantized_decomposed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec:FutureWarning",  # torch 2.11 says all this to itself
        "ignore:The given buffer is not writable:UserWarning",
        "ignore:.*torch.jit.script:DeprecationWarning",
    ),
]


def images(count, seed=0):
    return torch.randn(count, 3, 14, 12, generator=torch.Generator().manual_seed(seed))


def batches():
    return [(images(8, seed),) for seed in range(1, 4)]


def network(shift):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 20, 3), shift, nn.Conv2d(20, 4, 1)).eval()


def converted(model):
    """What torchao makes of it, before it is lowered."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizer = pytest.importorskip("torchao.quantization.pt2e.quantizer")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    base = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        program = torch.export.export(model, (images(2),), strict=True)
    prepared = pt2e.prepare_pt2e(
        program.module(check_guards=False), quantizer.ComposableQuantizer([base, shift_quantizer()])
    )
    for batch in batches():
        prepared(*batch)
    return pt2e.convert_pt2e(prepared)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("kind", [snn.GroupShift2d, snn.SparseShift2d])
def test_shift_moves_what_is_quantised(kind, padding_mode):
    """Equal numbers before and after, so that to move the integers is to move the floats, bit for bit."""
    model = network(kind(20, padding_mode=padding_mode))
    module = converted(model)
    (shift,) = [node for node in module.graph.nodes if node.target is torch.ops.shiftconv.shift.default]
    before, (after,) = shift.args[0], shift.users
    assert before.target is QUANTIZE.dequantize_per_tensor.default
    assert after.target is QUANTIZE.quantize_per_tensor.default
    assert before.args[1:] == after.args[1:]
    assert 50 < before.args[2] < 200  # a zero point that could be mistaken for no other number
    floats = module(images(2))
    shift_integers(module).recompile()
    (shift,) = [node for node in module.graph.nodes if node.target is torch.ops.shiftconv.shift.default]
    assert shift.meta["val"].dtype is torch.uint8
    assert torch.equal(module(images(2)), floats)
    with torch.no_grad():
        expected = model(images(2))
    assert (floats - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("scale", [0.1, 0.2])
def test_numbers_that_differ_are_not_moved(scale):
    pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    like = (30, 0, 255, torch.uint8)

    class Model(nn.Module):
        def forward(self, x, offset):
            x = QUANTIZE.dequantize_per_tensor(x, 0.1, *like)
            return QUANTIZE.quantize_per_tensor(ops.shift(x, offset), scale, *like)

    x, offset = torch.randint(0, 256, (2, 4, 9), dtype=torch.uint8), torch.randint(-3, 4, (4, 1))
    module = torch.export.export(Model(), (x, offset)).module()
    shift_integers(module).recompile()
    (shift,) = [node for node in module.graph.nodes if node.target is torch.ops.shiftconv.shift.default]
    assert shift.meta["val"].dtype is (torch.uint8 if scale == 0.1 else torch.float32)
    assert torch.equal(module(x, offset), Model()(x, offset))


def test_zeros_are_the_zero_point():
    """Maps whose zero point lies far inside: the border that a shift fills is 0.0 exactly."""
    pytest.importorskip("torchao")
    shift = snn.Shift2d(torch.tensor([[3, -2]]).repeat(20, 1))
    model = nn.Sequential(nn.Conv2d(3, 20, 1), shift, nn.Conv2d(20, 20, 1, bias=False)).eval()
    y = quantize_program(model, (images(2),), batches()).module()(images(2))
    assert (y[:, :, :3] == 0).all()
    assert (y[..., -2:] == 0).all()
    assert (y[:, :, 3:, :-2] != 0).float().mean() > 0.9


def test_what_interpolates_stays_in_floats():
    pytest.importorskip("torchao")
    model = network(snn.ActiveShift2d(20))
    program = quantize_program(model, (images(2),), batches())
    assert not any("shiftconv" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        expected = model(images(2))
    assert (program.module()(images(2)) - expected).norm() < 0.05 * expected.norm()


def test_file(tmp_path):
    pytest.importorskip("torchao")
    result = export(network(snn.GroupShift2d(20)), tmp_path / "net.pt2", images(1), int8=[x for (x,) in batches()])
    assert 0 < result.error < 0.05


def test_nothing_to_quantise(tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="torchao found nothing to quantise"):
        export(snn.GroupShift2d(3), tmp_path / "net.pt2", images(2), int8=[images(2)])
