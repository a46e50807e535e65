import pytest
import torch
from torch import nn

from shiftconv.train.evaluation import evaluate


class Table(nn.Module):
    """Logits are the first row of the picture."""

    def forward(self, x):
        return x[:, 0, 0, :]


def pictures(logits):
    return logits[:, None, None, :].expand(-1, 3, 2, -1)


@pytest.mark.parametrize("classes", [7, 3])
def test_equals_the_definition(classes):
    logits = torch.randn(50, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % classes
    loader = [(pictures(logits[:32]), labels[:32]), (pictures(logits[32:]), labels[32:])]
    metrics = evaluate(Table(), loader)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert metrics.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics.top1 == pytest.approx((ranks == 0).double().mean().item())
    assert metrics.top5 == pytest.approx((ranks < 5).double().mean().item())
    assert metrics.images == 50 and metrics.images_per_second > 0


def test_mode_and_statistics_stay():
    model = nn.Sequential(nn.BatchNorm2d(3), Table())
    evaluate(model, [(torch.randn(4, 3, 2, 5), torch.zeros(4, dtype=torch.long))])
    assert model.training and model[0].num_batches_tracked == 0
    evaluate(model.eval(), [(torch.randn(4, 3, 2, 5), torch.zeros(4, dtype=torch.long))])
    assert not model.training


def test_half_precision():
    logits = torch.randn(8, 4)
    assert evaluate(Table(), [(pictures(logits), logits.argmax(1))], amp="bf16").top1 == 1
    with pytest.raises(ValueError, match="amp 'fp16' needs a CUDA device, got cpu"):
        evaluate(Table(), [(pictures(logits), logits.argmax(1))], amp="fp16")


def test_bad_input():
    with pytest.raises(ValueError, match="not one image"):
        evaluate(Table(), [])
    with pytest.raises(ValueError, match="the network has 4 classes, but a label is 9"):
        evaluate(Table(), [(torch.zeros(2, 3, 2, 4), torch.tensor([0, 9]))])


def test_frozen_norms_stay_frozen():
    model = nn.Sequential(nn.BatchNorm2d(3).eval(), Table())
    evaluate(model, [(torch.randn(4, 3, 2, 5), torch.zeros(4, dtype=torch.long))])
    assert model.training and not model[0].training
