"""Where a run computes, and how exactly."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

try:
    import resource
except ImportError:  # Windows has none
    resource = None

import torch
from torch.utils._pytree import tree_map


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this name; none: the first GPU, or the CPU where there is none.

    Raises:
        ValueError: for a name that is no device, or one that this machine has not.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda, cuda:1 ...") from None
    if picked.type == "cpu":
        return torch.device("cpu")
    if picked.type != "cuda":
        raise ValueError(f"device {device!r} is not supported: expected cpu, cuda, cuda:1 ...")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (picked.index or 0) >= count:
        has = "no CUDA device; use cpu" if count == 0 else "1 CUDA device" if count == 1 else f"{count} CUDA devices"
        raise ValueError(f"device {device!r} is not on this machine, which has {has}")
    return picked


def check_amp(amp: str, device: torch.device) -> None:
    """Raise a ValueError if this device cannot compute in this precision."""
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"amp 'fp16' needs a CUDA device, got {device}; use 'bf16' or 'none'")


@dataclass(frozen=True)
class Compute:
    """Where and how exactly a network computes.

    Attributes:
        device: of the network.
        amp: none, bf16 or fp16.
        channels_last: memory format of images.
    """

    device: torch.device
    amp: str = "none"
    channels_last: bool = False

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.amp != "none")

    def memory(self) -> int:
        """The most memory that was taken so far, in bytes: of the GPU, or by this process; 0 where nobody tells."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def move(self, values: Any) -> Any:
        """Tensors, also those in lists and dicts, on the device; images ``[B, C, H, W]`` in the memory format."""
        if isinstance(values, torch.Tensor):
            layout = torch.channels_last if self.channels_last and values.ndim == 4 else torch.contiguous_format
            return values.to(self.device, non_blocking=True, memory_format=layout)
        return tree_map(lambda value: self.move(value) if isinstance(value, torch.Tensor) else value, values)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Within the block torch uses deterministic algorithms only, if wanted; after it all is as before."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
