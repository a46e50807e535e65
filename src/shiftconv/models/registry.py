"""One entry in timm's registry per network, with errors that say which arguments it has."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, get_args

from timm.models import build_model_with_cfg, clean_state_dict, register_model
from torch import Tensor, nn

from shiftconv.models.trunk import TrunkArgs
from shiftconv.names import closest

_TIMM_ARGS = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir")
_FEATURE_ARGS = ("features_only", "out_indices", "feature_cls")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # what timm looks for in files, but not in downloads


def arguments_of(family: Callable[..., nn.Module], fixed: Iterable[str] = ()) -> tuple[str, ...]:
    """The names of all arguments that networks of ``family`` take, but for those that the name of a network fixes."""
    parameters = inspect.signature(family).parameters
    own = [name for name in parameters if name not in (*fixed, "trunk")]
    shared = get_args(parameters["trunk"].annotation)  # of Unpack[TrunkArgs], or of what extends it
    return *own, *(shared[0] if shared else TrunkArgs).__annotations__, *_FEATURE_ARGS


def check_arguments(
    variant: str, known: tuple[str, ...], given: Iterable[str], others: Mapping[str, tuple[str, ...]] | None = None
) -> None:
    """Raise TypeError for the first of ``given`` that ``variant`` does not take.

    Args:
        variant: name of the network.
        known: what it takes, beside what is for timm.
        given: the names that came.
        others: what other families take, to say whose an argument is.
    """
    for name in given:
        if name in known or name in _TIMM_ARGS:
            continue
        owners = [family for family, names in (others or {}).items() if name in names]
        close = closest(name, known)
        hint = f" (it belongs to {', '.join(owners)})." if owners else f"; did you mean {close!r}?" if close else "."
        raise TypeError(f"{variant} has no argument {name!r}{hint} It takes: {', '.join(known)}")


def register(
    variant: str,
    family: Callable[..., nn.Module],
    out_indices: tuple[int, ...],
    fixed: Mapping[str, Any] | None = None,
    others: Mapping[str, Callable[..., nn.Module]] | None = None,
    feature_cls: str = "list",
) -> Callable[..., nn.Module]:
    """Register ``family`` with the arguments ``fixed`` in timm as ``variant``, and return the function that makes it.

    Args:
        variant: name of the network; the module of ``family`` has its configuration in ``default_cfgs``.
        family: makes a network from ``fixed`` and the arguments that are left.
        out_indices: the features that ``features_only`` gives unless told.
        fixed: the arguments that the name stands for.
        others: the families of the same module, for errors.
        feature_cls: how timm gets at the features: ``list`` of the children, or ``getter``, by the network itself.
    """
    fixed = dict(fixed or {})
    known = arguments_of(family, fixed)

    def entry(pretrained: bool = False, **arguments: Any) -> nn.Module:
        rest = {name: arguments_of(other) for name, other in (others or {}).items() if other is not family}
        check_arguments(variant, known, arguments, rest)
        features = dict(out_indices=out_indices, feature_cls=feature_cls)
        given = {name: value for name, value in arguments.items() if name not in _TIMM_ARGS}
        network = build_model_with_cfg(
            partial(family, **fixed),
            variant,
            pretrained,
            feature_cfg=features,
            pretrained_filter_fn=_under_our_keys,
            **arguments,
        )
        setattr(network, "model_args", given)  # noqa: B010  a plain attribute; with the name in its pretrained_cfg all that it takes to make it again
        return network

    entry.__name__ = entry.__qualname__ = variant
    entry.__module__ = family.__module__  # where timm looks for the configuration
    values = ", ".join(f"{name}={value!r}" for name, value in fixed.items())
    entry.__doc__ = f"``{family.__name__}({values})``; takes its other arguments and timm's."
    return register_model(entry)


def _under_our_keys(state_dict: Mapping[str, Any], network: nn.Module) -> dict[str, Tensor]:
    """What a pretrained file holds as weights of ``network``, also if its authors wrote it for their own code."""
    from shiftconv.models.convert.translate import recognise, to_ours  # it imports the networks

    while (key := next((key for key in _WRAPPERS if isinstance(state_dict.get(key), Mapping)), None)) is not None:
        state_dict = state_dict[key]
    return to_ours(recognise(clean_state_dict(dict(state_dict))), network)
