"""LargeKernelConv2d against torch's own layers, and what folding makes of it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftconv.nn import LargeKernelConv2d

FORMS = [
    {"kernel_size": 13, "small_kernel_size": 5},
    {"kernel_size": 51, "small_kernel_size": 5},
    {"kernel_size": 7, "small_kernel_size": 3, "decomposed": False},
    {"kernel_size": 7, "small_kernel_size": None, "decomposed": False},
    {"kernel_size": 5, "small_kernel_size": 5},
    {"kernel_size": 6, "small_kernel_size": 4},
    {"kernel_size": 3, "small_kernel_size": 1, "decomposed": False},
    {"kernel_size": 9, "small_kernel_size": 3, "branch_norm": False},
]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


def made(form, dim=3, dtype=torch.float64):
    """A module in evaluation whose normalisations do something, and an input."""
    torch.manual_seed(0)
    module = LargeKernelConv2d(dim, **form).to(dtype)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval(), torch.randn(2, dim, 11, 9, dtype=dtype)


def expected(module, x, training=False):
    """The sum of branches by torch, one after the other; padding before is k // 2."""
    total = 0
    for name in ("tall", "wide", "large", "small"):
        branch = getattr(module, name)
        if branch is None:
            continue
        kh, kw = branch.weight.shape[2:]
        padded = F.pad(x, (kw // 2, kw - 1 - kw // 2, kh // 2, kh - 1 - kh // 2))
        y = F.conv2d(padded, branch.weight, groups=x.shape[1])
        if branch.norm is not None:
            norm = branch.norm
            stats = (None, None) if training else (norm.running_mean, norm.running_var)
            y = F.batch_norm(y, *stats, norm.weight, norm.bias, training, eps=norm.eps)
        total = total + y
    return total


@every_form
def test_equals_torch_in_evaluation_and_in_training(form):
    module, x = made(form)
    torch.testing.assert_close(module(x), expected(module, x))
    torch.testing.assert_close(module.train()(x), expected(module, x, training=True))


@every_form
def test_gradients_equal_torch(form):
    module, x = made(form)
    module.train()
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    grads = torch.autograd.grad(module(x).square().sum(), inputs)
    truth = torch.autograd.grad(expected(module, x, training=True).square().sum(), inputs)
    torch.testing.assert_close(grads, truth)


@every_form
def test_reparameterize_changes_nothing_but_the_cost(form):
    module, x = made(form, dtype=torch.float32)
    y, before = module(x), sum(p.numel() for p in module.parameters())
    kernel, bias = module.equivalent_kernel()
    module.reparameterize()
    torch.testing.assert_close(module(x), y, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert module.small is None
    assert sum(p.numel() for p in module.parameters()) <= before
    reach = [size // 2 for size in kernel.shape[2:]]
    torch.testing.assert_close(F.conv2d(x, kernel, bias, padding=reach, groups=3), y, rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(module)
    again.reparameterize()
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)


def test_only_fixed_normalisations_fold():
    module, x = made(FORMS[0])
    module.train()
    module.tall.norm.eval()  # one of three is frozen, as some fine-tuning does
    y = F.batch_norm(
        F.conv2d(x, module.tall.weight, padding=(6, 2), groups=3),
        module.tall.norm.running_mean, module.tall.norm.running_var, module.tall.norm.weight, module.tall.norm.bias,
    )  # fmt: skip
    rest = copy.deepcopy(module)
    rest.tall = None
    torch.testing.assert_close(module(x), y + expected(rest, x, training=True))
    module.wide.norm = nn.BatchNorm2d(3, track_running_stats=False).double()
    with pytest.raises(ValueError, match="running statistics"):
        module.eval().reparameterize()


def test_evaluation_can_be_differentiated():
    module, x = made(FORMS[0])
    loss = module(x).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_keys_are_plain_and_round_trip():
    module, x = made(FORMS[0])
    keys = set(module.state_dict())
    assert {"tall.weight", "wide.weight", "small.weight", "tall.norm.running_mean"} <= keys
    other = LargeKernelConv2d(3, 13).double().eval()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_autocast_and_sync_batch_norm(memory_format):
    module, x = made({"kernel_size": 13, "small_kernel_size": 5}, dtype=torch.float32)
    x = x.contiguous(memory_format=memory_format)
    y = module(x)
    assert y.is_contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
        module.train()
        assert module(x).dtype is torch.bfloat16
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=3e-2, atol=3e-2)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(
        made({"kernel_size": 13, "small_kernel_size": 5}, dtype=torch.float32)[0]
    )
    torch.testing.assert_close(synced.eval()(x), y)
    synced.reparameterize()
    torch.testing.assert_close(synced(x), y, rtol=1e-5, atol=1e-5)


def test_a_kernel_beyond_the_map_costs_and_changes_nothing():
    """At 14 px only 27 of 47 taps matter."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 14, 14, dtype=torch.float64)
    large = LargeKernelConv2d(2, 47, 5, branch_norm=False).double()
    cut = LargeKernelConv2d(2, 27, 5, branch_norm=False).double()
    with torch.no_grad():
        cut.tall.weight.copy_(large.tall.weight[:, :, 10:-10])
        cut.wide.weight.copy_(large.wide.weight[:, :, :, 10:-10])
        cut.small.weight.copy_(large.small.weight)
    torch.testing.assert_close(large(x), cut(x))


def test_compiles_and_exports():
    module, x = made(FORMS[0], dtype=torch.float32)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3, 0), ValueError, "kernel_size must be at least 1"),
        ((0, 3), ValueError, "dim must be at least 1"),
        ((3, 7.0), TypeError, "kernel_size must be a whole number"),
        ((3, 7, None), ValueError, "short side of its stripes"),
        ((3, 7, -1), ValueError, "small_kernel_size must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        LargeKernelConv2d(*arguments)


def test_bad_inputs_are_named():
    module, x = made(FORMS[0])
    with pytest.raises(TypeError, match=r"tall must have the dtype of x, torch\.float32"):
        module(x.float())
    with pytest.raises(ValueError, match=r"tall must be \[C, 1, kh, kw\] with C = 2"):
        module(x[:, :2])


def test_combinations_of_sizes():
    for size, short, decomposed in itertools.product((1, 2, 5, 8), (1, 2, 3), (True, False)):
        module, x = made({"kernel_size": size, "small_kernel_size": short, "decomposed": decomposed})
        torch.testing.assert_close(module(x), expected(module, x))
