"""The same masks on every process: scores are averaged over all, the first one decides, the others are told."""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def decides() -> bool:
    """Whether this process is the one that decides."""
    return size() == 1 or dist.get_rank() == 0


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean over all processes, by one message."""
    if size() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = (flat / size()).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def broadcast(masks: Sequence[Tensor]) -> list[Tensor]:
    """The masks of the first process, by one message; ``masks`` of the others only give the shapes."""
    if size() == 1 or not masks:
        return list(masks)
    flat = torch.cat([m.flatten() for m in masks]).to(torch.uint8)
    dist.broadcast(flat, 0)
    parts = (flat != 0).split([m.numel() for m in masks])
    return [part.view(m.shape) for part, m in zip(parts, masks, strict=True)]
