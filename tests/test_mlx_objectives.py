"""Every objective in the MLX room: one update, however its batch is split and ordered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.data.batching import collate_step
from mlxpref.data.columns import available_columns
from mlxpref.data.parts import PlannedPart, Splitter
from mlxpref.data.shapes import sizes_up_to
from mlxpref.errors import ConfigError, RunError
from mlxpref.objectives import TABLE, Objective, resolve_objective
from mlxpref.records import Batch, Tokenized
from mlxpref.reference import reference_logps
from tests.test_mlx_step import LORA, masters

pytestmark = pytest.mark.mlx

N = 8


def rows_with_everything(n: int = N, *, k: int = 2, seed: int = 0, weighted: bool = False) -> list[Tokenized]:
    """Rows of K responses, and every column and text an objective can ask for."""
    draw = np.random.default_rng(seed)

    def ids(low: int = 3, high: int = 9) -> np.ndarray:
        return draw.integers(3, 300, draw.integers(low, high)).astype(np.int32)

    def row(i: int) -> Tokenized:
        responses = tuple(ids() for _ in range(k))
        texts = {name: (ids(),) for name in ("gold", "mismatched", "rationale", "third")}
        texts["instructions"] = tuple(ids(2, 5) for _ in range(k))
        leads = [ids(1, 3) for _ in range(k)] + [ids(1, 4) for _ in range(k + 4)]
        weights = tuple(tuple(draw.uniform(0, 2, len(one)).tolist()) for one in responses)
        scores = sorted(draw.uniform(1, 10, k).tolist(), reverse=True)
        numbers = {name: tuple(draw.uniform(-9, -1, k).tolist()) for name in ("previous", "aligned_logps")}
        return Tokenized(
            ids(3, 8), responses, str(i), scores=tuple(scores), weight=1.0 + (i % 2 if weighted else 0),
            extras={
                **numbers,
                "margin_rewards": tuple(draw.uniform(-1, 1, k).tolist()),
                "win_rates": tuple(draw.uniform(0, 1, k).tolist()),
                "attributes": tuple(tuple(draw.uniform(0, 5, 2).tolist()) for _ in range(k)),
                "confidence": float(draw.uniform(0.5, 1)),
                "groups": i % 3,
                "token_weights": weights,
                "goal_distances": tuple((s - scores[0]) ** 2 for s in scores),
            },
            texts=texts, leads=tuple(leads),
        )  # fmt: skip

    return [row(i) for i in range(n)]


def asked_for(rows: list[Tokenized], objective: Objective) -> list[Tokenized]:
    """The rows with the texts of this objective alone, as the data way lays them out."""
    def kept(row: Tokenized) -> Tokenized:
        named = [name for name in sorted(row.texts) for _ in row.texts[name]]
        k = len(row.response_ids)
        more = [lead for lead, name in zip(row.leads[k:], named, strict=True) if name in objective.texts]
        texts = {name: row.texts[name] for name in objective.texts}
        return replace(row, texts=texts, leads=(*row.leads[:k], *more))

    return [kept(row) for row in rows]


def batch_of(policy: Any, rows: list[Tokenized], objective: Objective, parts: list[list[int]]) -> Batch:
    from mlxpref import mlx_backend

    rows = asked_for(rows, objective)
    reference = None
    if "reference" in objective.needs:
        reference, _ = reference_logps(rows, mlx_backend, policy, None)
    splitter = Splitter(rows, share_prompts=True, budget=100_000)
    planned: list[PlannedPart] = []
    for members in parts:
        (found,) = splitter.split([members], sizes_up_to(len(members)))
        planned += found
    columns = objective.reads & (objective.from_data | available_columns(rows))
    return collate_step(rows, planned, reference, columns)


@pytest.fixture
def policy(tiny_model_dir: Path) -> Iterator[Any]:
    import mlx.core as mx

    from mlxpref import mlx_backend

    loaded = mlx_backend.load_policy(str(tiny_model_dir), num_layers=1, lora_parameters=LORA)
    mx.random.seed(1)
    loaded.set_masters({n: v + 0.05 * mx.random.normal(v.shape) for n, v in loaded.masters.items()})
    mx.disable_compile()  # sixty graphs of one step each: tracing would cost more than it saves
    yield loaded
    mx.enable_compile()


def update_of(policy: Any, objective: Objective, batch: Batch) -> tuple[dict[str, np.ndarray], Any, Any]:
    """Gradients of one update (plain SGD at rate 1), its report, and the objective's state after it."""
    from mlxpref import mlx_backend

    before, held = masters(policy), dict(policy.masters)
    step = mlx_backend.make_step(
        policy, objective, optimizer="sgd", optimizer_options={"momentum": 0.0}, max_grad_norm=None, n_groups=3
    )
    report = step(batch, 1.0)
    assert not report.skipped
    moved = {name: before[name] - value for name, value in masters(policy).items()}
    policy.set_masters(held)
    return moved, report, step.state


