"""The networks against numbers that the authors' own code produced, from weights to training gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shiftconv.analysis.count import count
from shiftconv.models import create_model

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "shiftresnet.json").read_text())


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "shiftresnet.npz") as arrays:
        yield lambda case, name: torch.from_numpy(arrays[f"{case}/{name}"])


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def _model(case):
    return create_model(CASES[case]["arch"], **CASES[case]["args"])


def _close(got, expected, rtol=1e-9):
    """Relative to the largest number, and so for numbers near zero too."""
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < rtol, f"relative error {error:.1e}"


def test_state_dict_and_costs(case):
    model, expected = _model(case), CASES[case]
    with np.load(GOLDEN / "shiftresnet.npz") as arrays:
        keys = arrays[f"{case}/state_dict"].tolist()
    assert [" ".join([key, *map(str, value.shape)]) for key, value in model.state_dict().items()] == keys
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    cost = count(model)
    assert (cost.parameters, cost.macs) == (expected["params"], expected["macs"])


def test_evaluation(case, golden, fill, images):
    model, x = fill(_model(case).double()).eval(), images(case)
    stages = []
    for i in (1, 2, 3):
        model.get_submodule(f"layer{i}").register_forward_hook(lambda _, __, y: stages.append(y))
    with torch.no_grad():
        _close(model(x), golden(case, "logits_f64"))
    for i, y in zip((1, 2, 3), stages, strict=True):
        _close(torch.stack([y.mean(), y.std(), y.abs().max()]), golden(case, f"layer{i}_stat"))
        _close(y[0, :, :: y.shape[2] // 2, :: y.shape[3] // 2], golden(case, f"layer{i}_sample"))
    with torch.no_grad():
        _close(model.float()(x.float()), golden(case, "logits_f32"), rtol=1e-5)


def test_training(case, golden, fill, images):
    model = fill(_model(case).double()).train()
    logits = model(images(case))
    loss = F.cross_entropy(logits, torch.tensor(CASES[case]["labels"]))
    loss.backward()
    _close(logits, golden(case, "train_logits_f64"))
    _close(loss, golden(case, "train_loss_f64"))
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    # a bias that the next batch norm takes away again has the gradient 0 and its rounding noise
    torch.testing.assert_close(norms, golden(case, "grad_norms_f64"), rtol=1e-9, atol=1e-14)
    _close(model.conv1.weight.grad, golden(case, "grad_conv1_f64"))
    _close(model.linear.weight.grad, golden(case, "grad_linear_f32"), rtol=1e-6)
    _close(model.bn1.running_mean, golden(case, "bn1_running_mean_after_f64"))
    _close(model.bn1.running_var, golden(case, "bn1_running_var_after_f64"))
