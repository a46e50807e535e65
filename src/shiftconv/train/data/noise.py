"""Wrong labels on purpose, to study how training stands them."""

from collections.abc import Sequence
from hashlib import sha256


def noisy(keys: Sequence[bytes], labels: Sequence[int], classes: int, share: float) -> list[int]:
    """The labels, a share of them replaced by another class, each as probable as any.

    Which images, and what they get, follows from the SHA-256 of their keys: it depends on no seed and no order.

    Args:
        keys: what identifies each image: its pixels, or its path below the data set's folder.
        labels: class of each image.
        classes: how many there are.
        share: share of the images, in 0..1.

    Raises:
        ValueError: if there is no other class.
    """
    if share > 0 and classes < 2:
        raise ValueError(f"data.label_noise needs at least 2 classes, but there is {classes}")
    digests = [sha256(b"label noise " + key).digest() for key in keys]
    chosen = sorted(range(len(keys)), key=digests.__getitem__)[: round(share * len(keys))]
    changed = list(labels)
    for index in chosen:
        step = 1 + int.from_bytes(digests[index][-8:]) % (classes - 1)
        changed[index] = (changed[index] + step) % classes
    return changed
