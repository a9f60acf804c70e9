"""Shared prompts of the PyTorch room against one plain forward of one example at a time, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.data.batching import collate
from mlxpref.data.plan import plan_pass
from mlxpref.objectives import resolve_objective
from mlxpref.records import Tokenized
from tests.test_mlx_exactness import random_rows, weight_of
from tests.test_mlx_objectives import length, rows_with_everything
from tests.test_mlx_step import LORA
from tests.test_torch_step import batch_of, dpo_batch, load, make_step
from tests.torch_models import CHANGES, jittered, with_longer_prompts, write_model

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.mlx]  # mlx: the rows come from its tests

SHARED = [name for name in CHANGES if name != "mamba"]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Any:
    folder = tmp_path_factory.mktemp("architectures")

    def write(name: str, **changes: Any) -> Path:
        place = folder / "-".join([name, *changes])
        return place if place.exists() else write_model(place, name, tiny_model_dir, **changes)

    return write


def in_float64(path: Path, **options: Any) -> Any:
    policy = load(path, **{"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}, **options})
    policy.model.double()
    policy.model.config._experts_implementation = "eager"  # grouped matrix products are of no float64
    return policy


def parameters(policy: Any) -> list[Any]:
    return list({id(slot.parameter): slot.parameter for slot in policy.slots.values()}.values())


Read = tuple[list[list[np.ndarray]], list[Any]]
"""Log-probs of every response of every row, and gradients of their weighted sum."""


def witness(policy: Any, rows: list[Tokenized]) -> Read:
    """Nothing of ours: the model reads one whole row, and autograd does the rest."""
    import torch

    logps: list[list[np.ndarray]] = []
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        logps.append([])
        for k, ids in enumerate(row.response_ids):
            tokens = torch.from_numpy(np.concatenate([row.prompt_ids, ids]).astype(np.int64))[None]
            every = policy.model(input_ids=tokens[:, :-1], use_cache=False).logits[0].log_softmax(-1)
            found = every.gather(-1, tokens[0, 1:, None])[len(row.prompt_ids) - 1 :, 0]
            total = total + (found * torch.from_numpy(weight_of(i, k, np.arange(len(ids))))).sum()
            logps[-1].append(found.detach().numpy())
    return logps, list(torch.autograd.grad(total, parameters(policy)))


def ours(policy: Any, rows: list[Tokenized], *, budget: int = 400) -> Read:
    """Through plan, collation and network, prompts shared."""
    import torch

    from mlxpref.torch_backend.arrays import to_torch

    logps: list[list[np.ndarray]] = [[] for _ in rows]
    total = [torch.zeros_like(one) for one in parameters(policy)]
    for (part,) in plan_pass(rows, micro_batch_tokens=budget, share_prompts=True).steps:
        batch = to_torch(collate(rows, part), policy.device)
        assert batch.prompts.shape[1] >= 8
        found = policy.network.token_values(batch)[0].tokens
        weights = np.zeros(found.shape)
        for b, i in enumerate(part.rows):
            for k, ids in enumerate(rows[i].response_ids):
                weights[b, k] = weight_of(i, k, np.arange(found.shape[2]))
                logps[i].append(found[b, k, : len(ids)].detach().numpy())
        loss = (found * torch.from_numpy(weights) * batch.mask).sum()
        total = [one + more for one, more in zip(total, torch.autograd.grad(loss, parameters(policy)), strict=True)]
    return logps, total


def assert_same(found: Read, expected: Read) -> None:
    gaps = [a - b for f, e in zip(found[0], expected[0], strict=True) for a, b in zip(f, e, strict=True)]
    assert max(np.abs(gap).max() for gap in gaps) <= 2e-5
    assert abs(np.concatenate(gaps).mean()) <= 2e-6
    norm = float(sum(value.square().sum() for value in expected[1])) ** 0.5
    apart = float(sum((a - b).square().sum() for a, b in zip(found[1], expected[1], strict=True))) ** 0.5
    assert norm > 1e-2 and apart <= 1e-5 * norm, f"gradients differ by {apart / norm:.1e}"


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", SHARED)
def test_shared_prompts_are_exact(name: str, checkpoint: bool, model_of: Any) -> None:
    """Finds: a wrong mask, window, position, gather or head; layers that a checkpoint reads again as other rows."""
    policy = in_float64(model_of(name), grad_checkpoint=checkpoint)
    assert policy.way == "shared" and policy.share_prompts and not policy.notes
    rows = random_rows(int(policy.config["vocab_size"]), n=4)
    expected = witness(policy, rows)
    policy.model.train(checkpoint)
    assert_same(ours(policy, rows), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"fine_tune_type": "dora"},
        {"fine_tune_type": "full", "num_layers": -1},
        {"fine_tune_type": "full", "num_layers": 1, "grad_checkpoint": True},
        {"lora_parameters": {"rank": 4, "scale": 2.0, "keys": ["self_attn.q_proj", "lm_head"]}},
        {"lora_parameters": {"rank": 4, "scale": 2.0, "keys": ["mlp.up_proj", "model.embed_tokens"]}, "num_layers": -1},
    ],
    ids=["dora", "full", "full-last", "head", "embedding"],
)
def test_every_kind_of_training_is_exact(options: dict[str, Any], model_of: Any) -> None:
    """Heads that train take another way through the chunks; prompts must pass gradients to what is below them."""
    policy = in_float64(model_of("llama"), jitter=0.0 if options.get("fine_tune_type") == "full" else 0.05, **options)
    assert policy.way == "shared"
    rows = random_rows(int(policy.config["vocab_size"]), n=4)
    expected = witness(policy, rows)
    policy.model.train(options.get("grad_checkpoint", False))
    assert_same(ours(policy, rows), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_padded_pieces_are_exact(name: str, model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are read where the device is no CPU."""
    from mlxpref.torch_backend import logps, prefix

    monkeypatch.setattr(logps, "stream_of", lambda batch, *, padded: prefix.stream_of(batch, padded=True))
    policy = in_float64(model_of(name))
    rows = random_rows(int(policy.config["vocab_size"]), n=4)
    assert_same(ours(policy, rows), witness(policy, rows))


