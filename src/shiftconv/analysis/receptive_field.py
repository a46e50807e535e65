"""Effective receptive field: which input pixels move the centre of the last feature map, and by how much.

Definition of Ding et al. 2022 (arXiv:2203.06717, RepLKNet), used by SLaK and ShiftwiseConv; after Luo et al. 2016
(arXiv:1701.04128). With the feature map F before the final norm and head::

    A = sum over n, c of relu(d[sum over c of relu(F[:, c, H//2, W//2])] / dx)        mean over images

A is the mean over images of what the originals' scripts save.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiftconv.analysis.mode import evaluating, home
from shiftconv.names import unknown

Layer = str | nn.Module | Callable[[Tensor], Any]


@dataclass(frozen=True)
class Rectangle:
    """A centred square: ``side`` in pixels, ``area`` as a fraction of the image."""

    side: int
    area: float


@dataclass(frozen=True, eq=False)
class ERF:
    """The mean contribution of each input pixel.

    Attributes:
        matrix: ``[H, W]`` float64 on the CPU, not negative.
        images: how many images are in the mean.
        skipped: how many were left out because the feature map's centre or its gradient was not a finite number.
    """

    matrix: Tensor
    images: int
    skipped: int = 0

    def rectangle(self, threshold: float) -> Rectangle | None:
        """The smallest centred square with more than ``threshold`` of all contributions; None if none has as much.

        As in the originals, contributions are ``log10(matrix + 1)``, sides are odd, from 3 to below the image's.
        Their logarithm leaves matrices below about 0.1 as they are, and flattens larger ones: numbers compare between
        networks only when their gradients are of one scale. The area is of the image's own size, where the originals
        always divided by 1024 pixels.

        Raises:
            ValueError: if ``threshold`` is not between 0 and 1.
        """
        if not 0 < threshold < 1:
            raise ValueError(f"the threshold must be between 0 and 1, got {threshold}")
        height, width = self.matrix.shape
        share = torch.log10(self.matrix + 1)
        total = share.sum()
        integral = nn.functional.pad(share.cumsum(0).cumsum(1), (1, 0, 1, 0))  # [H + 1, W + 1]
        reach = torch.arange(1, max(1, min(height, width) // 2))
        top, bottom = height // 2 - reach, height // 2 + reach + 1
        left, right = width // 2 - reach, width // 2 + reach + 1
        inside = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
        enough = (inside > threshold * total).nonzero()
        if not len(enough):
            return None
        side = 2 * int(reach[enough[0, 0]]) + 1
        return Rectangle(side, side * side / (height * width))

    def plot(self, path: str | Path, title: str | None = None, thresholds: Sequence[float] = (0.5,)) -> Path:
        """Draw the field with the squares of ``thresholds`` to ``path`` (.png, .svg, .pdf); needs matplotlib.

        The file appears whole or not at all.
        """
        from shiftconv.analysis.draw import receptive_fields, save

        return save(receptive_fields({title or "Effective receptive field": self}, thresholds), path)


def erf(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    layer: Layer | None = None,
    stage: int = -1,
    batch_size: int = 8,
) -> ERF:
    """Effective receptive field of the centre of a feature map. The model and its gradients stay as they were.

    Args:
        model: any network; it runs in eval mode, on its own device and in its own precision.
        images: ``[N, C, H, W]``, or batches of it (a loader may also yield ``(images, labels)``), all of one size,
            normalised as the network expects.
        layer: whose output is the feature map: a submodule or its name, or a function of the images. By default the
            last map that timm's ``forward_intermediates`` gives without the final norm, else ``forward_features``.
        stage: which map, where the model or the function gives several.
        batch_size: images in one backward pass; the result does not depend on it.

    Raises:
        TypeError: if the images or the feature map are not floating-point tensors.
        ValueError: if a shape is not as above, there is no image, or no image gives finite numbers.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    total, used, skipped = None, 0, 0
    device, dtype = home(model)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model, frozen=True):
        features = _features(model, layer)
        for batch in _batches(images, batch_size):
            if total is not None and batch.shape[2:] != total.shape:
                raise ValueError(f"images must have one size, got {list(total.shape)} and {list(batch.shape[2:])}")
            scores = _contribution(features, batch.to(device, dtype), stage)
            keep = scores.isfinite().flatten(1).all(1)
            scores = scores[keep].sum(0)
            total = scores if total is None else total + scores
            used, skipped = used + int(keep.sum()), skipped + int((~keep).sum())
    if total is None:
        raise ValueError("images is empty; the receptive field needs at least one image")
    if not used:
        raise ValueError(f"the feature map or its gradient is not finite for any of the {skipped} images")
    return ERF(total / used, used, skipped)


