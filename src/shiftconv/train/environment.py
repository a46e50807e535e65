"""Where and with what a run computes, for its environment.json."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

from shiftconv._version import __version__
from shiftconv.train.ranks import Ranks

_GIT_S = 5.0


def environment(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """What may explain a number later, as plain values. Never fails: what cannot be found out is None.

    Args:
        ranks: what this process is among others.
        device: where it computes.

    Names of users and machines are left out.
    """
    facts: dict[str, Callable[[], Any]] = {
        "time": lambda: datetime.now(UTC).isoformat(timespec="seconds"),
        "command": lambda: shlex.join(sys.argv),
        "shiftconv": lambda: __version__,
        "torch": lambda: str(torch.__version__),
        "timm": lambda: timm.__version__,
        "python": platform.python_version,
        "system": lambda: f"{platform.system()} {platform.release()}",
        "machine": platform.machine,
        "processor": _processor,
        "cores": lambda: len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads,
        "processes": lambda: ranks.world,
        "restarts": lambda: ranks.restarts,
        "device": lambda: _device(device),
        "git": _git,
    }
    return {name: _or_none(fact) for name, fact in facts.items()}


def _or_none(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    except Exception:  # a run does not end for want of a note about it
        return None


def _processor() -> str:
    """The CPU's name; platform.processor() is empty on most Linux systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"kind": device.type, "name": _or_none(_processor)}
    about = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory_gib": round(about.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _git() -> dict[str, Any] | None:
    """The state of the repository that holds the current folder; none if there is no repository, or no git."""
    commit = _or_none(lambda: _run_git("rev-parse", "HEAD"))
    if commit is None:
        return None
    changes = _or_none(lambda: _run_git("status", "--porcelain"))  # a big repository may take too long
    branch = _or_none(lambda: _run_git("rev-parse", "--abbrev-ref", "HEAD"))
    return {"commit": commit, "branch": branch, "dirty": None if changes is None else bool(changes)}


def _run_git(*arguments: str) -> str:
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # only look: status would write the index
    done = subprocess.run(
        ["git", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_S,
        env=env,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()
