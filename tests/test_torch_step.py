"""One update of the PyTorch room: what it must not depend on, what it must keep, what it must leave alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.data.batching import collate_step
from mlxpref.data.columns import available_columns
from mlxpref.data.parts import PlannedPart, Splitter
from mlxpref.data.shapes import sizes_up_to
from mlxpref.errors import RunError
from mlxpref.objectives import TABLE, Objective, resolve_objective
from mlxpref.records import Batch, Tokenized
from mlxpref.reference import reference_logps
from tests.test_mlx_objectives import N, asked_for, length, log_softmax, rows_with_everything
from tests.test_mlx_step import LORA, Plain
from tests.torch_models import jittered, load_both, whole_logits, with_longer_prompts, write_model

pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def load(path: Path, *, jitter: float = 0.05, **options: Any) -> Any:
    from mlxpref import torch_backend

    policy = torch_backend.load_policy(str(path), **{"num_layers": 1, "lora_parameters": LORA, **options})
    policy.set_values(jittered(policy.values(), jitter))
    return policy


@pytest.fixture
def policy(tiny_model_dir: Path) -> Any:
    return load(tiny_model_dir)


def batch_of(policy: Any, rows: list[Tokenized], objective: Objective, parts: list[list[int]], **more: Any) -> Batch:
    from mlxpref import torch_backend

    rows = asked_for(rows, objective)
    reference = None
    if "reference" in objective.needs:
        reference, _ = reference_logps(rows, torch_backend, policy, None)
    splitter = Splitter(rows, share_prompts=more.get("share", False), budget=100_000)
    planned: list[PlannedPart] = []
    for members in parts:
        (found,) = splitter.split([members], sizes_up_to(len(members)))
        planned += found
    columns = objective.reads & (objective.from_data | available_columns(rows))
    return collate_step(rows, planned, reference, columns)


def dpo_batch(policy: Any, *, n: int = 4, parts: list[list[int]] | None = None, share: bool = False) -> Batch:
    rows = (with_longer_prompts if share else list)(rows_with_everything(n))
    return batch_of(policy, rows, resolve_objective("dpo"), parts or [list(range(n))], share=share)


def make_step(policy: Any, objective: Any = None, **options: Any) -> Any:
    from mlxpref import torch_backend

    chosen = resolve_objective("dpo") if objective is None else objective
    return torch_backend.make_step(policy, chosen, **{"n_groups": 3, **options})


def update_of(policy: Any, objective: Any, batch: Batch, **options: Any) -> tuple[dict[str, np.ndarray], Any, Any]:
    """Gradients of one update (plain SGD at rate 1), its report, and the objective's state after it."""
    before = policy.values()
    step = make_step(policy, objective, **{"optimizer": "sgd", "max_grad_norm": None, **options})
    report = step(batch, 1.0)
    assert not report.skipped
    moved = {name: before[name] - value for name, value in policy.values().items()}
    policy.set_values(before)
    return moved, report, step.state


