"""One update of the MLX room: what it must not depend on, what it must keep, what it must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.data.batching import collate, collate_step
from mlxpref.data.plan import plan_pass, plan_steps
from mlxpref.errors import AdapterError, ConfigError, ModelError, RunError
from mlxpref.records import Batch, Tokenized

pytestmark = pytest.mark.mlx

LORA = {"rank": 4, "scale": 2.0}


def rows_of(n: int, *, seed: int = 0, slots: int = 2) -> list[Tokenized]:
    draw = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return draw.integers(3, 300, draw.integers(4, 30)).astype(np.int32)

    return [Tokenized(ids(), tuple(ids() for _ in range(slots)), example_id=str(i)) for i in range(n)]


@dataclass(frozen=True)
class Plain:
    """A function of columns as a step sees an objective: uncoupled, without a state."""

    function: Callable[[dict[str, Any]], Any]
    name: str = "plain"
    coupled: bool = False
    needs: frozenset[str] = frozenset({"reference"})

    def initial_state(self, n_groups: int) -> dict[str, Any]:
        return {}

    def __call__(self, columns: dict[str, Any]) -> Any:
        return self.function(columns)

    def apply_parts(self, parts: list[dict[str, Any]], state: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return [self.function(columns) for columns in parts], state


def _dpo(columns: dict[str, Any]) -> Any:
    import mlx.core as mx

    ratios = columns["policy"].sums - columns["reference"].sums
    return mx.logaddexp(0.0, -0.1 * (ratios[:, 0] - ratios[:, 1]))


dpo = Plain(_dpo)
"""β = 0.1, written out here so that this file depends on no other room."""


@pytest.fixture
def policy(tiny_model_dir: Path) -> Any:
    from mlxpref import mlx_backend

    return mlx_backend.load_policy(str(tiny_model_dir), num_layers=2, lora_parameters=LORA)


def reference_of(policy: Any, rows: list[Tokenized]) -> list[list[np.ndarray]]:
    from mlxpref import mlx_backend

    found: list[list[np.ndarray]] = [[] for _ in rows]
    for (part,) in plan_pass(rows, micro_batch_tokens=500, share_prompts=policy.share_prompts).steps:
        tokens = mlx_backend.token_logps(policy, collate(rows, part), reference=True).tokens
        for b, i in enumerate(part.rows):
            found[i] = [tokens[b, k, : len(ids)] for k, ids in enumerate(rows[i].response_ids)]
    return found


def batches(policy: Any, rows: list[Tokenized], *, budget: int, iters: int, size: int = 8) -> Iterator[Batch]:
    reference = reference_of(policy, rows)
    plan = plan_steps(
        rows, batch_size=size, iters=iters, micro_batch_tokens=budget, share_prompts=policy.share_prompts
    )
    for parts in plan.steps:
        yield collate_step(rows, parts, reference)


def run(policy: Any, *, budget: int = 600, iters: int = 6, rate: float = 1e-2, **options: Any) -> list[Any]:
    from mlxpref import mlx_backend

    step = mlx_backend.make_step(policy, dpo, **options)
    return [step(batch, rate) for batch in batches(policy, rows_of(16), budget=budget, iters=iters)]


def masters(policy: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in policy.masters.items()}


def test_first_loss_is_log_two_and_falls(policy: Any) -> None:
    """A reference that is not the start of the policy, or a step that goes uphill."""
    reports = run(policy, iters=12)
    assert abs(reports[0].loss - math.log(2)) < 1e-6
    assert reports[-1].loss < 0.6
    np.testing.assert_allclose(reports[0].policy_sums, reports[0].reference_sums, rtol=1e-6)  # in other shapes


def test_micro_batches_change_nothing(tiny_model_dir: Path) -> None:
    """A loss divided by the micro-batch instead of the batch, or gradients not added up."""
    from mlxpref import mlx_backend

    results = []
    for budget in (1, 10_000):
        policy = mlx_backend.load_policy(str(tiny_model_dir), num_layers=2, lora_parameters=LORA)
        reports = run(policy, budget=budget)
        results.append((masters(policy), [r.loss for r in reports], [r.grad_norm for r in reports]))
    (first, losses, norms), (second, other_losses, other_norms) = results
    np.testing.assert_allclose(losses, other_losses, atol=1e-5)
    np.testing.assert_allclose(norms, other_norms, rtol=1e-4)
    gaps = np.concatenate([(first[n] - second[n]).ravel() for n in first])
    assert np.abs(gaps).max() < 1e-3
    assert abs(gaps.mean()) < 1e-5


def test_gradient_is_the_slope_of_the_loss(policy: Any) -> None:
    """Finite differences along the direction of a plain SGD step, through the whole compiled update."""
    from mlxpref import mlx_backend

    run(policy, iters=3)  # leave the special point where the adapter is zero
    step = mlx_backend.make_step(policy, dpo, optimizer="sgd", max_grad_norm=None)
    (batch,) = batches(policy, rows_of(8), budget=600, iters=1)
    here = policy.masters
    before = step.evaluate(batch).loss
    rate = 1e-2
    report = step(batch, rate)
    moved = {name: value - here[name] for name, value in policy.masters.items()}
    slope = -sum(float((d * d).sum()) for d in moved.values()) / rate
    assert math.isclose(report.grad_norm**2 * rate, -slope, rel_tol=1e-3)
    size = 0.1
    policy.set_masters({n: here[n] + size * moved[n] for n in here})
    up = step.evaluate(batch).loss
    policy.set_masters({n: here[n] - size * moved[n] for n in here})
    down = step.evaluate(batch).loss
    assert before == pytest.approx(report.loss, abs=1e-6)
    assert (up - down) / (2 * size) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon", "adafactor", "lion"])
def test_every_optimizer_moves_downhill(name: str, tiny_model_dir: Path) -> None:
    """An optimiser whose learning rate or state does not reach the compiled update stands still."""
    from mlxpref import mlx_backend

    rates = {"sgd": 1.0, "lion": 1e-3, "muon": 1e-2, "adafactor": 1e-2}
    policy = mlx_backend.load_policy(str(tiny_model_dir), num_layers=2, lora_parameters=LORA)
    reports = run(policy, optimizer=name, rate=rates.get(name, 1e-2), iters=8)
    assert reports[-1].loss < reports[0].loss - 0.01


def test_adam_first_step_is_the_learning_rate(policy: Any) -> None:
    """Without bias correction Adam's first step is about three times too large."""
    before = masters(policy)
    run(policy, optimizer="adam", iters=1, rate=1e-3)
    moved = {name: np.abs(value - before[name]) for name, value in masters(policy).items()}
    for name, gap in moved.items():
        if name.endswith("lora_b"):  # lora_a has no gradient while lora_b is zero
            assert gap.max() == pytest.approx(1e-3, rel=1e-2)


