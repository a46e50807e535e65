"""Cutting a data set into parts: stratified, and fixed by what each image is, not by its place in a list."""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np


def stratified(keys: Sequence[bytes], labels: Sequence[int], shares: Sequence[float]) -> list[list[int]]:
    """Cut parts off a data set so that every class has (nearly) its share in each part.

    Within a class the images are ordered by the SHA-256 of their keys; the first ones go to the first part and so on.
    So the split needs no random numbers and stays the same in whatever order or library version the images come.

    Args:
        keys: what identifies each image: its pixels, or its path below the data set's folder.
        labels: class of each image.
        shares: share of each part to cut off, in 0..1, summing to less than 1. Each share above 0 gets at least one
            image per class.

    Returns:
        Indices of the remainder, then of each part; each list ascends.

    Raises:
        ValueError: if a class has too few images to give one to every part.
    """
    classes = np.asarray(labels)
    digests = [sha256(key).digest() for key in keys]
    parts: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    for label in np.unique(classes):
        order = sorted(np.flatnonzero(classes == label).tolist(), key=lambda index: (digests[index], index))
        counts = [max(1, round(share * len(order))) if share > 0 else 0 for share in shares]
        if sum(counts) >= len(order):
            raise ValueError(f"class number {label} has {len(order)} images, too few to put {sum(counts)} aside")
        start = 0
        for part, count in zip(parts[1:], counts, strict=True):
            part += order[start : start + count]
            start += count
        parts[0] += order[start:]
    return [sorted(part) for part in parts]
