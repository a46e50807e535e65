"""The network of a run, tried before anything is written."""

from typing import Any

import torch
from torch import Tensor, nn

from shiftconv.analysis.mode import evaluating
from shiftconv.train.device import autocast
from shiftconv.train.recipe import Recipe
from shiftconv.train.seed import seeded


def create_network(recipe: Recipe, model_args: dict[str, Any]) -> nn.Module:
    """The untrained network of a recipe; its weights come from torch's global generator."""
    from shiftconv.models import create_model

    return create_model(recipe.model, **model_args)


def model_args(recipe: Recipe, classes: int) -> dict[str, Any]:
    """The recipe's arguments and the number of classes of the data.

    Raises:
        ValueError: if the recipe asks for another number of classes.
    """
    asked = recipe.model_args.get("num_classes", classes)
    if asked != classes:
        raise ValueError(f"model_args.num_classes is {asked}, but the data {recipe.data.name} has {classes} classes")
    return {**recipe.model_args, "num_classes": classes}


def try_network(model: nn.Module, recipe: Recipe, image_size: int, classes: int, device: torch.device) -> None:
    """Let the network look at one black image; neither it nor a random generator changes.

    Raises:
        ValueError: if it cannot take images of the data's size, or gives something else than logits ``[1, classes]``.
    """
    images = torch.zeros(1, 3, image_size, image_size, device=device)
    if recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    try:
        with seeded(0, device), evaluating(model), torch.no_grad(), autocast(recipe.amp, device):
            logits = model(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"the network {recipe.model} cannot take an image of shape {list(images.shape)}: {reason}"
        raise ValueError(message) from error
    came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if came != [1, classes]:
        raise ValueError(f"the network {recipe.model} must give logits {[1, classes]} for one image, but gave {came}")