def length(gradients: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in gradients.values())))


@pytest.mark.parametrize("name", TABLE)
def test_a_batch_split_or_permuted_gives_the_same_update(policy: Any, name: str) -> None:
    """Finds: a value that depends on the micro-batch, a state updated once a part, columns of another row."""
    objective = resolve_objective(name)
    # Losses of sorted batches are nobody's own: weights of examples mean nothing there.
    rows = rows_with_everything(k=3 if TABLE[name].lists else 2, weighted=not objective.coupled)
    order = list(np.random.default_rng(5).permutation(N).tolist())
    splits = {
        "one": [list(range(N))],
        "two": [[0, 1, 2, 3, 4], [5, 6, 7]],
        "four": [[0, 3], [1, 2, 4], [5], [6, 7]],
        "permuted": [order[:3], order[3:]],
    }
    batches = {key: batch_of(policy, rows, objective, parts) for key, parts in splits.items()}
    found = {key: update_of(policy, objective, batch) for key, batch in batches.items()}
    whole, report, state = found["one"]
    assert length(whole) > 0
    for key, (gradients, other, after) in found.items():
        difference = {parameter: value - whole[parameter] for parameter, value in gradients.items()}
        assert length(difference) < 1e-5 * length(whole), key
        assert other.loss == pytest.approx(report.loss, rel=1e-5, abs=1e-6), key
        # a window of the last margins keeps them in the order of the rows
        if name != "selfie":
            for own, values in after.items():
                for one, same in zip(values, state[own], strict=True):
                    np.testing.assert_allclose(np.array(one), np.array(same), rtol=1e-5, atol=1e-6)


# --- what a model says beside log-probs --------------------------------------------------------


def whole_logits(policy: Any, row: Tokenized, slot: int) -> np.ndarray:
    """(n, V) float64 logits that predict one slot's tokens, by a plain forward of one unpadded row."""
    import mlx.core as mx

    lead, ids = row.slots[slot]
    tokens = np.concatenate([row.prompt_ids, lead, ids])
    logits = policy.model(mx.array(tokens[:-1])[None])[0]
    return np.array(logits, np.float64)[-len(ids) :]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, -1)[:, None]


