import random

import numpy as np
import torch

from shiftconv.train.seed import Stream, derive, seeded


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002 - the generator under test


def test_streams_differ():
    seeds = [derive(seed, stream, epoch) for seed in (0, 1) for stream in Stream for epoch in (0, 1)]
    assert len(set(seeds)) == len(seeds)


def test_seeded_repeats_and_leaves_no_trace():
    with seeded(1):
        before = draw()
        with seeded(7):
            first = draw()
        after = draw()
    with seeded(1):
        assert draw() == before
        assert draw() == after
    with seeded(7):
        assert draw() == first
