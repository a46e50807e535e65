"""The network of a run, tried before anything is written."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiftconv.analysis.mode import evaluating
from shiftconv.train.device import Compute
from shiftconv.train.recipe import Recipe
from shiftconv.train.seed import seeded


def create_network(recipe: Recipe, model_args: dict[str, Any]) -> nn.Module:
    """The network of a recipe; weights that come from no file come from torch's global generator.

    Raises:
        ValueError: if the file of ``recipe.weights`` does not fit.
        FileNotFoundError: if it is not there.
    """
    from shiftconv.models import create_model

    network = create_model(recipe.model, **model_args)
    if recipe.head_scale != 1:
        with torch.no_grad():
            for parameter in _head(network).parameters():
                parameter.mul_(recipe.head_scale)
    if recipe.weights is not None:
        _start_from(network, Path(recipe.weights))
    return network


def _start_from(network: nn.Module, path: Path) -> None:
    """Load the weights of a file; the head stays as it is if the file's has other classes."""
    from shiftconv.models.convert import load_checkpoint

    try:
        load_checkpoint(network, path)
        return
    except ValueError as error:
        misfit = error
    try:
        found = load_checkpoint(None, path).state_dict()
    except (ValueError, TypeError):
        raise misfit from None
    head = {id(value) for value in _head(network).parameters()}
    own = network.state_dict(keep_vars=True)
    kept = {name for name, value in own.items() if id(value) in head}
    if own.keys() != found.keys() or any(own[name].shape != found[name].shape for name in own.keys() - kept):
        raise misfit
    network.load_state_dict({name: own[name] if name in kept else found[name] for name in own})


def _head(network: nn.Module) -> nn.Module:
    get = getattr(network, "get_classifier", None)  # of timm's networks
    head = get() if get is not None else None
    return head if isinstance(head, nn.Module) else nn.Identity()


def model_args(recipe: Recipe, classes: int) -> dict[str, Any]:
    """The recipe's arguments and the number of classes of the data.

    Raises:
        ValueError: if the recipe asks for another number of classes.
    """
    asked = recipe.model_args.get("num_classes", classes)
    if asked != classes:
        raise ValueError(f"model_args.num_classes is {asked}, but the data {recipe.data.name} has {classes} classes")
    return {**recipe.model_args, "num_classes": classes}


def try_network(model: nn.Module, name: str, image_size: int, classes: int, compute: Compute) -> None:
    """Let the network look at one black image; neither it nor a random generator changes.

    Raises:
        ValueError: if it cannot take images of the data's size, or gives something else than logits ``[1, classes]``.
    """
    images = compute.move(torch.zeros(1, 3, image_size, image_size))
    try:
        with seeded(0, compute.device), evaluating(model), torch.no_grad(), compute.autocast():
            logits = model(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"the network {name} cannot take an image of shape {list(images.shape)}: {reason}"
        raise ValueError(message) from error
    came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if came != [1, classes]:
        raise ValueError(f"the network {name} must give logits {[1, classes]} for one image, but gave {came}")
