"""Schedules against formulas of their own."""

import itertools
import math

import pytest

from shiftconv.sparse import Schedule


def test_updates_are_due_at_multiples_between_start_and_stop():
    schedule = Schedule(every_steps=3, steps=40, warmup_steps=6, stop_fraction=0.5)
    assert [step for step in range(1, 60) if schedule.is_due(step)] == [9, 12, 15, 18]
    assert [step for step in range(1, 20) if Schedule(every_steps=7).is_due(step)] == [7, 14]
    assert [step for step in range(1, 5) if Schedule(every_steps=1, steps=4, stop_fraction=1.0).is_due(step)] == [
        1,
        2,
        3,
        4,
    ]
    assert not any(Schedule(every_steps=1, steps=4, stop_fraction=0.0).is_due(step) for step in range(1, 9))


def test_random_times_are_as_many_on_average_and_the_same_again():
    schedule = Schedule(every_steps=5, timing="random", steps=8000, warmup_steps=2000, stop_fraction=0.75)
    due = [step for step in range(1, 8001) if schedule.is_due(step)]
    assert due == [step for step in range(1, 8001) if schedule.is_due(step)]
    assert due[0] > 2000 and due[-1] <= 6000
    assert abs(len(due) - 800) < 4 * math.sqrt(4000 * 0.2 * 0.8)  # four deviations
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert abs(gaps.count(1) - 0.2 * len(gaps)) < 4 * math.sqrt(len(gaps) * 0.16)
    other = Schedule(every_steps=5, timing="random", seed=1)
    assert [step for step in range(2001, 6001) if other.is_due(step)] != due


def test_the_fraction_decays():
    cosine = Schedule(prune_fraction=0.4, steps=50, final_fraction=0.1)
    linear = Schedule(prune_fraction=0.4, steps=50, decay="linear")
    constant = Schedule(prune_fraction=0.4, steps=50, decay="constant")
    for step in (0, 1, 13, 25, 50, 70):
        done = min(step, 50) / 50
        assert cosine.fraction(step) == pytest.approx(0.1 + 0.15 * (1 + math.cos(math.pi * done)), abs=1e-12)
        assert linear.fraction(step) == pytest.approx(0.4 * (1 - done), abs=1e-12)
        assert constant.fraction(step) == 0.4
    assert Schedule(prune_fraction=0.4).fraction(10**6) == 0.4


def test_the_density_falls_cubically():
    schedule = Schedule(start_density=0.9, density_steps=(10, 30))
    for step, expected in ((0, 0.9), (10, 0.9), (20, 0.2 + 0.7 / 8), (25, 0.2 + 0.7 / 64), (30, 0.2), (99, 0.2)):
        assert schedule.density(step, 0.2) == pytest.approx(expected, abs=1e-12)
    assert Schedule().density(5, 0.3) == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(every_steps=0), "every_steps must be a whole number of at least 1, got 0"),
        (dict(every_steps=1.5), "every_steps must be a whole number of at least 1, got 1.5"),
        (dict(every_steps=True), "every_steps must be a whole number of at least 1, got True"),
        (dict(warmup_steps=-1), "warmup_steps must be a whole number of at least 0, got -1"),
        (dict(share_every=0), "share_every must be a whole number of at least 1, got 0"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(prune_fraction=1.1), r"prune_fraction must be in \[0, 1\], got 1.1"),
        (dict(prune_fraction=math.nan), r"prune_fraction must be in \[0, 1\], got nan"),
        (dict(final_fraction=-0.1), r"final_fraction must be in \[0, 1\], got -0.1"),
        (dict(stop_fraction=2), r"stop_fraction must be in \[0, 1\], got 2"),
        (dict(decay="cosin"), "unknown decay 'cosin'; did you mean 'cosine'"),
        (dict(timing="randomly"), "unknown timing 'randomly'; did you mean 'random'"),
        (dict(start_density=0.0, density_steps=(0, 1)), r"start_density must be in \(0, 1\], got 0.0"),
        (dict(start_density=math.nan, density_steps=(0, 1)), r"start_density must be in \(0, 1\], got nan"),
        (dict(start_density=1.0), r"density_steps must be \(first, last\) with 0 <= first < last, got \(0, 0\)"),
        (dict(start_density=1.0, density_steps=(5, 3)), "got \\(5, 3\\)"),
    ],
)
def test_values_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)