@pytest.mark.parametrize("chunk", [3, 512])
def test_overlap_and_token_kl_are_those_of_the_whole_distributions(
    policy: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finds: a reference that is the policy, a KL the wrong way round, chunks joined wrongly."""
    from mlxpref.mlx_backend import logps
    from mlxpref.mlx_backend.arrays import to_mlx
    from mlxpref.mlx_backend.reading import hidden_rows

    monkeypatch.setattr(logps, "head_rows", lambda vocabulary, on_cpu: chunk)
    objective = resolve_objective([{"name": "experimental_mapo", "weighting": "wpo"}])
    assert objective.needs >= {"overlap", "token_kl", "reference"}
    rows = rows_with_everything(3)
    batch = batch_of(policy, rows, objective, [[0, 1, 2]])
    part = batch.parts[0]._replace(extras={"reference_hidden": hidden_rows(policy, batch.parts[0], reference=True)})
    for differentiate in (False, True):
        tokens, found = policy.network.token_values(
            to_mlx(part), differentiate=differentiate, statistics=("overlap", "token_kl")
        )
        for b, i in enumerate(batch.rows[0]):
            for s, (_, ids) in enumerate(asked_for(rows, objective)[i].slots):
                own = log_softmax(whole_logits(policy, asked_for(rows, objective)[i], s))
                with policy.as_reference():
                    ref = log_softmax(whole_logits(policy, asked_for(rows, objective)[i], s))
                n = len(ids)
                picked = own[np.arange(n), ids]
                np.testing.assert_allclose(np.array(tokens.tokens)[b, s, :n], picked, atol=1e-5)
                overlap = np.logaddexp.reduce(2 * own, -1)
                np.testing.assert_allclose(np.array(found["overlap"])[b, s, :n], overlap, atol=1e-5)
                kl = (np.exp(ref) * (ref - own)).sum(-1)
                assert kl.max() > 1e-3
                np.testing.assert_allclose(np.array(found["token_kl"])[b, s, :n], kl, atol=2e-5)
                assert not np.array(found["token_kl"])[b, s, n:].any()


@pytest.mark.parametrize("chunk", [3, 512])
def test_token_kl_pulls_the_policy_to_the_reference(
    policy: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient, by central differences of the loss along a random direction of the weights."""
    from mlxpref import mlx_backend
    from mlxpref.mlx_backend import logps

    monkeypatch.setattr(logps, "head_rows", lambda vocabulary, on_cpu: chunk)
    objective = resolve_objective({"name": "experimental_mapo", "beta": 1.0})
    batch = batch_of(policy, rows_with_everything(4), objective, [[0, 1, 2, 3]])
    gradients, report, _ = update_of(policy, objective, batch)
    draw = np.random.default_rng(0)
    ways = {name: draw.standard_normal(value.shape).astype(np.float32) for name, value in gradients.items()}
    along = sum(float((gradients[name] * way).sum()) for name, way in ways.items())
    held, ends = dict(policy.masters), []
    for h in (1e-3, -1e-3):
        policy.set_masters({name: value + h * mx_array(ways[name]) for name, value in held.items()})
        ends.append(mlx_backend.make_step(policy, objective, n_groups=3).evaluate(batch).loss)
    policy.set_masters(held)
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-3)
    assert report.loss != pytest.approx(ends[0], abs=1e-7)


