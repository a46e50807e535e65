"""Being told before and after each step of an optimiser that really takes place, and when a model is loaded."""

# torch does not type everything it takes.
# pyright: reportUnknownMemberType=false

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Handle:
    """Ends what it was given."""

    def __init__(self, *ends: Callable[[], object]):
        self._ends = ends

    def remove(self) -> None:
        for end in self._ends:
            end()


def follow(
    optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None], made: Callable[[], None]
) -> Handle:
    """Call ``before`` and ``after`` around each step, or in the place of ``before`` if the step has a closure ``made``.

    It is called each time that the closure has made gradients.
    A step that a gradient scaler leaves to the optimiser to leave out, as it does with fused ones, is not followed.
    Optimisers that never ran the constructor of ``Optimizer``, as timm's Lookahead, have no hooks: their method is
    wrapped.
    """

    def first(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if _is_left_out(optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            before()
            return None
        followed = _followed(closure, made)
        return ((args[0], followed, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": followed})

    def last(*_: Any) -> None:
        if not _is_left_out(optimizer):
            after()

    if getattr(type(optimizer).step, "hooked", False):
        handles = optimizer.register_step_pre_hook(first), optimizer.register_step_post_hook(last)
        return Handle(*(handle.remove for handle in handles))
    return _wrap(optimizer, first, last)


def _wrap(optimizer: Optimizer, first: Callable[..., Arguments | None], last: Callable[..., None]) -> Handle:
    outer = vars(optimizer).get("step")
    step: Callable[..., Any] = optimizer.step
    following = True

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not following:
            return step(*args, **kwargs)
        given = first(optimizer, (optimizer, *args), kwargs) or ((optimizer, *args), kwargs)
        result: Any = step(*given[0][1:], **given[1])
        last()
        return result

    def end() -> None:
        nonlocal following
        following = False  # others may have wrapped it, too, since then
        if vars(optimizer).get("step") is not wrapped:
            return
        if outer is None:
            del optimizer.step
        else:
            optimizer.step = outer

    optimizer.step = wrapped
    return Handle(end)


def _followed(closure: Callable[[], Any], then: Callable[[], None]) -> Callable[[], Any]:
    def followed() -> Any:
        loss = closure()
        then()
        return loss

    return followed


def _is_left_out(optimizer: Optimizer) -> bool:
    found = vars(optimizer).get("found_inf")  # torch.amp.GradScaler sets it for the time of a step
    return isinstance(found, Tensor) and bool(found)


class OnLoad:
    """Calls something before a model is used for the first time after weights were loaded into it.

    Not at once: what belongs to the new weights may be loaded next. Copies of the model, pickled ones among them, have
    hooks that do nothing.
    """

    def __init__(self, model: nn.Module, call: Callable[[], None]):
        self._model, self._call = model, call
        self._uses: list[RemovableHandle] = []
        self._load = model.register_load_state_dict_post_hook(_Hook(self._loaded))

    @property
    def waits(self) -> bool:
        """Whether weights were loaded and not used since then."""
        return bool(self._uses)

    def done(self) -> None:
        """Wait no longer."""
        for handle in self._uses:
            handle.remove()
        self._uses = []

    def remove(self) -> None:
        self.done()
        self._load.remove()

    def _loaded(self) -> None:
        if not self._uses:  # parts of a model may be called by themselves
            self._uses = [module.register_forward_pre_hook(_Hook(self._call)) for module in self._model.modules()]


class _Hook:
    """A bound method as a hook that neither copies nor keeps alive what it is bound to."""

    def __init__(self, method: Callable[[], None] | None = None):
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *_: object) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()