def _batches(images: Tensor | Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    for item in [images] if isinstance(images, Tensor) else images:
        batch = item[0] if isinstance(item, (tuple, list)) and item else item
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            got = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"images must be floating-point tensors [N, C, H, W], got {got}")
        if batch.ndim != 4:
            raise ValueError(f"images must be [N, C, H, W], got {list(batch.shape)}")
        for part in batch.split(batch_size):
            if len(part):
                yield part.detach().clone()


def _contribution(features: Callable[[Tensor], Any], images: Tensor, stage: int) -> Tensor:
    """``[N, H, W]`` float64 on the CPU; images do not mix in eval mode, so one gradient serves the whole batch."""
    images.requires_grad_()
    maps = features(images)
    if isinstance(maps, (tuple, list)):
        if not -len(maps) <= stage < len(maps):
            raise ValueError(f"stage {stage} does not exist; the network gives {len(maps)} feature maps")
        maps = maps[stage]
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        raise TypeError(f"the feature map must be a floating-point tensor, got {type(maps).__name__}; give layer=")
    if maps.ndim != 4 or len(maps) != len(images):
        raise ValueError(
            f"the feature map must be [N, C, H, W] with N = {len(images)}, got {list(maps.shape)}; "
            "give layer=, the submodule or function whose output is one"
        )
    height, width = maps.shape[2:]
    centre = maps[:, :, height // 2, width // 2].relu().sum(1)
    (grad,) = torch.autograd.grad(centre.sum(), images, allow_unused=True) if centre.requires_grad else (None,)
    if grad is None:
        raise ValueError("the feature map does not depend on the images through differentiable operations")
    scores = grad.relu().sum(1).to("cpu", torch.float64)
    # A centre that is not a number spoils its image even where the gradient, as that of a linear layer, does not tell.
    return scores.where(centre.detach().isfinite().cpu()[:, None, None], torch.nan)


def _features(model: nn.Module, layer: Layer | None) -> Callable[[Tensor], Any]:
    if layer is None:
        intermediates = getattr(model, "forward_intermediates", None)
        if callable(intermediates):
            return lambda x: intermediates(x, norm=False, output_fmt="NCHW", intermediates_only=True)
        return getattr(model, "forward_features", model)
    if isinstance(layer, str):
        modules = dict(model.named_modules())
        if layer not in modules:
            raise unknown("layer", layer, (name for name in modules if name))
        layer = modules[layer]
    if isinstance(layer, nn.Module):
        if not any(module is layer for module in model.modules()):
            raise ValueError(f"the given layer, a {type(layer).__name__}, is not a part of the model")
        return _output_of(model, layer)
    if not callable(layer):
        raise TypeError(f"layer must be a submodule, its name or a function, got {type(layer).__name__}")
    return layer


def _output_of(model: nn.Module, layer: nn.Module) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        seen: list[Any] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
            seen.append(output)
            # A later in-place activation must not change what was seen.
            return output.clone() if isinstance(output, Tensor) else output

        handle = layer.register_forward_hook(keep)
        try:
            model(x)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(f"the given layer, a {type(layer).__name__}, did not run in the model's forward pass")
        return seen[-1]

    return run
