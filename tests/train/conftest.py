from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shiftconv.train.loop import train
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Optim


def make_pictures(folder: Path, classes=("cat", "dog"), count=8, size=16) -> Path:
    """PNGs of noise; each class has its own colour, so a network can learn them."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., number % 3] += 120
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=12)


@pytest.fixture(scope="session")
def recipe(pictures) -> Recipe:
    """Three epochs of three steps: about a second."""
    return Recipe(
        model="shiftresnet20",
        model_args={"expansion": 1},
        data=Data(name="folder", folder=str(pictures), image_size=16, workers=0),
        epochs=3,
        batch_size=8,
        optim=Optim(lr=0.02, warmup_epochs=1),
        tensorboard=False,
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory, recipe):
    """An uninterrupted run of the recipe and what it told."""
    events = []
    return train(recipe, tmp_path_factory.mktemp("whole") / "run", device="cpu", progress=events.append), events
