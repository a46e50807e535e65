"""Real images that need no download: the 1797 handwritten digits that come with scikit-learn.

Source: E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(the test part of it, 43 + 13 writers; 8x8 pixels, 17 grey levels).
"""

import numpy as np
import torch
from torch.nn.functional import interpolate

from shiftconv.train.data.images import Normalisation
from shiftconv.train.data.source import Source
from shiftconv.train.data.splits import stratified

SIZE = 32
TEST_SHARE = 0.2
# Mean and standard deviation of the enlarged training images of the default split, the same for the three channels.
NORMALISATION: Normalisation = ((0.3055,) * 3, (0.3235,) * 3)


def load(val_share: float = 0.1) -> Source:
    """The digits as uint8 ``[N, 3, 32, 32]`` in 0..255: with the default share 1259 train, 179 val and 359 test images.

    The 8x8 images are enlarged by bilinear interpolation. The test part is the same for every ``val_share``.

    Raises:
        ModuleNotFoundError: without scikit-learn; says how to install it.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        message = 'the data set digits comes with scikit-learn, which is not installed: pip install "shiftconv[demo]"'
        raise ModuleNotFoundError(message, name="sklearn") from None
    small, labels = load_digits(return_X_y=True)
    small = np.asarray(small).astype(np.uint8).reshape(-1, 8, 8)  # 0..16
    labels = np.asarray(labels).astype(np.int64)
    train, test, val = stratified([image.tobytes() for image in small], labels.tolist(), (TEST_SHARE, val_share))
    images, targets = _enlarge(torch.from_numpy(small)), torch.from_numpy(labels)
    parts = {split: (images[part], targets[part]) for split, part in (("train", train), ("val", val), ("test", test))}
    names = tuple(str(digit) for digit in range(10))
    return Source(parts, names, NORMALISATION, mirrored_looks_real=False)


def _enlarge(small: torch.Tensor) -> torch.Tensor:
    """``[N, 8, 8]`` in 0..16 to ``[N, 3, 32, 32]`` in 0..255. Every step is exact in float64 up to the one rounding."""
    large = interpolate(small[:, None].double(), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (large * 255 / 16 + 0.5).floor().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
