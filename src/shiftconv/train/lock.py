"""A run's folder belongs to one process at a time."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none, so there nothing is locked
    fcntl = None


_held: set[int] = set()


def lock(folder: Path) -> int | None:
    """Lock a folder for this process; the system frees it when the process ends, however it ends.

    The folder itself is locked, so that no file is left.

    Returns:
        A handle for ``unlock``; none where folders cannot be locked.

    Raises:
        BlockingIOError: if another run holds it.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BlockingIOError(f"another process runs in {folder}; wait for it or take another folder") from None
    except OSError:  # some network file systems lock no folders
        os.close(handle)
        return None
    _held.add(handle)
    return handle


def unlock(handle: int) -> None:
    if handle in _held:
        _held.remove(handle)
        os.close(handle)


def _leave() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


if fcntl is not None:  # a lock is free once all have closed it, and the workers of a killed run live on for seconds
    os.register_at_fork(after_in_child=_leave)
