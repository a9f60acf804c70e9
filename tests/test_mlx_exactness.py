"""The shared, bucketed, chunked forward against an unpadded one-example plain forward of the model.

The witness below calls the mlx-lm model itself on one whole row at a time and takes a log-softmax:
no cache, no padding, no chunks, nothing of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.data.batching import collate
from mlxpref.data.plan import plan_pass
from mlxpref.records import Tokenized
from tests.architectures import ARCHITECTURES, QUANTISABLE, WAYS, config_of, write_model

pytestmark = pytest.mark.mlx

LAYOUT = (1e-4, 1e-4)
"""Nats, and share of a gradient's largest entry, by which two layouts of one computation may differ."""
KERNELS = (3e-4, 3e-4)
"""The same for two computations: in float32 either is up to 2e-4 nats from float64 on these models."""


def random_rows(vocabulary: int, n: int = 6, seed: int = 0) -> list[Tokenized]:
    """Prompts of 9–40 tokens (past any sliding window), responses of 2–45."""
    draw = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return draw.integers(3, vocabulary, draw.integers(low, high)).astype(np.int32)

    return [Tokenized(ids(9, 40), (ids(2, 45), ids(2, 45)), example_id=str(i)) for i in range(n)]


def jitter(policy: Any) -> None:
    """Move a fresh adapter off zero, so that it takes part and both factors get gradients."""
    import mlx.core as mx

    mx.random.seed(7)
    policy.set_masters({n: v + 0.05 * mx.random.normal(v.shape) for n, v in policy.masters.items()})


def weight_of(row: int, slot: int, t: Any) -> Any:
    """A fixed weight for each scored token, so that a token in the wrong place changes the gradient."""
    return np.sin(1.0 + row + 3 * slot + 0.37 * np.asarray(t))