def test_weight_decay_clipping_and_learning_rate_act(tiny_model_dir: Path) -> None:
    """An option that is accepted and does nothing."""
    from mlxpref import mlx_backend

    results = []
    for options in ({}, {"weight_decay": 0.5}, {"max_grad_norm": 1e-4, "optimizer": "sgd"}, {"optimizer": "sgd"}):
        policy = mlx_backend.load_policy(str(tiny_model_dir), num_layers=2, lora_parameters=LORA)
        run(policy, iters=2, **options)
        results.append(masters(policy))
    for one, other in ((0, 1), (2, 3)):
        assert any(np.abs(results[one][n] - results[other][n]).max() > 1e-6 for n in results[0])


def test_unknown_options_are_refused(policy: Any) -> None:
    from mlxpref import mlx_backend

    with pytest.raises(ConfigError, match="unknown optimizer"):
        mlx_backend.make_step(policy, dpo, optimizer="adamv")
    with pytest.raises(ConfigError, match="takes no momentum"):
        mlx_backend.make_step(policy, dpo, optimizer="adam", optimizer_options={"momentum": 0.9})
    with pytest.raises(ConfigError, match="no weight decay"):
        mlx_backend.make_step(policy, dpo, optimizer="adam", weight_decay=0.1)


def test_non_finite_step_changes_nothing(policy: Any) -> None:
    """One bad batch must not leave NaN in the weights or in the optimiser."""
    from mlxpref import mlx_backend

    step = mlx_backend.make_step(policy, dpo)
    first, second, third = batches(policy, rows_of(16), budget=10_000, iters=3)
    step(first, 1e-2)
    before = masters(policy)
    zero = second._replace(parts=tuple(part._replace(weights=part.weights * 0) for part in second.parts))
    report = step(zero, 1e-2)
    assert report.skipped
    assert all(np.array_equal(before[name], value) for name, value in masters(policy).items())
    assert not step(third, 1e-2).skipped
    assert all(np.isfinite(value).all() for value in masters(policy).values())


