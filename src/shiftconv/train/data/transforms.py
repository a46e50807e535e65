"""From a picture to what a network sees, as the settings say, by timm."""

from collections.abc import Callable
from itertools import chain
from typing import Any

from PIL.Image import Image
from timm.data import create_transform  # pyright: ignore[reportPrivateImportUsage]
from timm.data.auto_augment import (
    AugMixAugment,
    AutoAugment,
    RandAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor
from torchvision.transforms import Compose

from shiftconv.train.data.pixels import Look, Normalisation
from shiftconv.train.settings import Data

NORMALISATIONS: dict[str, Normalisation] = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "inception": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
}
WHOLE_FROM = 384  # from this size on a crop share of 1 means the whole image, as in Liu et al. 2022 (ConvNeXt)


def to_train(data: Data, size: int) -> Look:
    """Random resized crops ``[3, size, size]``, mirrored, changed in colour and erased as the settings say.

    Raises:
        ValueError: for an automatic augmentation that timm does not know.
    """
    mean, std = NORMALISATIONS[data.mean]
    if data.auto_augment is not None:
        automatic(data.auto_augment, size, mean)  # for its message
    transform: Any = create_transform(
        size,
        is_training=True,
        mean=mean,
        hflip=0.0 if data.flip is False else 0.5,
        interpolation=data.interpolation,
        color_jitter=data.color_jitter or None,  # pyright: ignore[reportArgumentType] - none is timm's word for none
        auto_augment=data.auto_augment,
        normalize=False,
    )
    for part in transform.transforms:
        _mend(part)
    return Look(_pictures(transform), (mean, std), eraser(data))


def to_evaluate(data: Data, size: int) -> Look:
    """The centre ``[3, size, size]`` of the image, its shorter side resized to ``size / crop_share`` before.

    From 384 pixels on a crop share of 1 resizes the whole image to the square, whatever its shape.
    """
    mean, std = NORMALISATIONS[data.mean]
    mode = "squash" if size >= WHOLE_FROM and data.crop_share == 1 else "center"
    transform = create_transform(
        size, interpolation="bicubic", crop_pct=data.crop_share, crop_mode=mode, normalize=False
    )
    return Look(_pictures(transform), (mean, std))


def _pictures(transform: Any) -> Callable[[Image], Image]:
    """Timm's transform without its last step, which makes a tensor of a picture."""
    *parts, last = transform.transforms
    assert isinstance(last, MaybePILToTensor)
    return Compose(parts)


def automatic(text: str, size: int, mean: tuple[float, ...]) -> Callable[[Image], Image]:
    """RandAugment and its like from timm's text, for images of this size and mean (of values in 0..1).

    Raises:
        ValueError: for a text that timm does not know.
    """
    hints: dict[str, Any] = dict(translate_const=int(size * 0.45), img_mean=tuple(round(255 * x) for x in mean))
    make = auto_augment_transform
    if text.startswith("rand"):
        make = rand_augment_transform
    elif text.startswith("augmix"):
        make, hints["translate_pct"] = augment_and_mix_transform, 0.3
    try:
        return _mend(make(text, hints))
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data.auto_augment {text!r} is not one of timm's ({reason}); write, say, rand-m9-mstd0.5-inc1, "
            "augmix-m3-w3 or original"
        ) from None


def _mend(part: Any) -> Any:
    """Let posterising to no bits at all give black, which timm's strongest does and newer Pillows refuse."""
    layers: list[Any] = []
    if isinstance(part, RandAugment | AugMixAugment):
        layers = [part.ops]
    elif isinstance(part, AutoAugment):
        layers = part.policy
    for op in chain.from_iterable(layers):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize
    return part


def _posterize(image: Image, bits_to_keep: int, **_: Any) -> Image:
    if bits_to_keep >= 1:
        return posterize(image, bits_to_keep)
    return image.point([0] * 256 * len(image.getbands()))


def eraser(data: Data) -> RandomErasing | None:
    """What erases a rectangle of normalised images ``[3, H, W]`` in place, or none."""
    if data.erase_prob == 0:
        return None
    return RandomErasing(data.erase_prob, mode=data.erase_mode, max_count=data.erase_count, device="cpu")
