"""Reports against counts in numpy."""

import builtins

import numpy as np
import pytest
import torch

from shiftconv.sparse import Schedule, SparseTraining

from .cases import ALWAYS, Fours, Large, actives, calibration, made, sgd, step


@pytest.mark.parametrize("granularity", ["weight", "kernel", "fan_in"])
@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_a_report_counts(granularity, rule):
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.15, "uniform", rule, granularity, ALWAYS)
    ever = {name: mask.numpy().copy() for name, mask in sparse.masks.items()}
    before = {}
    for seed in range(3):
        before = {name: mask.numpy().copy() for name, mask in sparse.masks.items()}
        step(model, optimizer, seed)
        for name, mask in sparse.masks.items():
            ever[name] |= mask.numpy()
    report = sparse.report()
    assert (report.steps, report.updates) == (3, 3)
    alive = {
        m.name: mask
        for (weight, mask) in actives(sparse)
        for g in sparse.groups
        for m in g.members
        if m.weight is weight
    }
    for layer in report.layers:
        mask = sparse.masks[layer.name].numpy()
        assert (layer.entries, layer.active, layer.unreachable) == (mask.size, mask.sum(), 0)
        assert layer.density == mask.sum() / mask.size
        assert layer.explored == pytest.approx(ever[layer.name].sum() / mask.size)
        assert layer.churn == pytest.approx((mask & ~before[layer.name]).sum() / mask.sum())
        weights = alive[layer.name]
        kernels = weights.any(1) if weights.ndim == 2 else weights.any((2, 3))
        assert (layer.dead_kernels, layer.kernels) == ((~kernels).sum(), kernels.size), layer.name
    total = sum(mask.numel() for mask in sparse.masks.values())
    assert report.density == pytest.approx(sparse.active / total)
    assert report.explored == pytest.approx(sum(mask.sum() for mask in ever.values()) / total)


def test_kernels_of_patterns_and_chunks():
    for granularity in ("2:4", "kernel:4", "channel"):
        model = made(Fours)
        density = 0.5
        sparse = SparseTraining(model, sgd(model), density, "uniform", "static", granularity)
        layers = {layer.name: layer for layer in sparse.report().layers}
        if granularity == "2:4":
            kernels = (model[0].weight != 0).flatten(2).any(2).numpy()
            assert (layers["0.weight"].dead_kernels, layers["0.weight"].kernels) == ((~kernels).sum(), 32)
        else:
            mask = sparse.masks["0.weight"].numpy()
            assert layers["0.weight"].dead_kernels == (~mask).sum()


def test_what_cannot_be_reached_is_told_apart():
    model = made(Large)
    sparse = SparseTraining(model, sgd(model), 0.5, calibration=calibration(1, size=4))
    report = sparse.report()
    assert report.density == pytest.approx(0.5, abs=1e-3)
    for group, layer in zip(sparse.groups, report.layers, strict=True):
        assert layer.entries + layer.unreachable == group.size and layer.explored <= 1
    unreachable = sum(layer.unreachable for layer in report.layers)
    assert unreachable and f"{unreachable:,} more that no output can reach" in str(report)


def test_what_it_prints():
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.25, schedule=Schedule(every_steps=2))
    for seed in range(3):
        step(model, optimizer, seed)
    head, *rows, last = str(sparse.report()).splitlines()
    assert head.split() == ["layer", "entries", "active", "density", "explored", "churn", "dead", "kernels"]
    assert len(rows) == 5 and len({len(row) for row in [head, *rows]}) == 1
    assert rows[0].split()[:3] == ["stem.weight", "189", str(int(sparse.masks["stem.weight"].sum()))]
    assert (
        last
        == f"density {sparse.active / 522:.4f}, explored {sparse.report().explored:.4f}, after 1 updates in 3 steps"
    )
    assert max(map(len, str(sparse.report()).splitlines())) <= 120


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_it_draws(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    model = made()
    path = SparseTraining(model, sgd(model), 0.25).report().plot(tmp_path / f"sparsity.{suffix}")
    head = path.read_bytes()[:5]
    assert path == tmp_path / f"sparsity.{suffix}" and head in (b"\x89PNG\r", b"<?xml")
    if suffix == "svg":
        assert "explored" in path.read_text() or path.stat().st_size > 5000


def test_without_matplotlib_it_says_what_brings_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments, **others):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **others)

    model = made()
    report = SparseTraining(model, sgd(model), 0.25).report()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "shiftconv\[demo\]"'):
        report.plot(tmp_path / "x.png")
    assert np.isfinite(report.density) and isinstance(model.fc1.weight, torch.Tensor)
