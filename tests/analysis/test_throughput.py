"""Throughput on networks whose speed is known because they sleep."""

import time

import pytest
import torch
from torch import Tensor, nn

from shiftconv.analysis.throughput import compare, throughput


class Sleeper(nn.Module):
    def __init__(self, seconds: float):
        super().__init__()
        self.seconds, self.weight, self.seen = seconds, nn.Parameter(torch.ones(1)), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((tuple(x.shape), self.training, torch.is_inference_mode_enabled(), x.dtype))
        time.sleep(self.seconds)
        return self.weight * x


def test_counts_images_per_second():
    model = Sleeper(0.01)
    result = throughput(model, (1, 4, 6), batch_size=5, seconds=0.1, rounds=3)
    assert 200 < result.images_per_second <= 500
    assert sorted(result.rounds)[1] == result.images_per_second
    assert (len(result.rounds), result.batch_size, result.device) == (3, 5, "cpu")
    assert set(model.seen) == {((5, 1, 4, 6), False, True, torch.float32)}
    assert model.training
    assert 3 <= len(model.seen) <= 20


def test_compare_takes_turns_and_tells_the_ratio():
    quick, slow = Sleeper(0.002), Sleeper(0.006)
    result = compare({"quick": quick, "slow": slow}, 8, batch_size=2, seconds=0.06, rounds=5)
    assert list(result) == ["quick", "slow"]
    assert 1.8 < result["quick"].ratio(result["slow"]) < 4.5
    assert result["slow"].ratio(result["slow"]) == 1
    assert quick.seen[0][0] == (2, 3, 8, 8)


def test_the_ratio_pairs_the_rounds():
    class Alternating(Sleeper):
        """The machine slows down by half from round to round, for both alike."""

        def forward(self, x: Tensor) -> Tensor:
            self.seconds *= 1.25
            return super().forward(x)

    result = compare({"a": Alternating(0.002), "b": Alternating(0.004)}, 4, batch_size=1, seconds=0.001, rounds=7)
    assert 1.5 < result["a"].ratio(result["b"]) < 2.3


def test_the_given_model_is_not_moved_or_reordered():
    model = nn.Conv2d(3, 4, 3).double()
    strides = model.weight.stride()
    throughput(model, 8, batch_size=1, seconds=0.01, rounds=1, channels_last=True)
    throughput(model, 8, batch_size=1, seconds=0.01, rounds=1, device="cpu")
    assert model.weight.stride() == strides
    assert model.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(size=0), ValueError, r"side in pixels or \(C, H, W\), all positive, got 0"),
        (dict(size=(3, 8)), ValueError, r"got \(3, 8\)"),
        (dict(size=(3, 8.5, 8)), ValueError, r"got \(3, 8.5, 8\)"),
        (dict(batch_size=0), ValueError, "batch_size must be positive, got 0"),
        (dict(rounds=0), ValueError, "rounds must be positive, got 0"),
        (dict(seconds=0.0), ValueError, "seconds must be positive, got 0.0"),
        (dict(device="gpu7"), ValueError, "gpu7"),
        (dict(device="cuda:99"), ValueError, "device 'cuda:99' cannot be used"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(options, error, message):
    with pytest.raises(error, match=message):
        throughput(nn.Conv2d(3, 4, 3), **options)


def test_only_models_can_be_measured():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        throughput("resnet20")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no model"):
        compare({})