def witness(policy: Any, rows: list[Tokenized]) -> tuple[list[list[np.ndarray]], dict[str, np.ndarray]]:
    """Per-token log-probs of every response, and gradients of their weighted sum, one row at a time."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    def score(parameters: Any, prompt: np.ndarray, response: np.ndarray, weights: np.ndarray) -> Any:
        policy.model.update(tree_unflatten(list(parameters.items())))
        tokens = mx.array(np.concatenate([prompt, response])[None])
        logits = policy.model(tokens[:, :-1]).astype(mx.float32)
        logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        picked = mx.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[0, len(prompt) - 1 :, 0]
        return (picked * mx.array(weights)).sum(), picked

    policy.model.eval()
    start = policy.trainable()
    logps, total = [], None
    for i, row in enumerate(rows):
        logps.append([])
        for k, response in enumerate(row.response_ids):
            weights = weight_of(i, k, np.arange(len(response))).astype(np.float32)
            (_, picked), grads = mx.value_and_grad(score)(start, row.prompt_ids, response, weights)
            total = grads if total is None else {n: total[n] + grads[n] for n in total}
            mx.eval(picked, total)
            logps[-1].append(np.array(picked))
    policy.update(start)
    assert total is not None
    return logps, {name: np.array(value) for name, value in dict(tree_flatten(total)).items()}


def ours(policy: Any, rows: list[Tokenized], share: bool) -> tuple[list[list[np.ndarray]], dict[str, np.ndarray]]:
    """The same through plan, collation and the network of the machine room, compiled."""
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    from mlxpref.mlx_backend.arrays import to_mlx

    policy.model.eval()
    start = policy.trainable()
    logps: list[list[np.ndarray]] = [[] for _ in rows]
    total: dict[str, Any] = {}
    plan = plan_pass(rows, micro_batch_tokens=400, share_prompts=share)
    for (part,) in plan.steps:
        batch = collate(rows, part)
        weights = np.zeros(batch.mask.shape, np.float32)
        for b, i in enumerate(part.rows):
            for k in range(2):
                weights[b, k] = weight_of(i, k, np.arange(weights.shape[2]))

        def score(parameters: Any, arrays: Any, weights: Any) -> Any:
            policy.model.update(tree_unflatten(list(parameters.items())))
            found = policy.network.token_logps(arrays, differentiate=True)
            return (found.tokens * weights * found.mask).sum(), found.tokens

        compiled = mx.compile(mx.value_and_grad(score))
        (_, tokens), grads = compiled(start, to_mlx(batch), mx.array(weights))
        mx.eval(tokens, grads)
        policy.update(start)
        total = grads if not total else {n: total[n] + grads[n] for n in total}
        for b, i in enumerate(part.rows):
            logps[i] = [np.array(tokens[b, k, : len(rows[i].response_ids[k])]) for k in range(2)]
    return logps, {name: np.array(value) for name, value in total.items()}


def assert_same(found: Any, expected: Any, tolerance: tuple[float, float] = LAYOUT) -> None:
    pairs = [(a, b) for f, e in zip(found[0], expected[0], strict=True) for a, b in zip(f, e, strict=True)]
    gap = max(np.abs(a - b).max() for a, b in pairs)
    mean = np.mean([(a - b).mean() for a, b in pairs])
    assert gap <= tolerance[0], f"log-probs differ by {gap:.2e} nats"
    assert abs(mean) <= tolerance[0] / 10, f"log-probs drift by {mean:.2e} nats"
    assert found[1].keys() == expected[1].keys()
    norm = np.sqrt(sum(np.square(v, dtype=np.float64).sum() for v in expected[1].values()))
    assert norm > 1e-3, "the witness has no gradient to compare with"
    for name, value in expected[1].items():
        scale = max(np.abs(value).max(), 1e-3 * norm)
        gap = np.abs(found[1][name] - value).max() / scale
        assert gap <= tolerance[1], f"gradient of {name} differs by {gap:.2e} of its largest entry"


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Any:
    folder = tmp_path_factory.mktemp("architectures")

    def write(name: str) -> str:
        if not (folder / name / "config.json").exists():
            write_model(folder / name, config_of(name), tiny_model_dir)
        return str(folder / name)

    return write


def load(path: str, **options: Any) -> Any:
    from mlxpref import mlx_backend

    policy = mlx_backend.load_policy(path, **{"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}, **options})
    jitter(policy)
    return policy


def vocabulary(policy: Any) -> int:
    return int(policy.config["vocab_size"])


@pytest.mark.parametrize("own", [False, True], ids=["mlx's kernels", "own kernels"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_forward_is_exact(name: str, own: bool, model_of: Any) -> None:
    """A wrong mask, offset, gather, bucket, chunk or head would move a log-prob or a gradient."""
    policy = load(model_of(name))
    assert (policy.way, policy.network.own_kernels) == (WAYS[name], True)
    policy.network.own_kernels = own
    rows = random_rows(vocabulary(policy))
    expected = witness(policy, rows)
    assert_same(ours(policy, rows, share=policy.share_prompts), expected, KERNELS if own else LAYOUT)


@pytest.mark.parametrize("own", [False, True], ids=["mlx's kernels", "own kernels"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_checkpointed_gradients_are_exact(name: str, own: bool, model_of: Any) -> None:
    """Arrays captured by a checkpoint get no gradient: the loss stays right, the gradient does not."""
    policy = load(model_of(name), grad_checkpoint=True)
    policy.network.own_kernels = own
    rows = random_rows(vocabulary(policy))
    tolerance = KERNELS if own else LAYOUT
    assert_same(ours(policy, rows, share=policy.share_prompts), witness(policy, rows), tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"fine_tune_type": "dora"},
        {"fine_tune_type": "full", "num_layers": -1},
        {"fine_tune_type": "full", "num_layers": 1},
        {"fine_tune_type": "full", "num_layers": -1, "grad_checkpoint": True},
        {"lora_parameters": {"rank": 4, "scale": 2.0, "keys": ["self_attn.q_proj", "lm_head"]}},
        {"lora_parameters": {"rank": 4, "alpha": 8.0, "keys": ["mlp.up_proj", "model.embed_tokens"]}, "num_layers": -1},
    ],
    ids=["dora", "full", "full-last", "full-checkpointed", "head", "embedding"],
)
def test_every_kind_of_training_is_exact(
    options: dict[str, Any], model_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads and embeddings that train take another way through the chunks, of which there are several."""
    from mlxpref.mlx_backend import logps

    monkeypatch.setattr(logps, "head_rows", lambda vocabulary, on_cpu: 16)
    policy = load(model_of("llama"), **options)
    rows = random_rows(vocabulary(policy))
    assert_same(ours(policy, rows, share=True), witness(policy, rows))


def test_tied_full_fine_tuning_is_exact(model_of: Any) -> None:
    """A tied matrix gets gradients from both ends."""
    policy = load(model_of("qwen3"), fine_tune_type="full", num_layers=-1)
    rows = random_rows(vocabulary(policy))
    assert_same(ours(policy, rows, share=True), witness(policy, rows))


