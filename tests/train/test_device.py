import pytest
import torch

from shiftconv.train.device import check_amp, determinism, pick_device


def test_auto():
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown device 'gpu'"),
        ("cuda:99", "'cuda:99' is not on this machine"),
        ("meta", "'meta' is not supported"),
    ],
)
def test_impossible(name, message):
    with pytest.raises(ValueError, match=message):
        pick_device(name)


def test_half_precision_needs_a_gpu():
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        check_amp("fp16", torch.device("cpu"))


def test_determinism_is_undone():
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("count", "message"), [(0, "no CUDA device; use cpu"), (1, "1 CUDA device"), (2, "2 CUDA devices")]
)
def test_says_what_the_machine_has(monkeypatch, count, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=f"which has {message}$"):
        pick_device("cuda:5")
