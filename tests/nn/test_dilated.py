"""DilatedReparamConv2d against torch's own layers, and what folding makes of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftconv.nn import DilatedReparamConv2d

BESIDE = {  # small kernels and the distances of their taps, as in Table 1 of the authors' code
    17: ([5, 9, 3, 3, 3], [1, 2, 4, 5, 7]),
    15: ([5, 7, 3, 3, 3], [1, 2, 3, 5, 7]),
    13: ([5, 7, 3, 3, 3], [1, 2, 3, 4, 5]),
    11: ([5, 5, 3, 3, 3], [1, 2, 3, 4, 5]),
    9: ([5, 5, 3, 3], [1, 2, 3, 4]),
    7: ([5, 3, 3], [1, 2, 3]),
    5: ([3, 3], [1, 2]),
}
every_size = pytest.mark.parametrize("size", BESIDE)


pytestmark = pytest.mark.usefixtures("one_thread")


def made(size, dim=3, dtype=torch.float64):
    """A module in evaluation whose normalisations do something, and a map."""
    torch.manual_seed(size)
    module = DilatedReparamConv2d(dim, size).to(dtype)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval(), torch.randn(2, dim, 11, 8, dtype=dtype)


def branches(module, size):
    """The authors' branches by our names, with their dilations."""
    small = [module.dilated[f"k{side}_{gap}"] for side, gap in zip(*BESIDE[size], strict=True)]
    return [(module.dense, 1), *zip(small, BESIDE[size][1], strict=True)]


def expected(module, x, size, training=False):
    total = torch.zeros_like(x)
    for branch, dilation in branches(module, size):
        padding = dilation * (branch.weight.shape[-1] - 1) // 2
        y = F.conv2d(x, branch.weight, padding=padding, dilation=dilation, groups=x.shape[1])
        norm = branch.norm
        stats = (None, None) if training else (norm.running_mean, norm.running_var)
        total = total + F.batch_norm(y, *stats, norm.weight, norm.bias, training, eps=1e-5)
    return total


@every_size
def test_equals_torch_in_evaluation_and_in_training(size):
    module, x = made(size)
    assert len(branches(module, size)) == 1 + len(module.dilated)
    torch.testing.assert_close(module(x), expected(module, x, size))
    torch.testing.assert_close(module.train()(x), expected(module, x, size, training=True))


@every_size
@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_torch(size, training):
    module, x = made(size)
    module.train(training)
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    probe = torch.randn_like(x)
    grads = torch.autograd.grad((module(x) * probe).sum(), inputs)
    truth = torch.autograd.grad((expected(module, x, size, training) * probe).sum(), inputs)
    torch.testing.assert_close(grads, truth)


def test_statistics_move_as_those_of_torch():
    module, x = made(13)
    before = copy.deepcopy(module)
    module.train()(x)
    for (branch, dilation), (old, _) in zip(branches(module, 13), branches(before, 13), strict=True):
        padding = dilation * (branch.weight.shape[-1] - 1) // 2
        y = F.conv2d(x, branch.weight, padding=padding, dilation=dilation, groups=3)
        moved = old.norm.running_mean + 0.1 * (y.mean((0, 2, 3)) - old.norm.running_mean)
        torch.testing.assert_close(branch.norm.running_mean, moved)
        assert branch.norm.num_batches_tracked == 1


@every_size
def test_equivalent_kernel(size):
    module, x = made(size)
    kernel, bias = module.equivalent_kernel()
    assert kernel.shape == (3, 1, size, size) and bias.shape == (3,)
    torch.testing.assert_close(F.conv2d(x, kernel, bias, padding=size // 2, groups=3), module(x))
    wanted = torch.autograd.grad(expected(module, x, size).square().sum(), list(module.parameters()))
    y = F.conv2d(x, *module.equivalent_kernel(), padding=size // 2, groups=3)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), list(module.parameters())), wanted)


@every_size
def test_reparameterize_changes_nothing_but_the_cost(size):
    module, x = made(size, dtype=torch.float32)
    exact = copy.deepcopy(module).double()(x.double())
    module.reparameterize()
    torch.testing.assert_close(module(x).double(), exact, rtol=1e-5, atol=1e-5)
    assert module.dense is None and not len(module.dilated)
    assert sum(p.numel() for p in module.parameters()) == 3 * (size * size + 1)
    kernel, bias = module.equivalent_kernel()
    torch.testing.assert_close(F.conv2d(x, kernel, bias, padding=size // 2, groups=3), module(x), rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(module)
    again.reparameterize()
    assert torch.equal(again(x), module(x)) and not module.train()(x).isnan().any()


def test_maps_smaller_than_the_kernel():
    module, _ = made(17)
    for shape in ((1, 3, 1, 1), (2, 3, 1, 4), (0, 3, 5, 5), (1, 3, 40, 3)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(module(x), expected(module, x, 17))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
def test_memory_format_and_autocast(memory_format, training):
    module, x = made(7, dtype=torch.float32)
    module.train(training)
    plain = module(x.contiguous())
    x = x.contiguous(memory_format=memory_format)
    y = module(x)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
    assert half.dtype is torch.bfloat16
    assert (half.float() - y).abs().max() < 0.05 * y.abs().max()


def test_only_fixed_normalisations_fold():
    module, x = made(9)
    module.train()
    module.dense.norm.eval()  # one of several is frozen, as some fine-tuning does
    rest = expected(module, x, 9, training=True)
    frozen = F.conv2d(x, module.dense.weight, padding=4, groups=3)
    dense = module.dense.norm
    rest = rest - F.batch_norm(frozen, None, None, dense.weight, dense.bias, True)
    torch.testing.assert_close(module(x), rest + dense(frozen))
    module.dilated["k5_1"].norm = nn.BatchNorm2d(3, track_running_stats=False).double()
    for refused in (module.eval().reparameterize, module.equivalent_kernel):
        with pytest.raises(ValueError, match="without running statistics"):
            refused()
    assert module(x).shape == x.shape


def test_keys_are_plain_and_round_trip():
    module, x = made(13)
    keys = set(module.state_dict())
    assert {"dense.weight", "dense.norm.running_mean", "dilated.k5_1.weight", "dilated.k3_5.norm.bias"} <= keys
    other = DilatedReparamConv2d(3, 13).double().eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_compiles():
    module, x = made(7, dtype=torch.float32)
    for training in (False, True):
        module.train(training)
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), copy.deepcopy(module)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dim", "size", "error", "message"),
    [
        (3, 3, ValueError, r"kernel_size must be one of \[5, 7, 9, 11, 13, 15, 17\], got 3"),
        (3, 19, ValueError, "kernel_size must be one of .*, got 19"),
        (3, 8, ValueError, "kernel_size must be one of .*, got 8"),
        (3, 0, ValueError, "kernel_size"),
        (0, 7, ValueError, "dim"),
        (3, 7.0, TypeError, "kernel_size"),
        (True, 7, TypeError, "dim"),
        ("3", 7, TypeError, "dim"),
    ],
)
def test_bad_arguments_are_named(dim, size, error, message):
    with pytest.raises(error, match=message):
        DilatedReparamConv2d(dim, size)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (2, 3, 5), (2, 3, 5, 5, 5)])
def test_bad_maps_are_named(shape, training):
    module, _ = made(7)
    module.train(training)
    with pytest.raises(ValueError, match=r"\[.*\]"):
        module(torch.zeros(shape, dtype=torch.float64))
