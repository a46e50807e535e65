"""The response norm without channels that are zero; the block is tested with the networks."""

import pytest
import torch

from shiftconv.models.large_kernel_block import ResponseNorm

torch.set_num_threads(1)


def made(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    norm = ResponseNorm(7)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    x = torch.randn(2, 5, 4, 7, generator=generator)
    x[..., [1, 4]] = 0
    return norm.to(dtype), x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_channels_of_zeros_go(dtype, bias):
    norm, x = made(dtype)
    if not bias:
        norm.bias = None
    y = norm(x)
    torch.testing.assert_close(y[..., [1, 4]], norm.output_of_zeros()[[1, 4]].expand(2, 5, 4, 2))
    for left in ([0, 1, 2, 3, 5, 6], [0, 2, 3, 5, 6]):  # one after the other
        index = {7: left, 6: [0, 2, 3, 4, 5]}[len(norm.weight)]
        norm.keep_channels(torch.tensor(index))
        torch.testing.assert_close(norm(x[..., left]), y[..., left])
    assert len(norm.weight) == len(norm.output_of_zeros()) == 5
    assert (norm.bias is not None) == bias


def test_another_mean_would_differ():
    norm, x = made()
    y = norm(x)
    norm.keep_channels(torch.tensor([0, 2, 3, 5, 6]))
    norm.dim = 5
    assert (norm(x[..., [0, 2, 3, 5, 6]]) - y[..., [0, 2, 3, 5, 6]]).abs().max() > 0.1


def test_says_of_how_many_channels():
    norm, _ = made()
    assert str(norm) == "ResponseNorm(7, eps=1e-06, bias=True)"
    norm.keep_channels(torch.tensor([3]))
    assert str(norm) == "ResponseNorm(1 of 7, eps=1e-06, bias=True)"
