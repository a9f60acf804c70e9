"""Dropout, half-width types, weights and clipping: what float32 tests without them cannot see."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.data.batching import collate, collate_step
from mlxpref.data.plan import plan_pass, plan_steps
from mlxpref.errors import ConfigError, ModelError
from mlxpref.records import Batch, Tokenized
from tests.test_mlx_step import LORA, Plain, dpo, masters, reference_of, rows_of

pytestmark = pytest.mark.mlx


def load(path: Path, **options: Any) -> Any:
    from mlxpref import mlx_backend

    return mlx_backend.load_policy(str(path), **{"num_layers": 2, "lora_parameters": LORA, **options})


def jittered(policy: Any, size: float = 0.05) -> Any:
    import mlx.core as mx

    mx.random.seed(3)
    policy.set_masters({n: v + size * mx.random.normal(v.shape) for n, v in policy.masters.items()})
    return policy


def one_batch(policy: Any, rows: list[Tokenized], *, budget: int = 10_000) -> Batch:
    plan = plan_steps(
        rows, batch_size=len(rows), iters=1, micro_batch_tokens=budget, share_prompts=policy.share_prompts
    )
    return collate_step(rows, plan.steps[0], reference_of(policy, rows))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("keys", [["self_attn.q_proj", "mlp.up_proj"], ["self_attn.q_proj", "lm_head"]])
def test_recomputation_draws_the_same_dropout(tiny_model_dir: Path, keys: list[str], checkpoint: bool) -> None:
    """A backward pass that draws its own dropout gives the slope of another loss than the one reported."""
    from mlxpref import mlx_backend

    lora = {"rank": 4, "scale": 2.0, "dropout": 0.5, "keys": keys}
    policy = jittered(load(tiny_model_dir, lora_parameters=lora, grad_checkpoint=checkpoint))
    batch = one_batch(policy, rows_of(6))
    here = dict(policy.masters)

    def loss_at(masters: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """Loss under one fixed draw, and where a plain gradient step of rate 1 leads."""
        policy.set_masters(masters)
        step = mlx_backend.make_step(policy, dpo, optimizer="sgd", max_grad_norm=None, seed=4)
        report = step(batch, 1.0)
        return report.loss, dict(policy.masters)

    _, moved = loss_at(here)
    gradient = {n: here[n] - moved[n] for n in here}
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradient.values()))
    size = 1e-2 / norm
    up, _ = loss_at({n: here[n] + size * gradient[n] for n in here})
    down, _ = loss_at({n: here[n] - size * gradient[n] for n in here})
    assert (up - down) / (2 * size) == pytest.approx(norm**2, rel=3e-2)


def test_micro_batches_draw_different_dropout(tiny_model_dir: Path) -> None:
    """One key for all micro-batches would drop the same units for every example."""
    from mlxpref import mlx_backend

    policy = jittered(load(tiny_model_dir, lora_parameters={**LORA, "dropout": 0.5}))
    row = rows_of(1)[0]
    report = mlx_backend.make_step(policy, dpo)(one_batch(policy, [row, row], budget=1), 0.0)
    assert abs(report.losses[0] - report.losses[1]) > 1e-4


def test_the_seed_decides_dropout(tiny_model_dir: Path) -> None:
    from mlxpref import mlx_backend

    policy = jittered(load(tiny_model_dir, lora_parameters={**LORA, "dropout": 0.5}))
    batch = one_batch(policy, rows_of(4))
    losses = [mlx_backend.make_step(policy, dpo, seed=seed)(batch, 0.0).loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_log_probs_know_no_dropout(tiny_model_dir: Path) -> None:
    """A reference computed with dropout on is another one each time."""
    from mlxpref import mlx_backend

    policy = jittered(load(tiny_model_dir, lora_parameters={**LORA, "dropout": 0.5}))
    policy.model.train()
    rows = rows_of(3)
    (part,) = plan_pass(rows).steps[0]
    batch = collate(rows, part)
    first, second = (mlx_backend.token_logps(policy, batch) for _ in range(2))
    assert np.array_equal(first.tokens, second.tokens)
    assert first.lengths.tolist() == [[len(ids) for ids in rows[i].response_ids] for i in part.rows]


def test_example_weights_reach_the_loss(tiny_model_dir: Path) -> None:
    """Weight 2 is the example twice; weight 0 is the example left out."""
    from mlxpref import mlx_backend

    rows = rows_of(3)
    results = []
    for weights, chosen in (([2.0, 1.0, 0.0], rows), ([1.0, 1.0, 1.0], [rows[0], rows[0], rows[1]])):
        policy = jittered(load(tiny_model_dir))
        batch = one_batch(policy, chosen)
        order = [index for part in batch.rows for index in part]
        given = np.array([weights[index] for index in order], np.float32)
        batch = batch._replace(parts=(batch.parts[0]._replace(weights=given),))
        report = mlx_backend.make_step(policy, dpo, optimizer="sgd", max_grad_norm=None)(batch, 0.1)
        results.append((report.loss, masters(policy)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, value in results[0][1].items():
        np.testing.assert_allclose(value, results[1][1][name], atol=1e-6)


def test_clipping_only_shortens(tiny_model_dir: Path) -> None:
    """A limit above the norm changes nothing; one below it gives exactly that norm."""
    from mlxpref import mlx_backend

    moved = {}
    for limit in (None, 1e6, 1e-3):
        policy = jittered(load(tiny_model_dir))
        before = masters(policy)
        batch = one_batch(policy, rows_of(4))
        mlx_backend.make_step(policy, dpo, optimizer="sgd", max_grad_norm=limit)(batch, 1.0)
        moved[limit] = np.concatenate([(value - before[n]).ravel() for n, value in masters(policy).items()])
    assert np.array_equal(moved[None], moved[1e6])
    assert np.linalg.norm(moved[1e-3]) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_is_skipped(tiny_model_dir: Path) -> None:
    """Gradients may be finite where the loss is not."""
    import mlx.core as mx

    from mlxpref import mlx_backend

    policy = load(tiny_model_dir)
    before = masters(policy)
    step = mlx_backend.make_step(policy, Plain(lambda columns: dpo(columns) + mx.array(float("inf"))))
    assert step(one_batch(policy, rows_of(4)), 1e-2).skipped
    assert all(np.array_equal(before[name], value) for name, value in masters(policy).items())


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_half_width_models_train_with_float32_masters(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """At a learning rate of 1e-5 an update vanishes in bfloat16."""
    import mlx.core as mx

    from mlxpref import mlx_backend

    policy = load(tiny_model_dir, dtype="bfloat16", fine_tune_type=kind, grad_checkpoint=kind == "lora")
    before = masters(policy)
    batch = one_batch(policy, rows_of(4))
    step = mlx_backend.make_step(policy, dpo)
    first = step(batch, 1e-5)
    assert first.loss == pytest.approx(math.log(2), abs=1e-6 if kind != "dora" else 2e-2)
    for _ in range(3):
        step(batch, 1e-5)
    assert all(value.dtype == mx.float32 for value in policy.masters.values())
    moved = [np.abs(value - before[name]).max() for name, value in masters(policy).items()]
    assert max(moved) > 1e-5
    mlx_backend.save_adapter(policy, tmp_path, extra={})
    saved = mx.load(str(tmp_path / "adapters.safetensors"))
    if kind != "full":
        assert all(np.array_equal(np.array(saved[n]), value) for n, value in masters(policy).items())


def test_half_width_log_probs_are_reduced_in_float32(tiny_model_dir: Path) -> None:
    """A log-softmax in bfloat16 is off by tenths of a nat a token."""
    import mlx.core as mx

    from mlxpref import mlx_backend

    policy = load(tiny_model_dir, dtype="bfloat16", trainable=False)
    row = rows_of(1)[0]
    (part,) = plan_pass([row], share_prompts=False).steps[0]
    found = mlx_backend.token_logps(policy, collate([row], part)).tokens[0, 0]
    ids = np.concatenate([row.prompt_ids, row.response_ids[0]])
    logits = np.array(policy.model(mx.array(ids[None, :-1]))[0].astype(mx.float32), np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = logps[np.arange(len(ids) - 1), ids[1:]][len(row.prompt_ids) - 1 :]
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-4)


def test_the_probe_looks_at_gradients(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared prompt that gets no gradient gives the right loss and the wrong update."""
    import mlx.core as mx

    from mlxpref.mlx_backend import prefix

    with monkeypatch.context() as patch:
        serving = prefix.PrefixKV.serving
        patch.setattr(
            prefix.PrefixKV, "serving", lambda self, a, n: serving(self, [mx.stop_gradient(x) for x in a], n)
        )
        assert load(tiny_model_dir).way == "plain"
    with monkeypatch.context() as patch:
        patch.setattr(prefix.PrefixKV, "given", lambda self: [])
        patch.setattr(prefix.PrefixKV, "with_given", lambda self, arrays: self)
        with pytest.raises(ModelError, match="gradient checkpointing is not exact"):
            load(tiny_model_dir, grad_checkpoint=True)


