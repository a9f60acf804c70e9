"""What the PyTorch room says beside log-probs, and references that move or were there before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.errors import ConfigError, ModelError
from mlxpref.objectives import resolve_objective
from tests.test_mlx_objectives import asked_for, log_softmax, rows_with_everything
from tests.test_mlx_step import LORA
from tests.test_torch_step import batch_of, dpo_batch, load, make_step, policy, update_of
from tests.torch_models import whole_logits

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

__all__ = ["policy"]  # a fixture


# --- what a model says beside log-probs --------------------------------------------------------


@pytest.mark.parametrize("size", [1e3, 64e6])
def test_overlap_and_token_kl_are_those_of_the_whole_distributions(
    policy: Any, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finds: a reference that is the policy, a KL the wrong way round, chunks joined wrongly, leads that count."""
    import torch

    from mlxpref.torch_backend import logps
    from mlxpref.torch_backend.arrays import to_torch
    from mlxpref.torch_backend.reading import hidden_rows

    monkeypatch.setattr(logps, "CHUNK_BYTES", size)
    objective = resolve_objective([{"name": "experimental_mapo", "weighting": "wpo"}])
    rows = asked_for(rows_with_everything(6), objective)
    batch = batch_of(policy, rows, objective, [list(range(6))])
    part = batch.parts[0]._replace(extras={"reference_hidden": hidden_rows(policy, batch.parts[0], reference=True)})
    for differentiate in (False, True):
        with torch.set_grad_enabled(differentiate):
            tokens, found = policy.network.token_values(to_torch(part, policy.device), ["overlap", "token_kl"])
        for b, i in enumerate(batch.rows[0]):
            for s, (_, ids) in enumerate(rows[i].slots):
                own = log_softmax(whole_logits(policy, rows[i], s))
                with policy.as_reference():
                    ref = log_softmax(whole_logits(policy, rows[i], s))
                n = len(ids)
                expected = {
                    "tokens": own[np.arange(n), ids],
                    "overlap": np.logaddexp.reduce(2 * own, -1),
                    "token_kl": (np.exp(ref) * (ref - own)).sum(-1),
                }
                assert expected["token_kl"].max() > 1e-3
                for name, value in {"tokens": tokens.tokens, **found}.items():
                    np.testing.assert_allclose(value[b, s, :n].detach().numpy(), expected[name], atol=2e-5)
                    assert not value[b, s, n:].any()


def test_token_kl_pulls_the_policy_to_the_reference(policy: Any) -> None:
    """Its gradient, by central differences of the loss along a random direction of the weights."""
    objective = resolve_objective({"name": "experimental_mapo", "beta": 1.0})
    batch = batch_of(policy, rows_with_everything(4), objective, [[0, 1], [2, 3]])
    gradients, _, _ = update_of(policy, objective, batch)
    draw = np.random.default_rng(0)
    ways = {name: draw.standard_normal(value.shape).astype(np.float32) for name, value in gradients.items()}
    along = sum(float((gradients[name] * way).sum()) for name, way in ways.items())
    here, ends = policy.values(), []
    for h in (1e-3, -1e-3):
        policy.set_values({name: value + h * ways[name] for name, value in here.items()})
        ends.append(make_step(policy, objective).evaluate(batch).loss)
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-3)


@pytest.mark.parametrize("keys", [["self_attn.q_proj", "lm_head"], ["lm_head"]])
def test_whole_distributions_need_a_head_that_stays(tiny_model_dir: Path, keys: list[str]) -> None:
    loaded = load(tiny_model_dir, lora_parameters={**LORA, "keys": keys})
    with pytest.raises(ConfigError, match=r"lm_head.*adapt layers only"):
        make_step(loaded, resolve_objective("experimental_mapo"))


def test_hidden_sums_are_those_of_the_last_layer(policy: Any) -> None:
    """A witness by transformers' own output of hidden states, leads and prompts left out."""
    import torch

    from mlxpref import torch_backend

    rows = asked_for(rows_with_everything(3), resolve_objective("dpo"))
    batch = batch_of(policy, rows, resolve_objective("simpo"), [[0, 1, 2]])
    found = torch_backend.hidden_sums(policy, batch.parts[0])
    for b, i in enumerate(batch.rows[0]):
        for s, (lead, ids) in enumerate(rows[i].slots):
            tokens = np.concatenate([rows[i].prompt_ids, lead, ids]).astype(np.int64)
            with torch.no_grad():
                out = policy.model(torch.from_numpy(tokens[None, :-1]), output_hidden_states=True)
            expected = out.hidden_states[-1][0, -len(ids) :].sum(0).numpy()
            np.testing.assert_allclose(found[b, s], expected, atol=1e-4)


# --- references that move ----------------------------------------------------------------------