@pytest.mark.parametrize("name", TABLE)
def test_a_batch_split_or_permuted_gives_the_same_update(policy: Any, name: str) -> None:
    """Finds: a value that depends on the micro-batch, a state updated once a part, columns of another row."""
    objective = resolve_objective(name)
    rows = rows_with_everything(k=3 if TABLE[name].lists else 2, weighted=not objective.coupled)
    rows = with_longer_prompts(rows)
    order = list(np.random.default_rng(5).permutation(N).tolist())
    splits = {
        "one": [list(range(N))],
        "four": [[0, 3], [1, 2, 4], [5], [6, 7]],
        "permuted": [order[:3], order[3:]],
    }
    batches = {key: batch_of(policy, rows, objective, parts) for key, parts in splits.items()}
    batches["shared"] = batch_of(policy, rows, objective, splits["permuted"], share=True)
    assert batches["shared"].parts[0].prompts.shape[1] > 0
    found = {key: update_of(policy, objective, batch) for key, batch in batches.items()}
    whole, report, state = found["one"]
    assert length(whole) > 0
    for key, (gradients, other, after) in found.items():
        difference = {parameter: value - whole[parameter] for parameter, value in gradients.items()}
        assert length(difference) < 1e-5 * length(whole), key
        assert other.loss == pytest.approx(report.loss, rel=1e-5, abs=1e-6), key
        if name != "selfie":  # a window of the last margins keeps them in the order of the rows
            for own, values in after.items():
                for one, same in zip(values, state[own], strict=True):
                    np.testing.assert_allclose(one.numpy(), same.numpy(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def both(tiny_model_dir: Path) -> Iterator[tuple[Any, Any]]:
    import mlx.core as mx

    mx.disable_compile()  # a graph of one step each: tracing would cost more than it saves
    yield load_both(tiny_model_dir, num_layers=1)
    mx.enable_compile()


@pytest.mark.mlx
@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_three_updates_are_those_of_mlx(both: tuple[Any, Any], name: str) -> None:
    """Losses, norms and log-probs under every objective, with what it carries from step to step."""
    from mlxpref import mlx_backend

    objective, here = resolve_objective(name), both[1].values()
    rows = rows_with_everything(6, k=3 if TABLE[name].lists else 2)
    batch = batch_of(both[1], rows, objective, [[0, 3, 1], [5, 2, 4]])
    ours = mlx_backend.make_step(both[0], objective, n_groups=3)
    theirs = make_step(both[1], objective)
    for _ in range(3):
        expected, found = ours(batch, 1e-2), theirs(batch, 1e-2)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
        np.testing.assert_allclose(found.policy_sums, expected.policy_sums, atol=1e-3)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
    for policy in both:
        policy.set_values(here)


@pytest.mark.parametrize(
    "kind, dropout", [("lora", 0.0), ("lora", 0.5), ("dora", 0.5), ("full", 0.0)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
def test_the_gradient_is_the_slope_of_the_loss(
    tiny_model_dir: Path, kind: str, dropout: float, checkpoint: bool
) -> None:
    """Finds: a backward pass that draws its own dropout, or that a checkpoint leaves without something."""
    lora = {**LORA, "dropout": dropout}
    policy = load(tiny_model_dir, fine_tune_type=kind, lora_parameters=lora, grad_checkpoint=checkpoint, num_layers=2)
    batch = dpo_batch(policy, parts=[[0, 1], [2, 3]])
    here = policy.values()

    def loss_at(values: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """Loss under one fixed draw, and where a plain gradient step of rate 1 leads."""
        policy.set_values(values)
        gradients, report, _ = update_of(policy, resolve_objective("dpo"), batch, seed=4)
        return report.loss, gradients

    policy.set_values(here)
    _, gradient = loss_at(here)
    if kind == "dora":  # the norm is held fixed on purpose: only magnitudes have the slope of what is computed
        gradient = {name: value * name.endswith(".m") for name, value in gradient.items()}
    norm = length(gradient)
    assert norm > 1e-3
    size = (3e-4 if kind == "full" else 1e-2) / norm
    up, _ = loss_at({name: here[name] + size * gradient[name] for name in here})
    down, _ = loss_at({name: here[name] - size * gradient[name] for name in here})
    assert (up - down) / (2 * size) == pytest.approx(norm**2, rel=2e-2)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_checkpointing_changes_no_gradient(tiny_model_dir: Path, kind: str) -> None:
    """The same draw of dropout, all layers."""
    found = []
    for checkpoint in (False, True):
        lora = {**LORA, "dropout": 0.5}
        policy = load(
            tiny_model_dir, fine_tune_type=kind, lora_parameters=lora, num_layers=-1, grad_checkpoint=checkpoint
        )
        found.append(make_step(policy, seed=2).gradients(dpo_batch(policy)))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-7)


def test_checkpointed_experts(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Their weights are computed once a pass, and again in the backward pass."""
    path = write_model(tmp_path / "mixtral", "mixtral", tiny_model_dir)
    found = []
    for checkpoint in (False, True):
        policy = load(path, num_layers=2, grad_checkpoint=checkpoint)
        found.append(make_step(policy).gradients(dpo_batch(policy)))
    assert any(".switch_mlp." in name for name in found[0])
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-7)


def test_both_passes_draw_the_same_dropout(tiny_model_dir: Path) -> None:
    """Finds: slopes taken at other log-probs than those the gradient goes through."""
    policy = load(tiny_model_dir, lora_parameters={**LORA, "dropout": 0.5})
    rows = rows_with_everything(1)
    found = []
    for objective in (resolve_objective({"name": "aot", "beta": 0.1}), resolve_objective("dpo")):
        gradients, report, _ = update_of(policy, objective, batch_of(policy, rows, objective, [[0]]))
        found.append((gradients, report.loss))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    for key, value in found[1][0].items():
        np.testing.assert_allclose(found[0][0][key], value, rtol=1e-4, atol=1e-7)


def test_dropout_is_drawn_for_each_part_and_step_and_seed(tiny_model_dir: Path) -> None:
    """Finds: one draw for all, a draw that a clock decides, dropout in evaluation."""
    policy = load(tiny_model_dir, lora_parameters={**LORA, "dropout": 0.5})
    one = rows_with_everything(1)[0]
    batch = batch_of(policy, [one, one], resolve_objective("dpo"), [[0], [1]])
    step = make_step(policy, seed=1)
    quiet = step.evaluate(batch)
    assert quiet.losses[0] == quiet.losses[1]
    first, second = step(batch, 0.0), step(batch, 0.0)
    losses = [*first.losses, *second.losses, quiet.losses[0]]
    assert len({round(float(loss), 7) for loss in losses}) == 5
    assert step.evaluate(batch).loss == quiet.loss
    again = make_step(policy, seed=1)
    again.evaluate(batch)
    np.testing.assert_array_equal(again(batch, 0.0).losses, first.losses)
    assert make_step(policy, seed=2)(batch, 0.0).loss != first.loss


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mixtral"])
def test_a_models_own_noise_is_off(name: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    """The dropout of 0.1 that gpt2 brings, attention's, and the jitter of routers; mlx-lm has none of them."""
    noise = {"attention_dropout": 0.2, "attn_pdrop": 0.2, "hidden_dropout": 0.2, "router_jitter_noise": 0.3}
    policy = load(write_model(tmp_path / name, name, tiny_model_dir, **noise))
    batch = dpo_batch(policy)
    step = make_step(policy)
    quiet = step.evaluate(batch)
    assert step(batch, 0.0).loss == pytest.approx(quiet.loss, abs=1e-6)


def test_a_check_of_the_head_is_made_without_dropout(tiny_model_dir: Path, tmp_path: Path) -> None:
    """With an adapter that acts and dropout on, head and body seemed to differ, and whole rows were taken."""
    from mlxpref import torch_backend

    policy = load(tiny_model_dir, lora_parameters={**LORA, "dropout": 0.5}, jitter=0.3)
    torch_backend.save_adapter(policy, tmp_path, extra={})
    assert torch_backend.load_policy(str(tiny_model_dir), init_from=str(tmp_path)).network.split_head


def test_first_steps_are_those_of_the_optimiser(tiny_model_dir: Path) -> None:
    """The first loss is log 2, Adam's first step its rate, and a lower loss follows."""
    policy = load(tiny_model_dir, jitter=0.0)
    batch, before = dpo_batch(policy, n=8), policy.values()
    step = make_step(policy, optimizer="adam")
    first = step(batch, 1e-2)
    assert first.loss == pytest.approx(math.log(2), abs=1e-6)
    np.testing.assert_array_equal(first.policy_sums, first.reference_sums)
    for name, value in policy.values().items():
        moved = np.abs(value - before[name]).max()
        assert moved == pytest.approx(1e-2, rel=1e-2) if name.endswith("lora_b") else moved == 0
    assert [step(batch, 1e-2).loss for _ in range(8)][-1] < 0.6


def test_clipping_weights_and_decay_act(tiny_model_dir: Path) -> None:
    """A limit above the norm changes nothing, one below it gives exactly that norm; weight 2 is the example twice."""
    policy = load(tiny_model_dir)
    batch = dpo_batch(policy)
    free, report, _ = update_of(policy, None, batch)
    assert report.grad_norm == pytest.approx(length(free), rel=1e-5)
    above = update_of(policy, None, batch, max_grad_norm=1e6)[0]
    assert all(np.array_equal(value, free[name]) for name, value in above.items())
    assert length(update_of(policy, None, batch, max_grad_norm=1e-3)[0]) == pytest.approx(1e-3, rel=1e-3)
    decayed = update_of(policy, None, batch, weight_decay=0.5)[0]
    for name, value in policy.values().items():
        np.testing.assert_allclose(decayed[name] - free[name], 0.5 * value, atol=1e-6)
    rows = rows_with_everything(3)
    one = batch_of(policy, rows, resolve_objective("dpo"), [[0, 1], [2]])
    heavy = [part._replace(weights=np.array(w, np.float32)) for part, w in zip(one.parts, ([2, 1], [0]), strict=True)]
    twice = batch_of(policy, [rows[0], rows[0], rows[1]], resolve_objective("dpo"), [[0, 1, 2]])
    found, expected = (update_of(policy, None, b) for b in (one._replace(parts=tuple(heavy)), twice))
    assert found[1].loss == pytest.approx(expected[1].loss, abs=1e-6)
    for name, value in expected[0].items():
        np.testing.assert_allclose(found[0][name], value, atol=1e-6)


def held(step: Any, folder: Path) -> bytes:
    step.save_state(folder)
    return (folder / "step_state.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["dpo", "bco"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_evaluation_and_gradients_move_nothing(tiny_model_dir: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Weights, moments and the objective's state; bit for bit."""
    policy = load(tiny_model_dir, fine_tune_type=kind, jitter=0.05 if kind == "lora" else 0.0)
    objective = resolve_objective(name)
    batch = batch_of(policy, rows_with_everything(4), objective, [[0, 1], [2, 3]])
    step = make_step(policy, objective)
    step(batch, 1e-3)
    before = held(step, tmp_path)
    losses = {step.evaluate(batch).loss for _ in range(2)}
    assert len(losses) == 1 and held(step, tmp_path) == before
    count = step.n_drawn
    step.gradients(batch)
    step.n_drawn = count  # only dropout goes on
    assert held(step, tmp_path) == before


@pytest.mark.parametrize("name", ["dpo", "bco"])
def test_a_step_that_is_not_finite_changes_nothing(policy: Any, tmp_path: Path, name: str) -> None:
    """Finds: NaN in weights, moments or the objective's state; a loss that is not finite with gradients that are."""
    objective = resolve_objective(name)
    batch = batch_of(policy, rows_with_everything(4), objective, [[0, 1], [2, 3]])
    step = make_step(policy, objective)
    step(batch, 1e-3)
    before, count = held(step, tmp_path), step.n_drawn
    zero = batch._replace(parts=tuple(part._replace(weights=part.weights * 0) for part in batch.parts))
    assert step(zero, 1e-3).skipped
    step.n_drawn = count
    assert held(step, tmp_path) == before
    assert not step(batch, 1e-3).skipped
    assert all(np.isfinite(value).all() for value in policy.values().values())
    infinite = Plain(lambda columns: columns["policy"].sums.sum(-1) + math.inf)
    assert make_step(policy, infinite)(batch, 1e-3).skipped


def test_saved_state_goes_on_bit_for_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Moments, count of steps, the objective's state or dropout's random state left out of a checkpoint."""
    objective = resolve_objective([{"name": "bco"}, {"name": "group_robust"}])

    def fresh() -> tuple[Any, Any]:
        policy = load(tiny_model_dir, lora_parameters={**LORA, "dropout": 0.2})
        return policy, make_step(policy, objective, weight_decay=0.1)

    policy, step = fresh()
    batches = [batch_of(policy, rows_with_everything(4, seed=i), objective, [[0, 1], [2, 3]]) for i in range(4)]
    for batch in batches[:2]:
        step(batch, 1e-2)
    step.save_state(tmp_path)
    losses = [step(batch, 5e-3).loss for batch in batches[2:]]
    other, resumed = fresh()
    resumed.load_state(tmp_path)
    assert [resumed(batch, 5e-3).loss for batch in batches[2:]] == losses
    values = other.values()
    assert all(np.array_equal(value, values[name]) for name, value in policy.values().items())


def test_state_of_another_run_is_refused(policy: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    make_step(policy).save_state(tmp_path)
    with pytest.raises(RunError, match="other parameters"):
        make_step(load(tiny_model_dir, num_layers=2)).load_state(tmp_path)
    with pytest.raises(RunError, match="another objective"):
        make_step(policy, resolve_objective("bco")).load_state(tmp_path)
    with pytest.raises(RunError, match="moving reference"):
        make_step(policy, reference_update={"kind": "hard", "every": 1}).load_state(tmp_path)
    policy.shifts = None
    with pytest.raises(RunError, match="another optimizer"):
        make_step(policy, optimizer="lion").load_state(tmp_path)
    (tmp_path / "step_state.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(RunError, match="cannot be read"):
        make_step(policy).load_state(tmp_path)


@pytest.mark.mlx
def test_state_of_the_other_room_is_refused(policy: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    from mlxpref import mlx_backend

    other = mlx_backend.load_policy(str(tiny_model_dir), num_layers=1, lora_parameters=LORA)
    mlx_backend.make_step(other, resolve_objective("dpo")).save_state(tmp_path / "a")
    with pytest.raises(RunError, match="another backend"):
        make_step(policy).load_state(tmp_path / "a")
    make_step(policy).save_state(tmp_path / "b")
    with pytest.raises(RunError):
        mlx_backend.make_step(other, resolve_objective("dpo")).load_state(tmp_path / "b")


# --- half-width types --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_half_width_models_train_with_float32_masters(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """At a learning rate of 1e-5 an update vanishes in bfloat16; and the policy starts as its reference."""
    import torch
    from safetensors.torch import load_file

    from mlxpref import torch_backend

    policy = load(tiny_model_dir, dtype="bfloat16", fine_tune_type=kind, jitter=0.0)
    batch, before = dpo_batch(policy), policy.values()
    step = make_step(policy)
    assert step(batch, 1e-5).loss == pytest.approx(math.log(2), abs=1e-6 if kind != "dora" else 2e-3)
    for _ in range(3):
        step(batch, 1e-5)
    assert all(value.dtype == torch.float32 for value in policy.masters.values())
    moved = max(np.abs(value - before[name]).max() for name, value in policy.values().items())
    assert 2e-5 < moved < 6e-5
    torch_backend.save_adapter(policy, tmp_path, extra={})
    for name, value in load_file(tmp_path / "adapters.safetensors").items():
        assert value.dtype == (torch.bfloat16 if kind == "full" else torch.float32)
        expected = torch.from_numpy(policy.values()[name]).to(value.dtype)
        assert torch.equal(value, expected)
    assert all(p.dtype == torch.bfloat16 for p in policy.model.parameters() if not p.requires_grad)
    for name in (name for name in before if name.endswith(".m")):
        weight = policy.model.get_submodule(name.removesuffix(".m")).get_base_layer().weight
        np.testing.assert_allclose(before[name], weight.float().norm(dim=1).numpy(), rtol=1e-6)


def test_half_width_log_probs_are_reduced_in_float32(tiny_model_dir: Path) -> None:
    """A log-softmax in bfloat16 is off by tenths of a nat a token."""

    from mlxpref import torch_backend

    policy = load(tiny_model_dir, dtype="bfloat16", trainable=False)
    (row,) = rows_with_everything(1)
    batch = batch_of(policy, [row], resolve_objective("simpo"), [[0]]).parts[0]
    found = torch_backend.token_logps(policy, batch).tokens[0, 0]
    n, logits = len(row.response_ids[0]), whole_logits(policy, row, 0)
    expected = log_softmax(logits)[np.arange(n), row.response_ids[0]]
    np.testing.assert_allclose(found[:n], expected, atol=0.06)
    assert np.abs(found[:n] * 64 - np.round(found[:n] * 64)).max() > 1e-3, "rounded to bfloat16"
