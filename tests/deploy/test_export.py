"""Files that run without this package: what they compute, how they are refused, and that they need nothing of ours."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from shiftconv import nn as snn
from shiftconv.deploy import export
from shiftconv.ops import native

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",  # torch 2.11 says all this to itself
    "ignore:The given buffer is not writable:UserWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",
)


class Net(nn.Module):
    """Convolution, shift, convolution."""

    def __init__(self, *shifts):
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3)
        self.norm = nn.BatchNorm2d(20)
        self.shifts = nn.Sequential(*shifts)
        self.head = nn.Conv2d(20, 4, 1)

    def forward(self, x):
        return self.head(self.shifts(self.norm(self.stem(x)).relu()))


def net():
    torch.manual_seed(0)
    return Net(snn.GroupShift2d(20), snn.SparseShift2d(20, 3.0, "reflect"), snn.ActiveShift2d(20, 2.0, stride=2))


def images(count, seed=0):
    return torch.randn(count, 3, 14, 12, generator=torch.Generator().manual_seed(seed))


def runtime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def answers(path, x):
    """What onnxruntime makes of ``x``."""
    session = runtime().InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_onnx(tmp_path):
    """From one image, for any number; with nothing but standard operators; the model is left as it was."""
    runtime()
    model, path = net().train(), tmp_path / "net.onnx"
    result = export(model, path, images(1))
    assert model.training
    assert result.path == path
    assert result.size == path.stat().st_size < 60_000
    assert result.error < 1e-5
    onnx = pytest.importorskip("onnx")
    assert {domain.domain for domain in onnx.load(path).opset_import} == {""}
    with torch.no_grad():
        torch.testing.assert_close(answers(path, images(7)), model.eval()(images(7)), rtol=1e-4, atol=1e-5)


def test_pt2(tmp_path):
    model, path = net(), tmp_path / "net.pt2"
    assert export(model, path, (images(3),)).error < 1e-5
    program = torch.export.load(path)
    assert not any("shiftconv" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(5)), model.eval()(images(5)))


def test_a_batch_that_stays(tmp_path):
    """A clip is four images of a batch, so the batch cannot have any size."""
    model = nn.Sequential(snn.TemporalShift(3, frames=4, divisor=3))
    assert export(model, tmp_path / "net.pt2", images(8), dynamic_batch=False).error == 0


def test_onnx_in_eight_bits(tmp_path):
    """Close to the floats; and what a shift fills is 0.0 exactly, wherever the zero point lies."""
    runtime()
    model = net()
    result = export(model, tmp_path / "net.onnx", images(4), int8=[images(8, seed) for seed in range(1, 4)])
    assert 0 < result.error < 0.05

    shift = snn.Shift2d(torch.tensor([[3, -2]]).repeat(20, 1))
    model = nn.Sequential(nn.Conv2d(3, 20, 1), shift).eval()
    nn.init.constant_(model[0].bias, 2.0)
    path = tmp_path / "border.onnx"
    export(model, path, images(4), int8=[images(8, seed) for seed in range(1, 4)])
    y = answers(path, images(2))
    assert (y[:, :, :3] == 0).all()
    assert (y[..., -2:] == 0).all()
    assert (y[:, :, 3:, :-2] != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(path="net.tflite"), ValueError, "unknown suffix '.tflite'.*Known: .onnx, .pt2"),
        (dict(path="net.onnx", compiled=True), ValueError, "only a .pt2 can be compiled, got net.onnx"),
        (dict(example=[1.0]), TypeError, "a tensor .N, .... or a tuple of them, got list"),
        (dict(example=torch.tensor(1.0)), TypeError, "a tensor .N, .... or a tuple"),
        (dict(int8=[]), ValueError, "int8 takes inputs to calibrate with, got none"),
        (dict(path="missing/net.pt2"), FileNotFoundError, "folder .* does not exist"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(tmp_path, arguments, error, message):
    arguments = {"path": "net.pt2", "example": images(2)} | arguments
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(error, match=message):
        export(net(), **arguments)
    assert not [*tmp_path.iterdir()]


def test_a_file_that_differs_is_not_written(tmp_path):
    """A model that answers otherwise each time cannot be proven."""

    class Fickle(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    path = tmp_path / "net.pt2"
    path.write_bytes(b"the old one")
    with pytest.raises(ValueError, match=r"outputs differ from the model's by .*; nothing was written"):
        export(Fickle(), path, images(2))
    assert path.read_bytes() == b"the old one"
    assert [*tmp_path.iterdir()] == [path]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"writing ONNX needs onnxscript: pip install 'shiftconv\[export\]'"):
        export(net(), tmp_path / "net.onnx", images(2))


ALONE = """
import sys, torch
x, expected = torch.load(sys.argv[2])
load = torch._inductor.aoti_load_package if sys.argv[3] == "compiled" else lambda p: torch.export.load(p).module()
torch.testing.assert_close(load(sys.argv[1])(x), expected)
assert not any(name.startswith("shiftconv") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["program", "compiled"])
def test_pt2_needs_no_shiftconv(tmp_path, kind):
    if kind == "compiled":
        try:
            native.compiler()
        except native.NativeError as error:
            pytest.skip(str(error))
    model, path = net().eval(), tmp_path / "net.pt2"
    export(model, path, images(2), compiled=kind == "compiled")
    with torch.no_grad():
        torch.save((images(5), model(images(5))), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", ALONE, path, tmp_path / "data.pt", kind], check=True)
