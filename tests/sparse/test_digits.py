"""Connections that move find what fixed ones miss: digits with 1 % of the weights of a small network.

The setting and its figures for all rules and eight seeds are those of ``benchmarks/sparse_digits.py``.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from shiftconv.sparse import Schedule, SparseTraining

EPOCHS, BATCH, DENSITY, SEEDS = 100, 64, 0.01, (0, 1)


def accuracy(data, rule, seed):
    images, test_images, labels, test_labels = data
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    schedule = Schedule(every_steps=20, prune_fraction=0.3, steps=EPOCHS * -(-len(images) // BATCH), seed=seed)
    sparse = SparseTraining(net, optimizer, DENSITY, allocate="erk", rule=rule, schedule=schedule)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for picks in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(images[picks]), labels[picks]).backward()
            optimizer.step()
    assert sparse.steps == schedule.steps
    assert sparse.active == 222 >= sum(int(layer.weight.count_nonzero()) for layer in (net[0], net[2]))
    return (net(test_images).argmax(1) == test_labels).double().mean().item()


def test_rigl_learns_what_fixed_masks_cannot():
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.25, stratify=labels, random_state=0)
    data = [torch.tensor(part, dtype=torch.float32 if part.ndim > 1 else torch.int64) for part in parts]
    static, rigl = (sum(accuracy(data, rule, seed) for seed in SEEDS) / len(SEEDS) for rule in ("static", "rigl"))
    assert rigl >= static + 0.2, f"static {static:.3f}, rigl {rigl:.3f}"