def test_nothing_to_train_is_refused(tiny_model_dir: Path) -> None:
    """mlx-lm takes 0 layers for all of them."""
    with pytest.raises(ConfigError, match="num_layers 0 trains nothing"):
        load(tiny_model_dir, num_layers=0)


def test_memory_does_not_grow_with_the_vocabulary_times_tokens(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Three times the tokens are 400 MB more of logits: a head, frozen or training, must not hold them."""
    import mlx.core as mx

    from mlxpref import mlx_backend
    from tests.architectures import QUANTISABLE, write_model

    config = {**QUANTISABLE, "vocab_size": 50_000, "num_hidden_layers": 1}
    path = write_model(tmp_path / "wide", config, tiny_model_dir, gain=1.0)
    draw = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return draw.integers(3, 50_000, n).astype(np.int32)

    def peak(n: int, **options: Any) -> float:
        """MB above what is held at rest, of a step that has been traced before."""
        policy = load(path, num_layers=1, **options)
        rows = [Tokenized(ids(9), (ids(128), ids(128)), example_id=str(i)) for i in range(n)]
        batch, step = one_batch(policy, rows), mlx_backend.make_step(policy, dpo)
        step(batch, 1e-3)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step(batch, 1e-3)
        return (mx.get_peak_memory() - before) / 1e6

    for options in ({}, {"lora_parameters": {**LORA, "keys": ["self_attn.q_proj", "lm_head"]}}):
        few, many = peak(4, **options), peak(12, **options)
        logits = (12 - 4) * 256 * 50_000 * 4 / 1e6
        assert many - few < 0.4 * logits, f"{few:.0f} MB grew to {many:.0f} MB; the logits grew by {logits:.0f} MB"


@pytest.mark.parametrize("coupled", [False, True])
def test_gradients_of_many_micro_batches_are_not_kept(tiny_model_dir: Path, coupled: bool) -> None:
    """A sum of gradients for each micro-batch, alive until the last: a full fine-tune in 16 parts does not fit."""
    import mlx.core as mx

    from mlxpref import mlx_backend

    policy = load(tiny_model_dir, lora_parameters={"rank": 512, "scale": 2.0})
    step = mlx_backend.make_step(policy, replace(dpo, coupled=coupled))
    ids = np.arange(3, 9, dtype=np.int32)

    def peak(n: int) -> float:
        """In gradients, above what is held at rest; of a step that has been traced before."""
        rows = [Tokenized(ids, (ids, ids), example_id=str(i)) for i in range(n)]
        batch = one_batch(policy, rows, budget=1)
        assert len(batch.parts) == n
        step(batch, 1e-3)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step(batch, 1e-3)
        return (mx.get_peak_memory() - before) / (4 * policy.n_trainable)

    assert peak(16) < peak(4) + 1