@pytest.mark.slow
def test_a_run_of_a_thousand_pairs_traces_each_shape_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Reference pass, updates and evaluations together: at most 128 shapes, none twice.

    A Python number that reaches the graph as a constant would trace again at every value; a plan that
    forgets the reference pass or the evaluation would trace more shapes than it says.
    """
    import json
    import random

    from mlxpref import mlx_backend
    from mlxpref.config_layers import load_config
    from mlxpref.train import train

    draw = random.Random(0)

    def text(scale: float) -> str:
        return "ab " * max(1, min(90, int(draw.lognormvariate(0, 0.8) * scale)))

    columns = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    for name, n in (("train", 1000), ("valid", 60)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for i in range(n):
                row = (f"{i} {text(12)}", "x " + text(14), "y " + text(14), draw.randint(6, 10), draw.randint(1, 5))
                file.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")
    policies = []

    class Backend:
        """The MLX room, whose policy the test can look at afterwards."""

        def __getattr__(self, name: str) -> Any:
            return getattr(mlx_backend, name)

        @staticmethod
        def load_policy(*arguments: Any, **options: Any) -> Any:
            policies.append(mlx_backend.load_policy(*arguments, **options))
            policies[-1].n_traced = 0
            return policies[-1]

    settings = {
        "model.path": str(tiny_model_dir), "data.source": str(tmp_path), "relabel.template": "Score: {score}",
        "output.adapter_path": str(tmp_path / "run"), "reference.store": str(tmp_path / "store"),
        "adapter.num_layers": 1, "batching.batch_size": 16, "training.epochs": 1, "training.steps_per_eval": 40,
        "optimizer.schedule.name": "cosine", "tokenization.max_length": 192,
    }  # fmt: skip
    train(load_config(overrides=list(settings.items())), backend=Backend())
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["data"]["train_rows"] > 1900 and facts["data"]["valid_rows"] > 100
    assert facts["plan"]["shapes"] > 8, "too few shapes to show anything"
    assert policies[0].n_traced <= 128
    with (tmp_path / "run" / "metrics.jsonl").open() as file:
        assert sum("loss" in json.loads(line) for line in file) == facts["plan"]["steps"]


def test_each_shape_is_traced_once(policy: Any) -> None:
    """A Python number that reaches the graph as a constant traces again at every value."""
    from mlxpref import mlx_backend

    step = mlx_backend.make_step(policy, dpo)
    rows = rows_of(40)
    reference = reference_of(policy, rows)
    plan = plan_steps(rows, batch_size=4, epochs=3, micro_batch_tokens=150, max_shapes=6)
    assert len(plan.shapes) <= 6
    before = policy.n_traced
    for count, parts in enumerate(plan.steps):
        step(collate_step(rows, parts, reference), 1e-3 / (count + 1))
    assert policy.n_traced - before == len(plan.shapes)


def test_saved_state_goes_on_bit_for_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Optimiser moments, step count or dropout's random state left out of a checkpoint."""
    from mlxpref import mlx_backend

    def fresh() -> tuple[Any, Any]:
        lora = {**LORA, "dropout": 0.2}
        policy = mlx_backend.load_policy(str(tiny_model_dir), num_layers=2, lora_parameters=lora)
        return policy, mlx_backend.make_step(policy, dpo, weight_decay=0.1)

    policy, step = fresh()
    steps = list(batches(policy, rows_of(16), budget=400, iters=6))
    for batch in steps[:3]:
        step(batch, 1e-2)
    step.save_state(tmp_path)
    for batch in steps[3:]:
        step(batch, 5e-3)
    other, resumed = fresh()
    resumed.load_state(tmp_path)
    for batch in steps[3:]:
        resumed(batch, 5e-3)
    first, second = masters(policy), masters(other)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_state_of_another_run_is_refused(policy: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    from mlxpref import mlx_backend

    mlx_backend.make_step(policy, dpo).save_state(tmp_path)
    other = mlx_backend.load_policy(str(tiny_model_dir), num_layers=1, lora_parameters=LORA)
    with pytest.raises(RunError, match="other parameters"):
        mlx_backend.make_step(other, dpo).load_state(tmp_path)
    (tmp_path / "step_state.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(RunError, match="cannot be read"):
        mlx_backend.make_step(policy, dpo).load_state(tmp_path)


def test_dropout_acts_in_training_only(tiny_model_dir: Path) -> None:
    from mlxpref import mlx_backend

    lora = {**LORA, "dropout": 0.5}
    policy = mlx_backend.load_policy(str(tiny_model_dir), num_layers=2, lora_parameters=lora)
    reports = run(policy, iters=4)
    assert abs(reports[0].loss - math.log(2)) < 1e-6  # a zero adapter hides dropout
    step = mlx_backend.make_step(policy, dpo)
    (batch,) = batches(policy, rows_of(8), budget=10_000, iters=1)
    quiet = step.evaluate(batch).loss
    assert quiet == step.evaluate(batch).loss
    noisy = [step(batch, 0.0).loss for _ in range(3)]
    assert len({round(loss, 7) for loss in [*noisy, quiet]}) == 4


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_adapter_goes_to_disk_and_back(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The same log-probs after loading here, and in mlx-lm; off, the base's."""
    import mlx.core as mx
    from mlx_lm import load

    from mlxpref import mlx_backend

    policy = mlx_backend.load_policy(
        str(tiny_model_dir), fine_tune_type=kind, num_layers=2, lora_parameters=LORA
    )
    rows = rows_of(4)
    (part,) = plan_pass(rows, micro_batch_tokens=10_000).steps[0]
    batch = collate(rows, part)
    start = mlx_backend.token_logps(policy, batch, reference=True).tokens
    run(policy, iters=3)
    mlx_backend.save_adapter(policy, tmp_path / "adapter", extra={"objective": "dpo"})
    trained = mlx_backend.token_logps(policy, batch).tokens
    assert np.abs(trained - start).max() > 1e-2
    loaded = mlx_backend.load_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(mlx_backend.token_logps(loaded, batch).tokens, trained, atol=2e-5)
    np.testing.assert_allclose(mlx_backend.token_logps(loaded, batch, reference=True).tokens, start, atol=2e-5)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapters.safetensors", "adapter_config.json"}
    model, _ = load(str(tiny_model_dir), adapter_path=str(tmp_path / "adapter"))
    ids = np.concatenate([rows[0].prompt_ids, rows[0].response_ids[0]])
    logits = model(mx.array(ids[None, :-1])).astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    picked = np.array(mx.take_along_axis(logps, mx.array(ids[None, 1:, None]), axis=-1))[0, :, 0]
    mine = trained[list(part.rows).index(0), 0, : len(rows[0].response_ids[0])]
    np.testing.assert_allclose(picked[len(rows[0].prompt_ids) - 1 :], mine, atol=2e-5)


def test_starting_from_an_adapter(policy: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The reference of a continued run is the adapter it started from, also after training."""
    from mlxpref import mlx_backend

    run(policy, iters=3)
    mlx_backend.save_adapter(policy, tmp_path, extra={})
    rows = rows_of(4)
    (part,) = plan_pass(rows, micro_batch_tokens=10_000).steps[0]
    batch = collate(rows, part)
    end = mlx_backend.token_logps(policy, batch).tokens
    second = mlx_backend.load_policy(str(tiny_model_dir), init_from=str(tmp_path))
    assert second.fingerprint != policy.fingerprint
    assert second.base_fingerprint == policy.base_fingerprint
    assert abs(run(second, iters=3)[0].loss - math.log(2)) < 1e-6
    assert np.abs(mlx_backend.token_logps(second, batch).tokens - end).max() > 1e-2
    np.testing.assert_allclose(mlx_backend.token_logps(second, batch, reference=True).tokens, end, atol=2e-5)


def test_adapter_of_another_model_is_refused(policy: Any, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Every mismatch in one message, and nothing loaded by half."""
    import shutil

    from mlxpref import mlx_backend
    from tests.architectures import config_of, write_model

    mlx_backend.save_adapter(policy, tmp_path / "adapter", extra={})
    config = {**config_of("llama"), "hidden_size": 48, "num_hidden_layers": 2}
    other = write_model(tmp_path / "other", config, tiny_model_dir)
    with pytest.raises(AdapterError, match=r"made for another model(.|\n)*layers\.2.*not in the model"):
        mlx_backend.load_adapter(tmp_path / "adapter", model_path=str(other))
    with pytest.raises(AdapterError, match="is this an adapter folder"):
        mlx_backend.load_adapter(tmp_path / "nowhere")
    shutil.copytree(tmp_path / "adapter", tmp_path / "damaged")
    (tmp_path / "damaged" / "adapters.safetensors").write_bytes(b"half")
    with pytest.raises(AdapterError, match="damaged"):
        mlx_backend.load_adapter(tmp_path / "damaged")


def test_adapter_on_changed_weights_is_noticed(policy: Any, tmp_path: Path, tiny_model_dir: Path) -> None:
    """The same shapes are not the same model: a base that was replaced answers nonsense without a word."""
    import json
    import shutil

    import mlx.core as mx

    from mlxpref import mlx_backend

    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    mlx_backend.save_adapter(policy, tmp_path / "adapter", extra={})
    assert not mlx_backend.load_adapter(tmp_path / "adapter", model_path=str(base)).notes
    weights = mx.load(str(base / "model.safetensors"))
    name = sorted(weights)[0]
    mx.save_safetensors(str(base / "model.safetensors"), {**weights, name: weights[name] * 1.5}, {"format": "mlx"})
    (note,) = mlx_backend.load_adapter(tmp_path / "adapter", model_path=str(base)).notes
    assert "trained on other weights" in note
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": str(base)}))
    with pytest.raises(AdapterError, match="they have changed since"):
        mlx_backend.load_adapter(tmp_path / "adapter")


def test_broken_model_folders(tmp_path: Path, tiny_model_dir: Path, assets: Path) -> None:
    """No weights, no config, no folder, and a checkpoint that hides its embedding."""
    import shutil

    from mlxpref import mlx_backend

    empty = tmp_path / "empty"
    shutil.copytree(tiny_model_dir, empty)
    (empty / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        mlx_backend.load_policy(str(empty))
    with pytest.raises(ModelError, match="no such folder"):
        mlx_backend.load_policy(str(tmp_path / "nowhere"))
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model_dir, damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-5000])
    with pytest.raises(ModelError, match="incomplete or damaged"):
        mlx_backend.load_policy(str(damaged))
    speechless = tmp_path / "speechless"
    shutil.copytree(tiny_model_dir, speechless, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(ModelError, match="its tokenizer does not load"):
        mlx_backend.load_policy(str(speechless))
    (empty / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        mlx_backend.load_policy(str(empty))
    with pytest.raises(ModelError, match=r"only as lm_head\.weight.*save_pretrained"):
        mlx_backend.load_policy(str(assets / "models" / "tinystories-656k-raw"))


def test_lora_settings(tiny_model_dir: Path) -> None:
    """alpha is scale times rank; both at once, or keys that match nothing, stop the run."""
    from mlxpref import mlx_backend

    path = str(tiny_model_dir)
    policy = mlx_backend.load_policy(path, lora_parameters={"rank": 4, "alpha": 10.0})
    assert policy.lora_parameters["scale"] == 2.5
    with pytest.raises(ConfigError, match="not both"):
        mlx_backend.load_policy(path, lora_parameters={"alpha": 10.0, "scale": 2.0})
    with pytest.raises(ConfigError, match=r"match no module.*self_attn\.q_proj"):
        mlx_backend.load_policy(path, lora_parameters={"keys": ["attn.q"]})
    one = mlx_backend.load_policy(path, num_layers=1, lora_parameters={"keys": ["self_attn.q_proj"]})
    assert sorted(one.trainable()) == [
        "model.layers.2.self_attn.q_proj.lora_a",
        "model.layers.2.self_attn.q_proj.lora_b",
    ]


def test_lists_of_four(tiny_model_dir: Path) -> None:
    """Responses that change places between shelves and slots."""
    from mlxpref import mlx_backend

    policy = mlx_backend.load_policy(str(tiny_model_dir), num_layers=2, lora_parameters=LORA)
    rows = rows_of(3, slots=4)
    (part,) = plan_pass(rows, micro_batch_tokens=10_000).steps[0]
    found = mlx_backend.token_logps(policy, collate(rows, part))
    for b, i in enumerate(part.rows):
        for k, ids in enumerate(rows[i].response_ids):
            alone = Tokenized(rows[i].prompt_ids, (ids, ids), example_id="x")
            (single,) = plan_pass([alone], share_prompts=False).steps[0]
            expected = mlx_backend.token_logps(policy, collate([alone], single)).sums[0, 0]
            assert found.sums[b, k] == pytest.approx(expected, abs=1e-4)
