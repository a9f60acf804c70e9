"""The reference with momentum: its log-probs, and what of the configuration contradicts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.config import Config
from mlxpref.config_layers import load_config
from mlxpref.errors import AdapterError, ConfigError
from mlxpref.facts import check_start
from mlxpref.momentum import momentum_logps


def rows(seed: int, shift: float = 0.0) -> list[list[np.ndarray]]:
    """Two rows of 2 and 3 responses of different lengths, nats."""
    rng = np.random.default_rng(seed)
    lengths = [(4, 2), (1, 3, 6)]
    return [[(shift - rng.exponential(2, n)).astype(np.float32) for n in some] for some in lengths]


def test_without_momentum_it_is_the_plain_reference() -> None:
    current = rows(0)
    found = momentum_logps(current, rows(1), 0.0)
    for row, expected in zip(found, current, strict=True):
        for values, plain in zip(row, expected, strict=True):
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, plain)


def test_tokens_go_on_by_alpha_of_the_last_step() -> None:
    """Exact: the sum in float32 of numbers near 1000 would lose what the step changed."""
    current = [[np.array([-1000.0, -1.0], np.float32)]]
    previous = [[np.array([-1000.0 - 2**-10, -3.0], np.float32)]]
    ((found,),) = momentum_logps(current, previous, 0.5)
    np.testing.assert_array_equal(found, np.array([-1000.0 + 2**-11, 0.0], np.float32))
    assert momentum_logps(rows(0), rows(0), 0.7)[1][2] == pytest.approx(rows(0)[1][2], rel=1e-6)


def test_the_margin_of_the_new_reference_is_carried_on() -> None:
    """What dpo reads: the sums of a pair's responses, whose difference moves by (1 + α) and −α."""
    current, previous = rows(0), rows(1)
    margins = [sum(row[0][0].tolist()) - sum(row[0][1].tolist()) for row in (current, previous)]
    ((chosen, rejected), _) = momentum_logps(current, previous, 0.3)
    assert float(chosen.sum() - rejected.sum()) == pytest.approx(1.3 * margins[0] - 0.3 * margins[1], rel=1e-5)


def test_other_rows_are_not_combined() -> None:
    with pytest.raises(ValueError, match="row 0: responses of"):
        momentum_logps([[np.zeros(3)]], [[np.zeros(2)]], 0.3)
    with pytest.raises(ValueError, match="shorter"):
        momentum_logps(rows(0), rows(0)[:1], 0.3)


# --- configuration -----------------------------------------------------------------------------


def load(**sections: Any) -> Config:
    return load_config(base={"model": {"path": "m"}, "data": {"source": "d"}, **sections})


def test_both_keys_and_an_adapter_to_start_from() -> None:
    config = load(adapter={"init_from": "b"}, reference={"previous": "a", "momentum": "3e-1"})
    assert (config.reference.previous, config.reference.momentum) == ("a", 0.3)
    assert load().reference.previous is None and load().reference.momentum is None


@pytest.mark.parametrize(
    ("adapter", "reference", "says"),
    [
        ({"init_from": "b"}, {"previous": "a"}, "reference.previous without reference.momentum"),
        ({}, {"momentum": 0.3}, "without adapter.init_from"),
        ({}, {"previous": "a", "momentum": 0.3}, "without adapter.init_from"),
        ({"init_from": "b"}, {"previous": "a", "momentum": -0.3}, "reference.momentum"),
        ({"init_from": "b"}, {"previous": "a", "momentum": ".inf"}, "reference.momentum"),
    ],
)
def test_contradictions_are_said(adapter: dict[str, Any], reference: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(adapter=adapter, reference=reference)


def test_a_broken_previous_adapter_is_found_before_data_are_read(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Hours of reference log-probs may lie before its turn."""
    (tmp_path / "b").mkdir()
    config = load(
        model={"path": str(tiny_model_dir)},
        adapter={"init_from": str(tmp_path / "b")},
        reference={"previous": str(tmp_path / "a"), "momentum": 0.3},
    )
    with pytest.raises(AdapterError, match=r"adapter\.init_from .*no adapter_config\.json"):
        check_start(config)
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "b" / "adapters.safetensors")
    (tmp_path / "b" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"reference\.previous .*no such folder"):
        check_start(config)


@pytest.mark.parametrize("trained, now", [(True, False), (False, True)])
def test_an_adapter_goes_on_over_the_base_it_was_trained_on(
    trained: bool, now: bool, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Four bits of each weight are another model: its log-probs would be the reference's without a word."""
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "adapters.safetensors")
    facts = json.dumps({"mlxpref": {"model": {"load_in_4bit": trained}}})
    (tmp_path / "adapter_config.json").write_text(facts)
    for bits in (trained, now):
        config = load(
            model={"path": str(tiny_model_dir), "load_in_4bit": bits}, adapter={"init_from": str(tmp_path)}
        )
        if bits == trained:
            check_start(config)
            continue
        with pytest.raises(ConfigError, match=f"set model.load_in_4bit: {str(trained).lower()}"):
            check_start(config)
