"""Schedules against transformers' own, and the ends by hand."""

from __future__ import annotations

import math

import pytest

from mlxpref.errors import ConfigError
from mlxpref.schedules import make_schedule, n_warmup


def test_warmup_rises_linearly_from_zero_and_meets_the_rate() -> None:
    rate = make_schedule("constant", learning_rate=2e-5, n_steps=100, warmup=10)
    assert rate(0) == 0.0
    assert rate(5) == pytest.approx(1e-5)
    assert [rate(step) for step in (10, 50, 99)] == [2e-5] * 3


def test_cosine_is_halfway_down_in_the_middle_and_ends_at_end() -> None:
    rate = make_schedule("cosine", learning_rate=1.0, n_steps=110, warmup=10, end=0.2)
    assert rate(10) == 1.0
    assert rate(60) == pytest.approx(0.6)
    assert rate(35) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(110) == pytest.approx(0.2)


def test_linear_falls_by_the_same_amount_every_step() -> None:
    rate = make_schedule("linear", learning_rate=1.0, n_steps=10, end=0.5)
    falls = [rate(step) - rate(step + 1) for step in range(10)]
    assert falls == pytest.approx([0.05] * 10)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_equals_transformers(name: str) -> None:
    """Finds an off-by-one in warm-up or decay: runs under TRL and here would have other rates."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=7, num_training_steps=40)
    ours = make_schedule(name, learning_rate=3e-4, n_steps=40, warmup=7)
    for step in range(40):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-18)
        optimizer.step()
        theirs.step()


def test_warmup_ratio_rounds_up_and_a_warmup_as_long_as_the_run_is_refused() -> None:
    assert n_warmup(101, warmup_ratio=0.1) == 11
    assert n_warmup(100) == 0
    assert n_warmup(100, warmup_steps=3) == 3
    with pytest.raises(ConfigError, match="never reaches"):
        n_warmup(5, warmup_steps=5)


def test_unknown_schedule_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="constant, linear, cosine"):
        make_schedule("step", learning_rate=1.0, n_steps=1)