def merged(policy: Any) -> dict[str, np.ndarray]:
    """What the adapter's factors, or the weights themselves, make of each module; float64, by name."""
    import torch
    from transformers import AutoModelForCausalLM

    values = {name: value.astype(np.float64) for name, value in policy.values().items()}
    if policy.fine_tune_type == "full":
        return values
    base = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32)
    found = {}
    for name in {key.rpartition(".")[0] for key in values}:
        product = LORA["scale"] * values[f"{name}.lora_a"] @ values[f"{name}.lora_b"]
        whole = base.get_submodule(name).weight.detach().double().numpy()
        whole = whole + (product if name.endswith("embed_tokens") else product.T)
        if f"{name}.m" in values:
            whole = values[f"{name}.m"][:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        found[name] = whole
    return found


@pytest.mark.parametrize("update, alpha", [("soft", 0.6), ("hard", 1.0)])
@pytest.mark.parametrize("kind", ["lora", "dora", "embeddings", "full"])
def test_a_moving_reference_follows_in_the_merged_weights(
    tiny_model_dir: Path, tmp_path: Path, kind: str, update: str, alpha: float
) -> None:
    """Finds: factors mixed one by one, a reference that is the policy from the start, a count not kept."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"fine_tune_type": kind}
    if kind == "embeddings":
        keys = ["self_attn.q_proj", "model.embed_tokens", "lm_head"]
        options = {"lora_parameters": {**LORA, "keys": keys}}
    policy = load(tiny_model_dir, jitter=0.0 if kind == "full" else 0.05, **options)
    reference_update = {"kind": update, "every": 2} | ({"alpha": alpha} if update == "soft" else {})
    batch = dpo_batch(policy, parts=[[0, 1], [2, 3]])
    batch = batch._replace(parts=tuple(part._replace(reference=None) for part in batch.parts))
    rate = 2e-3 if kind == "full" else 3e-2
    step = make_step(policy, reference_update=reference_update)
    expected = merged(policy)
    assert step(batch, rate).loss == pytest.approx(np.log(2), abs=1e-6)  # the policy it started from
    second = step(batch, rate)
    expected = {name: alpha * value + (1 - alpha) * expected[name] for name, value in merged(policy).items()}
    skipped = batch._replace(parts=tuple(part._replace(weights=part.weights * 0) for part in batch.parts))
    assert step(skipped, rate).skipped and step.moving.n_updates == 2
    model = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32).eval()
    weights = model.state_dict()
    for name, value in expected.items():
        weights[name if kind == "full" else f"{name}.weight"].copy_(torch.from_numpy(value))
    rows = asked_for(rows_with_everything(4), resolve_objective("dpo"))
    witness = load(tiny_model_dir, trainable=False)
    witness.model = model
    step.save_state(tmp_path)
    third = step(batch, 0.0)
    for b, i in enumerate(i for part in batch.rows for i in part):
        for s in range(2):
            ids = rows[i].response_ids[s]
            logps = log_softmax(whole_logits(witness, rows[i], s))[np.arange(len(ids)), ids]
            assert third.reference_sums[b, s] == pytest.approx(logps.sum(), abs=1e-4)
    assert third.loss != pytest.approx(second.loss, abs=1e-5)
    if update == "hard":
        assert third.loss == pytest.approx(np.log(2), abs=2e-6)
    again = make_step(policy, reference_update=reference_update)
    again.load_state(tmp_path)
    assert again.moving.n_updates == 2 and again(batch, 0.0).loss == third.loss


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_copied_reference_is_the_policy_in_bfloat16(tiny_model_dir: Path, kind: str) -> None:
    """Finds: a change lost in the base's few digits."""
    policy = load(tiny_model_dir, dtype="bfloat16", fine_tune_type=kind, jitter=0.0)
    batch = dpo_batch(policy)
    batch = batch._replace(parts=tuple(part._replace(reference=None) for part in batch.parts))
    step = make_step(policy, reference_update={"kind": "hard", "every": 1})
    first = step(batch, 1e-3 if kind == "full" else 1e-2)
    moved = step(batch, 0.0)
    assert moved.loss == pytest.approx(np.log(2), abs=1e-2)
    np.testing.assert_allclose(moved.policy_sums, moved.reference_sums, atol=0.3)
    assert np.abs(moved.policy_sums - first.policy_sums).max() > 0.1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_of_a_continued_run_is_its_start(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    """Also after training; and a full fine-tune's, which shares its weights' memory with nothing."""
    from mlxpref import torch_backend

    first = load(tiny_model_dir, fine_tune_type=kind, jitter=0.05 if kind == "lora" else 0.0)
    batch = dpo_batch(first)
    make_step(first)(batch, 1e-3)
    torch_backend.save_adapter(first, tmp_path, extra={})
    part = batch.parts[0]
    end = torch_backend.token_logps(first, part).tokens
    second = torch_backend.load_policy(str(tiny_model_dir), init_from=str(tmp_path))
    assert second.fingerprint != first.fingerprint and second.base_fingerprint == first.base_fingerprint
    assert make_step(second)(dpo_batch(second), 1e-2).loss == pytest.approx(np.log(2), abs=1e-6)
    assert np.abs(torch_backend.token_logps(second, part).tokens - end).max() > 1e-2
    np.testing.assert_array_equal(torch_backend.token_logps(second, part, reference=True).tokens, end)


def test_values_of_another_policy_are_refused(policy: Any) -> None:
    values = policy.values()
    with pytest.raises(ModelError, match="other trainable parameters"):
        policy.set_values({name: value for name, value in values.items() if not name.endswith("q_proj.lora_a")})
    with pytest.raises(ModelError, match="other trainable parameters"):
        policy.set_values({name: value.T for name, value in values.items()})