def test_weights_by_overlap_have_the_gradient_of_their_loss(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """WPO over many chunks of the head, against one chunk; the weights themselves are constants."""
    from mlxpref.mlx_backend import logps

    objective = resolve_objective({"name": "dpo", "weighting": "wpo"})
    batch, found = batch_of(policy, rows_with_everything(4), objective, [[0, 1, 2, 3]]), []
    for chunk in (3, 512):
        monkeypatch.setattr(logps, "head_rows", lambda vocabulary, on_cpu, chunk=chunk: chunk)
        found.append(update_of(policy, objective, batch)[:2])
    assert found[0][1].loss == pytest.approx(found[1][1].loss, rel=1e-6)
    for name, slope in found[1][0].items():
        assert slope.any()
        np.testing.assert_allclose(found[0][0][name], slope, rtol=1e-4, atol=1e-7)


def mx_array(values: np.ndarray) -> Any:
    import mlx.core as mx

    return mx.array(values)


def test_whole_distributions_need_a_head_that_stays(tiny_model_dir: Path) -> None:
    from mlxpref import mlx_backend

    lora = {**LORA, "keys": ["self_attn.q_proj", "lm_head"]}
    loaded = mlx_backend.load_policy(str(tiny_model_dir), num_layers=1, lora_parameters=lora)
    with pytest.raises(ConfigError, match=r"lm_head.*adapt layers only"):
        mlx_backend.make_step(loaded, resolve_objective("experimental_mapo"))


@pytest.mark.parametrize("name", ["kto", "aot_unpaired"])
def test_both_passes_draw_the_same_dropout(tiny_model_dir: Path, name: str) -> None:
    """Finds: slopes taken at other log-probs than those the gradient goes through."""
    import mlx.core as mx

    from mlxpref import mlx_backend

    lora = {**LORA, "dropout": 0.5}
    loaded = mlx_backend.load_policy(str(tiny_model_dir), num_layers=1, lora_parameters=lora)
    mx.random.seed(1)
    loaded.set_masters({n: v + 0.05 * mx.random.normal(v.shape) for n, v in loaded.masters.items()})
    objective, dpo = resolve_objective({"name": "aot", "beta": 0.1}), resolve_objective("dpo")
    rows = rows_with_everything(1)
    found = []
    for one in (objective, dpo):  # of one pair, the coupled formula is plain DPO
        gradients, report, _ = update_of(loaded, one, batch_of(loaded, rows, one, [[0]]))
        found.append((gradients, report.loss))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    for key, value in found[1][0].items():
        np.testing.assert_allclose(found[0][0][key], value, rtol=1e-4, atol=1e-7)
    coupled = resolve_objective(name)
    batch = batch_of(loaded, rows_with_everything(), coupled, [[0, 1, 2], [3, 4, 5, 6, 7]])
    assert update_of(loaded, coupled, batch)[1].loss == update_of(loaded, coupled, batch)[1].loss


# --- states and moving references --------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.start is not None])
def test_a_state_is_carried_saved_and_taken_up(policy: Any, tmp_path: Path, name: str) -> None:
    """Finds: a state that starts anew at every step or checkpoint; a skipped step that moves it."""
    from mlxpref import mlx_backend

    objective = resolve_objective(name)
    parts = [[0, 1, 2, 3], [4, 5, 6, 7]]
    batches = [batch_of(policy, rows_with_everything(seed=i), objective, parts) for i in range(3)]
    start = dict(policy.masters)

    def steps(step: Any, some: list[Batch]) -> list[float]:
        return [step(batch, 1e-2).loss for batch in some]

    whole = mlx_backend.make_step(policy, objective, n_groups=3)
    expected = steps(whole, batches)
    policy.set_masters(start)
    first = mlx_backend.make_step(policy, objective, n_groups=3)
    found = steps(first, batches[:2])
    first.save_state(tmp_path)
    second = mlx_backend.make_step(policy, objective, n_groups=3)
    policy.set_masters(start)
    second.load_state(tmp_path)
    assert found + steps(second, batches[2:]) == expected
    kept = [np.array(value) for value in second.state[name]]
    broken = batches[0]._replace(parts=tuple(p._replace(weights=p.weights * 0) for p in batches[0].parts))
    assert second(broken, 1e-2).skipped
    for value, before in zip(second.state[name], kept, strict=True):
        np.testing.assert_array_equal(np.array(value), before)
    fresh = mlx_backend.make_step(policy, objective, n_groups=3)
    policy.set_masters(start)
    assert fresh.evaluate(batches[0]).loss == fresh.evaluate(batches[0]).loss
    unused = mlx_backend.make_step(policy, objective, n_groups=3)
    np.testing.assert_array_equal(np.array(fresh.state[name][0]), np.array(unused.state[name][0]))
    with pytest.raises(RunError, match="another objective"):
        mlx_backend.make_step(policy, resolve_objective("dpo"), n_groups=3).save_state(tmp_path)
        second.load_state(tmp_path)


def merged(policy: Any) -> dict[str, np.ndarray]:
    """Dense weights of every adapted module, float64, by the adapter's own factors."""
    found = {}
    for name, module, plain in policy.plain_layers:
        delta = module.scale * np.array(module.lora_a, np.float64) @ np.array(module.lora_b, np.float64)
        found[name] = np.array(plain.weight, np.float64) + delta.T
    return found


@pytest.mark.parametrize("kind, alpha", [("soft", 0.6), ("hard", 1.0)])
def test_a_moving_reference_follows_in_the_merged_weights(policy: Any, tmp_path: Path, kind: str, alpha: float) -> None:
    """Finds: factors mixed one by one, a reference that is the policy from the start, a count not kept."""
    from mlxpref import mlx_backend

    objective = resolve_objective("dpo")
    update = {"kind": kind, "every": 2} | ({"alpha": alpha} if kind == "soft" else {})
    rows = rows_with_everything()
    batch = batch_of(policy, rows, objective, [[0, 1, 2, 3], [4, 5, 6, 7]])
    batch = batch._replace(parts=tuple(part._replace(reference=None) for part in batch.parts))
    step = mlx_backend.make_step(policy, objective, reference_update=update)
    expected = merged(policy)
    assert step(batch, 5e-2).loss == pytest.approx(np.log(2), abs=1e-6)  # the policy it started from
    second = step(batch, 5e-2)
    expected = {name: alpha * value + (1 - alpha) * expected[name] for name, value in merged(policy).items()}
    for name, module in policy.moving.items():
        weight = np.array(module.plain.weight, np.float64) + np.array(module.delta, np.float64)
        np.testing.assert_allclose(weight, expected[name], atol=1e-6)
    skipped = batch._replace(parts=tuple(part._replace(weights=part.weights * 0) for part in batch.parts))
    assert step(skipped, 5e-2).skipped and step.moving.n_updates == 2
    step.save_state(tmp_path)
    third = step(batch, 0.0)
    assert third.loss != pytest.approx(second.loss, abs=1e-5)
    if kind == "hard":
        assert third.loss == pytest.approx(np.log(2), abs=1e-6)
    again = mlx_backend.make_step(policy, objective, reference_update=update)
    again.load_state(tmp_path)
    assert again.moving.n_updates == 2 and again(batch, 0.0).loss == third.loss
    policy.moving = None


@pytest.mark.parametrize("kind, dtype", [("lora", "bfloat16"), ("dora", None), ("full", None)])
def test_a_copied_reference_is_the_policy(tiny_model_dir: Path, kind: str, dtype: str | None) -> None:
    """Finds: a change lost in the base's few digits, magnitudes left out, full weights that stay behind."""
    from mlxpref import mlx_backend

    lora = {} if kind == "full" else {"lora_parameters": LORA}
    loaded = mlx_backend.load_policy(str(tiny_model_dir), num_layers=1, dtype=dtype, fine_tune_type=kind, **lora)
    objective, rows = resolve_objective("dpo"), rows_with_everything()
    batch = batch_of(loaded, rows, objective, [[0, 1, 2, 3], [4, 5, 6, 7]])
    batch = batch._replace(parts=tuple(part._replace(reference=None) for part in batch.parts))
    step = mlx_backend.make_step(loaded, objective, reference_update={"kind": "hard", "every": 1})
    first = step(batch, 1e-3 if kind == "full" else 1e-2)
    moved = step(batch, 0.0)
    bound = 1e-6 if dtype is None else 5e-3  # in bfloat16 the two forwards round apart
    assert first.loss == pytest.approx(np.log(2), abs=bound)
    assert moved.loss == pytest.approx(np.log(2), abs=bound)
    np.testing.assert_allclose(moved.policy_sums, moved.reference_sums, atol=2e-5 if dtype is None else 0.3)
    assert np.abs(moved.policy_sums - first.policy_sums).max() > (0.01 if dtype is None else 0.1)
    if dtype is not None:
        for name, delta in step.moving.save().items():
            if name != "n_updates":
                a, b = (np.array(loaded.masters[f"{name}.{key}"]) for key in ("lora_a", "lora_b"))
                np.testing.assert_allclose(np.array(delta), LORA["scale"] * (a @ b).T, rtol=1e-5, atol=1e-9)
