"""One network on many devices: copies that average their gradients (DDP), or pieces (FSDP2), and what they exchange."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from shiftconv.train.endings import ElsewhereError
from shiftconv.train.ranks import Ranks, broadcast_object, peers

T = TypeVar("T")
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_PIECE = 2**16  # weights of a module that is worth a message of its own


def wrap(task: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The task as it trains on several processes: its gradients are the mean of theirs."""
    if ranks.world == 1:
        return task
    devices = [device] if device.type == "cuda" else None
    # Of a depthwise weight [C, 1, k, k] the stride of the axis of length 1 means nothing, but torch compares it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(task, device_ids=devices, gradient_as_bucket_view=True)


def shard(module: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Cut the weights of a module in pieces, one for each process, in place; blocks come together one by one."""
    mesh = init_device_mesh(device.type, (ranks.world,))
    for parent in [*module.modules()]:
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            for part in parent.children():
                large = sum(p.numel() for p in part.parameters()) >= _PIECE
                if large and not isinstance(part, nn.Sequential | nn.ModuleList) and not _has_list(part):
                    fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Sequential | nn.ModuleList) for part in module.children())


@contextmanager
def gradients_stay(net: nn.Module, pieces: Sequence[FSDPModule], wanted: bool) -> Iterator[None]:
    """Within the block a backward pass keeps its gradients to itself, if wanted: more are going to be added.

    Args:
        net: what ``wrap`` gave, or a task in pieces.
        pieces: of it, as ``in_pieces`` finds them.
        wanted: whether to.
    """
    if isinstance(net, DistributedDataParallel) and wanted:
        with net.no_sync():
            yield
        return
    for part in pieces:
        part.set_requires_gradient_sync(not wanted, recurse=False)
    yield


def synchronise_norms(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with batch norms that take their statistics over all processes; its weights stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            setattr(module, "forward", _Synchronised(module))  # noqa: B010 - torch's own kind is for GPUs only
    return network


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient, for each of them has a part in every result."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grad.clone()
        dist.all_reduce(total)
        return total


class _Synchronised:
    """The forward pass of a batch norm, over the images of all processes."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> None:
        self.norm, self.alone = norm, norm.forward

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not norm.training:
            return self.alone(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        wide = x.double()
        count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64)
        sums = _Sum.apply(torch.cat([wide.sum(axes), wide.square().sum(axes), count]))
        size, (total, squares) = sums[-1], sums[:-1].chunk(2)
        mean = total / size
        variance = (squares / size - mean.square()).clamp(min=0)
        if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
            with torch.no_grad():
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked += 1
                share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
                norm.running_mean.lerp_(mean.to(norm.running_mean), share)
                unbiased = variance * size / (size - 1).clamp(min=1)
                norm.running_var.lerp_(unbiased.to(norm.running_var), share)
        y = ((wide - mean.view(shape)) * (variance + norm.eps).rsqrt().view(shape)).to(x.dtype)
        return y if norm.weight is None else y * norm.weight.view(shape) + norm.bias.view(shape)


def weights(module: nn.Module) -> dict[str, Any]:
    """The whole state dict of a module; of pieces every process has to ask for it, and the first one gets it."""
    return get_model_state_dict(module, options=_WHOLE) if in_pieces(module) else module.state_dict()


def finite(module: nn.Module, state: dict[str, Any]) -> bool:
    """Whether all parameters of a module in its state dict are finite numbers."""
    own = (state[name] for name, _ in module.named_parameters() if name in state)
    return all(bool(weight.isfinite().all()) for weight in own)


def load_weights(module: nn.Module, state: dict[str, Any]) -> None:
    """Load what ``weights`` gave, whatever the number of processes was."""
    if in_pieces(module):
        set_model_state_dict(module, state, options=_WHOLE)
    else:
        module.load_state_dict(state)


def moments(task: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of the optimiser over the task's parameters, for pieces as for whole weights; as ``weights``."""
    if not in_pieces(task):
        return optimizer.state_dict()
    numbers = {name: number for number, name in enumerate(_names(task, optimizer))}
    found: dict[str, Any] = get_optimizer_state_dict(task, optimizer, options=_WHOLE)
    if not found:  # torch gives the whole to the first process only
        return {}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in found["param_groups"]]
    return {
        "state": {numbers[name]: value for name, value in found["state"].items()},
        "param_groups": groups,
    }


def load_moments(task: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what ``moments`` gave, whatever the number of processes was."""
    if not in_pieces(task):
        optimizer.load_state_dict(state)
        return
    names = _names(task, optimizer)
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    named = {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": groups}
    set_optimizer_state_dict(task, optimizer, named, options=_WHOLE)


def _names(task: nn.Module, optimizer: Optimizer) -> list[str]:
    """Of the optimiser's parameters, in its order, which is that of its state dict's numbers."""
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def in_pieces(module: nn.Module) -> list[FSDPModule]:
    """The parts of a module whose weights are cut; none of one that is whole."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def first_does(ranks: Ranks, function: Callable[[], T]) -> T:
    """What the first process's function gives, on all of them; the others wait. Tensors come on the CPU.

    Raises:
        ElsewhereError: on the others, if it raises an error on the first, where that is raised.
    """
    if ranks.world == 1:
        return function()
    value, error = None, None
    if ranks.first:
        try:
            value = function()
        except Exception as caught:
            error = caught
    message = broadcast_object(None if error is None else f"{type(error).__name__}: {error}", ranks)
    if error is not None:
        raise error
    if message is not None:
        raise ElsewhereError(message)
    return _broadcast(value, ranks)


def merged(values: dict[str, str], ranks: Ranks) -> dict[str, str]:
    """The entries of all processes' dicts, in order of their keys, on all of them.

    Raises:
        LostRank: if another process is gone.
    """
    parts = [values]
    if ranks.world > 1:
        parts *= ranks.world
        with peers():
            dist.all_gather_object(parts, values)
    return dict(sorted(entry for part in parts for entry in part.items()))


def _broadcast(value: Any, ranks: Ranks) -> Any:
    """A tree of plain values and tensors; tensors travel as they are, which is quicker than pickled."""
    tensors: list[Tensor] = []

    def out(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf.detach().cpu().contiguous())
        return _Place(len(tensors) - 1, leaf.shape, leaf.dtype)

    tree = broadcast_object(tree_map(out, value) if ranks.first else None, ranks)
    places: list[_Place] = []
    tree_map(lambda leaf: places.append(leaf) if isinstance(leaf, _Place) else None, tree)
    if not ranks.first:
        tensors = [torch.empty(place.shape, dtype=place.dtype) for place in places]
    with peers():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
    return tree_map(lambda leaf: tensors[leaf.number] if isinstance(leaf, _Place) else leaf, tree)


class _Place:
    """Where a tensor was in a tree."""

    def __init__(self, number: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.number, self.shape, self.dtype = number, shape, dtype