def test_more_rows_than_one_chunk_of_the_head(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's boundary in the wrong place would drop or repeat a token."""
    from mlxpref.torch_backend import logps

    monkeypatch.setattr(logps, "CHUNK_BYTES", 1.0)
    policy = in_float64(model_of("gemma2"))  # whose head has a soft cap
    rows = random_rows(int(policy.config["vocab_size"]), n=6)
    assert_same(ours(policy, rows, budget=4000), witness(policy, rows))


# --- which way ---------------------------------------------------------------------------------


def test_recurrent_models_go_the_plain_way(model_of: Any) -> None:
    policy = load(model_of("mamba"), fine_tune_type="full", num_layers=-1, jitter=0.0)
    assert policy.way == "plain" and not policy.share_prompts and policy.network.sharing is None
    assert [note.partition(":")[0] for note in policy.notes] == ["prompts are computed once for each response"]


@pytest.mark.parametrize("fault", ["prompt", "position", "window", "error"])
def test_what_is_not_exact_goes_the_plain_way(fault: str, model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is read wrongly must not be trained on; the values of the adapter stay what they were."""
    import torch

    from mlxpref.torch_backend import logps, prefix

    def wrong(batch: Any, *, padded: bool) -> Any:
        if fault == "error":
            raise RuntimeError("of another model")
        stream = prefix.stream_of(batch, padded=padded)
        if fault == "position":
            return prefix.Stream(stream.ids, torch.arange(stream.ids.shape[1])[None], *_rest(stream))
        if fault == "prompt":
            pieces = tuple(piece._replace(prompts=piece.prompts * 0, prompt=0) for piece in stream.pieces)
            return prefix.Stream(stream.ids, stream.positions, stream.n, stream.prompt, pieces, stream.where)
        return stream

    def _rest(stream: Any) -> tuple[Any, ...]:
        return stream.n, stream.prompt, stream.pieces, stream.where

    expected = load(model_of("llama"), jitter=0.0).values()
    monkeypatch.setattr(logps, "stream_of", wrong)
    if fault == "window":
        every = prefix._Rule.mask
        monkeypatch.setattr(prefix._Rule, "mask", lambda *given: every(*given) * 0)
    policy = load(model_of("llama"), jitter=0.0)
    assert policy.way == "plain" and len(policy.notes) == 1
    assert ("of another model" in policy.notes[0]) == (fault == "error")
    assert policy.model.config._attn_implementation == "sdpa"
    assert all(np.array_equal(value, expected[name]) for name, value in policy.values().items())


def test_a_model_that_reads_streams_reads_rows_as_before(model_of: Any) -> None:
    """The attention that takes streams apart is gone when a stream has been read, also after an error."""
    import torch

    policy = load(model_of("llama"))
    ids = torch.arange(3, 20)[None]
    before = policy.model(ids).logits
    batch = dpo_batch(policy, share=True)
    make_step(policy)(batch, 0.0)
    assert torch.equal(policy.model(ids).logits, before)
    broken = batch.parts[0]._replace(prompts=batch.parts[0].prompts + 10**6)
    with pytest.raises(IndexError):
        make_step(policy).evaluate(batch._replace(parts=(broken,)))
    assert torch.equal(policy.model(ids).logits, before)


# --- what it costs -----------------------------------------------------------------------------


@contextmanager
def kept() -> Iterator[list[Any]]:
    """Tensors that are kept for the backward pass."""
    import torch

    found: list[Any] = []

    def pack(value: Any) -> Any:
        found.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield found


def loss_of(policy: Any, batch: Any) -> Any:
    from mlxpref.torch_backend.arrays import to_torch

    return policy.network.token_values(to_torch(batch, policy.device))[0].sums.sum()


def test_every_token_is_read_once(model_of: Any) -> None:
    """Neither a prompt for each of its responses, nor padding."""
    policy = load(model_of("llama"))
    rows = random_rows(int(policy.config["vocab_size"]), n=4)
    seen: list[int] = []
    hook = policy.model.model.layers[0].register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
    for (part,) in plan_pass(rows, micro_batch_tokens=400).steps:
        seen.clear()
        loss_of(policy, collate(rows, part))
        shared = part.shape.prompt
        whole = [len(rows[i].prompt_ids) - shared + len(ids) - 1 for i in part.rows for ids in rows[i].response_ids]
        assert seen == [len(part.rows) * shared + sum(whole)]
    hook.remove()


def test_no_logits_are_kept(model_of: Any) -> None:
    """Nor is a token's hidden state kept more than once for the head."""
    policy = load(model_of("llama"), num_layers=1)
    rows = random_rows(int(policy.config["vocab_size"]), n=4)
    (part,) = plan_pass(rows, micro_batch_tokens=4000).steps[0]
    weights = {parameter.data_ptr() for parameter in policy.model.parameters()}
    with kept() as found:
        loss_of(policy, collate(rows, part))
    vocabulary = int(policy.config["vocab_size"])
    assert found and not [one.shape for one in found if one.data_ptr() not in weights and vocabulary in one.shape]


def test_nothing_below_the_lowest_adapted_layer_is_differentiated(model_of: Any) -> None:
    policy = load(model_of("llama"), num_layers=1)
    needs: list[bool] = []
    for layer in policy.model.model.layers:
        layer.register_forward_hook(lambda *given: needs.append(given[2].requires_grad))
    loss_of(policy, dpo_batch(policy, share=True).parts[0])
    assert needs == [False] * (len(needs) - 1) + [True] and len(needs) > 1


# --- the low-rank term -------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_term_is_pefts(dropout: float, model_of: Any) -> None:
    """Values and gradients, in float64, of one operation against those of autograd."""
    import torch
    from peft.tuners.lora.layer import Linear

    lora = {**LORA, "dropout": dropout}
    policy = load(model_of("qwen2"), lora_parameters=lora)  # whose projections have a bias
    layers = [one.module.double().train() for one in policy.adapted]
    assert any(layer.base_layer.bias is not None for layer in layers)
    draw = torch.Generator().manual_seed(0)
    for layer in layers:
        given = torch.randn((2, 7, layer.in_features), dtype=torch.float64, generator=draw).requires_grad_()
        wanted = [given, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        outcomes = []
        for forward in (type(layer).forward, Linear.forward):
            torch.manual_seed(3)
            out = forward(layer, given)
            outcomes.append([out, *torch.autograd.grad((out * out.detach().sin()).sum(), wanted)])
        assert type(layer).forward is not Linear.forward
        for ours, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_term_is_computed_in_the_models_dtype(model_of: Any) -> None:
    """What is kept of tokens is in bfloat16; factors and their gradients are float32."""
    import torch

    policy = load(model_of("llama"), dtype="bfloat16")
    layer = policy.adapted[0].module
    given = torch.randn((1, 50, layer.in_features), dtype=torch.bfloat16).requires_grad_()
    with kept() as found:
        out = layer(given)
    assert out.dtype == torch.bfloat16
    assert {one.dtype for one in found if 50 in one.shape} == {torch.bfloat16}
    out.float().sum().backward()
    assert given.grad is not None and given.grad.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


# --- updates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
def test_a_shared_step_with_dropout_is_a_function_of_its_draw(tiny_model_dir: Path, checkpoint: bool) -> None:
    """The gradient is the slope of the loss under one draw: a recomputed layer draws the same."""
    lora = {**LORA, "dropout": 0.5}
    policy = load(tiny_model_dir, lora_parameters=lora, grad_checkpoint=checkpoint, num_layers=2)
    batch = dpo_batch(policy, parts=[[0, 1], [2, 3]], share=True)
    assert all(part.prompts.shape[1] for part in batch.parts)
    here = policy.values()

    def at(values: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        policy.set_values(values)
        step = make_step(policy, resolve_objective("dpo"), optimizer="sgd", max_grad_norm=None, seed=4)
        loss = step(batch, 0.0).loss
        step.n_drawn = 0
        return loss, step.gradients(batch)

    _, gradient = at(here)
    norm = length(gradient)
    ways = [at({name: here[name] + size * gradient[name] / norm for name in here})[0] for size in (1e-2, -1e-2)]
    assert (ways[0] - ways[1]) / 2e-2 == pytest.approx(norm, rel=2e-2)


def test_a_coupled_objective_reads_shared_prompts_twice(tiny_model_dir: Path) -> None:
    """Both passes, and the same update as of whole rows."""
    policy = load(tiny_model_dir)
    policy.set_values(jittered(policy.values(), 0.1))
    rows, objective = with_longer_prompts(rows_with_everything(4)), resolve_objective("kto")
    batches = [batch_of(policy, rows, objective, [[0, 1], [2, 3]], share=share) for share in (True, False)]
    found = [make_step(policy, objective).gradients(batch) for batch in batches]
    assert batches[0].parts[0].prompts.shape[1] and not batches[1].parts[0].prompts.shape[1]
    difference = {name: value - found[1][name] for name, value in found[0].items()}
    assert length(difference) < 1e-5 * length(found[1])


def test_an_unknown_tensor_is_refused() -> None:
    """Finds sparse attention whose choice of blocks is dropped: rows as short as the probe's do not show it."""
    import torch

    from mlxpref.errors import ModelError
    from mlxpref.torch_backend.prefix import _Call

    def asks(**more: Any) -> bool:
        return _Call(torch.nn.Linear(1, 1), None, "sdpa", more)._asks_more()

    assert not asks(position_ids=torch.zeros(1), scaling=0.1)
    with pytest.raises(ModelError, match="block_indices"):
        asks(position_ids=torch.zeros(1), block_indices=torch.zeros(1))