def test_more_rows_than_one_head_chunk(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk boundary in the wrong place would drop or repeat a token."""
    from mlxpref.mlx_backend import logps

    monkeypatch.setattr(logps, "head_rows", lambda vocabulary, on_cpu: 16)
    policy = load(model_of("llama"))
    rows = random_rows(vocabulary(policy))
    assert_same(ours(policy, rows, share=True), witness(policy, rows))


def test_quantised_base_equals_its_dequantised_weights(tmp_path: Path, tiny_model_dir: Path) -> None:
    """QLoRA's gradients are those of the dequantised model, to rounding."""
    import json

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    from mlxpref import mlx_backend

    whole = write_model(tmp_path / "whole", QUANTISABLE, tiny_model_dir, gain=1.5)
    model, config = load_model(whole)
    nn.quantize(model, group_size=32, bits=4)
    quantised = write_model(tmp_path / "quantised", QUANTISABLE, tiny_model_dir, gain=1.5)
    mx.save_safetensors(str(quantised / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {**config, "quantization": {"group_size": 32, "bits": 4}}
    (quantised / "config.json").write_text(json.dumps(config))
    dense = write_model(tmp_path / "dense", QUANTISABLE, tiny_model_dir, gain=1.5)
    weights = dict(tree_flatten(load_model(whole)[0].parameters()))
    for name, module in model.named_modules():
        if hasattr(module, "bits"):
            weights[f"{name}.weight"] = mx.dequantize(
                module.weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits
            )
    mx.save_safetensors(str(dense / "model.safetensors"), weights)
    first, second = load(str(quantised)), load(str(dense))
    assert mlx_backend.load_policy(str(quantised)).n_parameters == second.n_parameters
    rows = random_rows(vocabulary(first))
    assert_same(ours(first, rows, share=True), witness(second, rows))


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_real_models_on_real_text(name: str, assets: Path) -> None:
    """Really trained weights on real pairs of the length users have."""
    from mlxpref.data.relabel import unconditioned
    from mlxpref.data.sources import SourceSpec, read_source
    from mlxpref.data.tokenization import load_tokenizer, tokenize

    path = str(assets / "models" / name)
    policy = load(path)
    examples, _ = read_source(SourceSpec(str(assets / "data/ultrafeedback/eval.jsonl"), limit=5))
    tokenizer = load_tokenizer(path)
    rows = [tokenize(unconditioned(example), tokenizer, max_length=256) for example in examples]
    kept = [row for row in rows if isinstance(row, Tokenized)]
    assert len(kept) >= 3
    assert_same(ours(policy, kept, share=True), witness(policy, kept))


def test_adapter_off_gives_the_base(model_of: Any) -> None:
    """The reference must not feel the adapter, and the policy must get it back."""
    from mlxpref import mlx_backend

    policy = load(model_of("llama"))
    base = mlx_backend.load_policy(model_of("llama"), trainable=False)
    rows = random_rows(vocabulary(policy))
    (part,) = plan_pass(rows, micro_batch_tokens=10_000).steps[0]
    batch = collate(rows, part)
    before = mlx_backend.token_logps(policy, batch).tokens
    off = mlx_backend.token_logps(policy, batch, reference=True).tokens
    assert np.array_equal(off, mlx_backend.token_logps(base, batch).tokens)
    assert np.abs(off - before).max() > 1e-2
    assert np.array_equal(mlx_backend.token_logps(policy, batch).tokens, before)


def test_pad_columns_change_no_logp(model_of: Any) -> None:
    """Padding that reaches a scored token would show as a different log-prob."""
    from dataclasses import replace

    from mlxpref import mlx_backend

    policy = load(model_of("llama"))
    rows = random_rows(vocabulary(policy), n=2)
    (part,) = plan_pass(rows, micro_batch_tokens=10_000).steps[0]
    wider = replace(part, shape=replace(part.shape, rows=tuple(t + 32 for t in part.shape.rows)))
    tight = mlx_backend.token_logps(policy, collate(rows, part)).tokens
    loose = mlx_backend.token_logps(policy, collate(rows, wider)).tokens
    assert np.abs(loose[..., : tight.shape[-1]] - tight).max() < 2e-5
    assert not loose[..., tight.shape[-1] :].any()


def test_probe_refuses_what_is_not_exact(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that serves the wrong prompt must send the model down the plain way, not train wrongly."""
    from mlxpref import mlx_backend
    from mlxpref.mlx_backend import prefix

    serving = prefix.serving
    monkeypatch.setattr(prefix, "serving", lambda recorded, prompt, offset: serving(recorded, prompt * 0, offset))
    assert mlx_backend.load_policy(model_of("llama"), num_layers=2).way == "plain"


def test_probe_command_prints_the_way(model_of: Any) -> None:
    from click.testing import CliRunner

    from mlxpref.cli.probe import command

    result = CliRunner().invoke(command, [model_of("gemma2"), model_of("mamba"), "--num-layers", "2"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert [line[1:3] for line in lines[1:]] == [["gemma2", "shared"], ["mamba", "shared"]]
