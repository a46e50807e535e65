"""Being told before and after each step of an optimiser that really takes place."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Handle:
    """Ends what it was given, the last first."""

    def __init__(self, *ends: Callable[[], object]):
        self._ends = ends

    def remove(self) -> None:
        for end in reversed(self._ends):
            end()


def follow(optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> Handle:
    """Call ``before`` and ``after`` around each step.

    Optimisers that a gradient scaler tells to leave a step out themselves, as fused ones, are not followed in it. Those
    that never ran the constructor of ``Optimizer``, as timm's Lookahead, have no hooks: their method is wrapped.
    """

    def first(*_: Any) -> None:
        if not _is_left_out(optimizer):
            before()

    def last(*_: Any) -> None:
        if not _is_left_out(optimizer):
            after()

    if getattr(type(optimizer).step, "hooked", False):
        handles = optimizer.register_step_pre_hook(first), optimizer.register_step_post_hook(last)
        return Handle(*(handle.remove for handle in handles))
    step: Callable[..., Any] = optimizer.step

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first()
        result = step(*args, **kwargs)
        last()
        return result

    optimizer.step = wrapped
    return Handle(lambda: vars(optimizer).pop("step", None))


def _is_left_out(optimizer: Optimizer) -> bool:
    found = vars(optimizer).get("found_inf")  # torch.amp.GradScaler sets it for the time of a step
    return isinstance(found, Tensor) and bool(found)
