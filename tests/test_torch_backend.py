"""The PyTorch room against transformers' own plain forward and against the MLX room: log-probs and gradients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.errors import ConfigError, ModelError
from tests.test_mlx_exactness import random_rows
from tests.torch_models import (
    CHANGES,
    assert_gradients,
    assert_logps,
    jittered,
    load_both,
    merged_model,
    plain_logps,
    read,
    weighted,
    weighted_batch,
    write_model,
)

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.mlx]

EXPERTS = ("mixtral", "qwen3_moe")
ADAPTABLE = [name for name in CHANGES if name != "mamba"]


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    import mlx.core as mx

    mx.disable_compile()  # tracing so many graphs once each would cost more than it saves
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Any:
    folder = tmp_path_factory.mktemp("architectures")

    def write(name: str, **changes: Any) -> Path:
        place = folder / "-".join([name, *changes])
        return place if place.exists() else write_model(place, name, tiny_model_dir, **changes)

    return write


def gradients(backend: Any, policy: Any, rows: Any, *, share: bool) -> dict[str, np.ndarray]:
    held = policy.values()
    found = backend.make_step(policy, weighted).gradients(weighted_batch(rows, share=share))
    policy.set_values(held)
    return found


def agree(path: Path, *, shares: tuple[bool, ...] = (True, False), **options: Any) -> tuple[Any, Any]:
    """Both rooms: names and shapes of what trains, log-probs and gradients, prompts shared and not."""
    from mlxpref import mlx_backend, torch_backend

    ours, theirs = load_both(path, **options)
    shapes = [{name: value.shape for name, value in one.values().items()} for one in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.n_parameters == theirs.n_parameters and ours.n_trainable == theirs.n_trainable
    assert ours.base_fingerprint == theirs.base_fingerprint and ours.fingerprint != theirs.fingerprint
    assert theirs.network.split_head
    rows = random_rows(int(ours.config["vocab_size"]), n=4)
    expected = gradients(mlx_backend, ours, rows, share=ours.share_prompts)
    for share in shares:
        found = read(torch_backend, theirs, rows, share=share)
        assert_logps(found, read(mlx_backend, ours, rows, share=share))
        assert_gradients(gradients(torch_backend, theirs, rows, share=share), expected)
    return ours, theirs


@pytest.mark.parametrize("name", ADAPTABLE)
def test_lora_is_that_of_the_merged_model_and_of_mlx(name: str, model_of: Any) -> None:
    """Finds: a wrong mask, position, scale, soft cap, router or head; modules that only one room adapts."""
    from mlxpref import torch_backend

    path = model_of(name)
    _, policy = agree(path)
    rows = random_rows(int(policy.config["vocab_size"]), n=4)
    assert_logps(read(torch_backend, policy, rows, share=False), plain_logps(merged_model(path, policy), rows))
    base = read(torch_backend, policy, rows, share=False, reference=True)
    policy.set_values({key: 0 * value for key, value in policy.values().items()})
    assert_logps(base, plain_logps(merged_model(path, policy), rows))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "gpt_neox"])
def test_dora_is_that_of_the_merged_model_and_of_mlx(name: str, model_of: Any) -> None:
    """Finds: norms over the wrong axis, magnitudes of the low-rank term alone, biases scaled with the weights."""
    from mlxpref import torch_backend

    path = model_of(name)
    _, policy = agree(path, fine_tune_type="dora", shares=(False,))
    rows = random_rows(int(policy.config["vocab_size"]), n=4)
    assert_logps(read(torch_backend, policy, rows, share=False), plain_logps(merged_model(path, policy), rows))


@pytest.mark.parametrize("name", CHANGES)
def test_full_fine_tuning_is_that_of_mlx(name: str, model_of: Any) -> None:
    """Finds: tied matrices with half their gradient, matrices of experts exchanged, layouts not mlx-lm's."""
    agree(model_of(name), fine_tune_type="full", num_layers=-1, shares=(False,))


def test_the_last_layers_of_a_full_fine_tune(model_of: Any) -> None:
    _, policy = agree(model_of("qwen3"), fine_tune_type="full", num_layers=1, shares=(False,))
    assert {name.split(".")[2] for name in policy.values()} == {"2"}


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", {"num_layers": 1, "keys": ["self_attn.q_proj", "lm_head"]}),
        ("llama", {"num_layers": -1, "keys": ["mlp.up_proj", "model.embed_tokens"]}),
        ("llama", {"num_layers": 1, "keys": ["lm_head"], "fine_tune_type": "dora"}),
        ("mixtral", {"keys": ["self_attn.q_proj", "self_attn.v_proj"]}),
        ("mixtral", {"keys": ["self_attn.q_proj"], "fine_tune_type": "dora"}),
        ("mixtral", {"keys": ["block_sparse_moe.gate"]}),
        ("qwen3_moe", {"keys": ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"]}),
        ("gpt_neox", {"keys": ["attention.query_key_value", "model.embed_in"]}),
    ],
    ids=["head", "embedding", "dora-head", "attention", "dora-attention", "router", "experts", "neox-embedding"],
)
def test_chosen_modules_are_adapted_as_in_mlx(name: str, options: dict[str, Any], model_of: Any) -> None:
    """Finds: keys outside the layers that are passed over without a word."""
    from mlxpref import torch_backend

    options = {**options, "lora_parameters": {"rank": 4, "scale": 2.0, "keys": options["keys"]}}
    del options["keys"]
    _, policy = agree(model_of(name), shares=(False,), **options)
    rows = random_rows(300, n=2)
    expected = plain_logps(merged_model(model_of(name), policy), rows)
    assert_logps(read(torch_backend, policy, rows, share=False), expected)


def test_dense_layers_between_experts_are_adapted(model_of: Any) -> None:
    """peft takes a ``gate_proj`` of this architecture for one of the experts', and would adapt those."""
    _, policy = agree(model_of("qwen3_moe", mlp_only_layers=[1]), num_layers=-1, shares=(False,))
    assert "model.layers.1.mlp.gate_proj.lora_a" in policy.values()


def test_doras_dropout_is_in_its_low_rank_term_alone(model_of: Any) -> None:
    """peft drops the base's inputs, too: with a term of zero and another magnitude, dropout would change the output."""
    import torch

    from mlxpref import torch_backend

    lora = {"rank": 4, "scale": 2.0, "dropout": 0.5}
    policy = torch_backend.load_policy(str(model_of("gpt2")), fine_tune_type="dora", lora_parameters=lora)
    values = {name: value * (1.3 if name.endswith(".m") else 1) for name, value in policy.values().items()}
    policy.set_values(values)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        quiet = policy.model(ids).logits
        policy.model.train()
        np.testing.assert_allclose(policy.model(ids).logits.numpy(), quiet.numpy(), atol=1e-5)
        policy.set_values(jittered(values))
        assert (policy.model(ids).logits - policy.model(ids).logits).abs().max() > 1e-2


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mixtral", {"fine_tune_type": "dora"}, r"DoRA does not reach .*block_sparse_moe\.gate.*lora_parameters\.keys"),
        ("mixtral", {"dropout": 0.1}, r"dropout does not reach .*block_sparse_moe\.gate"),
        ("qwen3_moe", {"keys": ["mlp.switch_mlp.gate_proj"]}, "is one parameter .*: adapt all of gate_proj, up_proj"),
        ("mamba", {}, r"reads the weights of .*dt_proj without calling"),
        ("mamba", {"keys": ["mixer.in_proj", "mixer.dt_proj"]}, r"reads the weights of .*dt_proj without calling"),
        ("gemma2", {"keys": ["model.embed_tokens"]}, r"model\.embed_tokens is the head too.*train on MLX"),
        ("llama", {"keys": ["model.embed_tokens"], "dropout": 0.1}, r"leave model\.embed_tokens out"),
        ("llama", {"keys": ["model.embed_tokens"], "fine_tune_type": "dora"}, r"DoRA .*leave model\.embed_tokens out"),
        ("qwen3", {"keys": ["lm_head"]}, r"lm_head match no module.*known: .*self_attn\.v_proj, model\.embed_tokens$"),
        ("llama", {"keys": ["attn.q", "self_attn.q_proj"]}, r"lora keys attn\.q match no module"),
    ],
)  # fmt: skip
def test_what_would_be_another_adapter_than_mlx_lms_is_refused(
    name: str, options: dict[str, Any], message: str, model_of: Any
) -> None:
    """Finds: adapters that do nothing, or something else than their twins in MLX, without a word."""
    from mlxpref import torch_backend

    lora = {"rank": 4, "scale": 2.0, **{key: options[key] for key in ("keys", "dropout") if key in options}}
    kind = options.get("fine_tune_type", "lora")
    with pytest.raises(ConfigError, match=message):
        torch_backend.load_policy(str(model_of(name)), fine_tune_type=kind, lora_parameters=lora)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_layers": 0}, "num_layers 0 trains nothing"),
        ({"fine_tune_type": "loha"}, "unknown fine_tune_type 'loha'"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; one of float32"),
        ({"lora_parameters": {"alpha": 1.0, "scale": 1.0}}, "not both"),
        ({"lora_parameters": {"ranks": 1}}, "unknown lora_parameters: ranks"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str, tiny_model_dir: Path) -> None:
    from mlxpref import torch_backend

    with pytest.raises(ConfigError, match=message):
        torch_backend.load_policy(str(tiny_model_dir), **options)


def test_four_bits_need_cuda(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mlxpref import torch_backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"load_in_4bit needs an NVIDIA GPU .*train on MLX"):
        torch_backend.load_policy(str(tiny_model_dir), load_in_4bit=True)


def changed(folder: Path, source: Path, **config: Any) -> Path:
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quantization": {"bits": 4}}, "quantised for MLX.*load_in_4bit"),
        ({"model_type": "rwkv7"}, "knows no language model of this architecture"),
        ({"model_type": "vit"}, "knows no language model of this architecture"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "comes with its own code"),
        ({"num_hidden_layers": 2}, r"do not fit(.|\n)*hold besides model\.layers\.2\."),
        ({"num_hidden_layers": 4}, r"do not fit(.|\n)*lack model\.layers\.3\."),
        ({"intermediate_size": 48}, r"do not fit(.|\n)*in another shape model\.layers\.0\.mlp"),
        ({"hidden_size": "many"}, r"config\.json is refused .*hidden_size"),
        ({"tie_word_embeddings": True}, "the weights hold another one.*tie_word_embeddings: false"),
    ],
)
def test_model_folders_that_are_not_what_they_say(
    config: dict[str, Any], message: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Finds: random weights in place of missing ones, layers left out, heads that only one library reads."""
    from mlxpref import torch_backend

    with pytest.raises(ModelError, match=message):
        torch_backend.load_policy(str(changed(tmp_path / "model", tiny_model_dir, **config)))


def test_broken_model_folders(tmp_path: Path, tiny_model_dir: Path) -> None:
    """No weights, half of them, no tokenizer, no folder: no traceback of another library."""
    from safetensors.numpy import load_file, save_file

    from mlxpref import torch_backend

    place = changed(tmp_path / "model", tiny_model_dir)
    weights = place / "model.safetensors"
    whole = weights.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            torch_backend.load_policy(str(place))

    weights.write_bytes(whole[:-5000])
    refused("incomplete or damaged")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(r"lack model\.layers\.1\.mlp\.up_proj\.weight")
    weights.unlink()
    refused("no weights")
    weights.write_bytes(whole)
    for file in place.glob("*token*"):
        file.unlink()
    refused("no tokenizer")
    (place / "config.json").unlink()
    refused(r"no config\.json")
    place = tmp_path / "nowhere"
    refused("no such folder")


def test_a_head_stored_beside_its_twin_is_one_matrix(tmp_path: Path, model_of: Any) -> None:
    """Both names of one matrix in a checkpoint: a full fine-tune must not train two."""
    from safetensors.numpy import load_file, save_file

    path = changed(tmp_path / "twice", model_of("qwen3"))
    weights = load_file(path / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]},
        path / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    agree(path, fine_tune_type="full", num_layers=-1, shares=(False,))


def test_a_tied_head_stored_alone_is_loaded(assets: Path) -> None:
    """mlx-lm refuses such a checkpoint; here it must give what the mended one gives there."""
    from mlxpref import mlx_backend, torch_backend

    raw = torch_backend.load_policy(str(assets / "models" / "tinystories-656k-raw"), trainable=False)
    mended = mlx_backend.load_policy(str(assets / "models" / "tinystories-656k"), trainable=False)
    rows = random_rows(300, n=2)
    assert_logps(read(torch_backend, raw, rows, share=False), read(mlx_backend, mended, rows, share=False))


# --- texts -------------------------------------------------------------------------------------

PROMPTS = ("Once upon a time", "The little dog", "Lily", "One day a boy named Tim went to the park with his friend and")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_greedy_texts_are_those_of_mlx(model_of: Any, kind: str) -> None:
    """Finds: pads that are read, positions counted from the pads, an adapter in the reference, a late end."""
    from mlxpref import mlx_backend, torch_backend

    ours, theirs = load_both(model_of("llama"), fine_tune_type=kind)
    for policy in (ours, theirs):
        policy.set_values(jittered(policy.values(), 0.3, seed=2))
    prompts = [theirs.tokenizer.encode(text) for text in PROMPTS]
    found = {}
    for adapter in (True, False):
        options = {"max_tokens": 24, "adapter": adapter}
        found[adapter] = torch_backend.generate(theirs, prompts, **options)
        assert found[adapter] == mlx_backend.generate(ours, prompts, **options)
        alone = [torch_backend.generate(theirs, [one], **options)[0] for one in prompts]
        assert found[adapter] == alone
    assert found[True] != found[False]


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_greedy_texts_of_trained_models(name: str, assets: Path) -> None:
    from mlxpref import mlx_backend, torch_backend

    path = str(assets / "models" / name)
    ours, theirs = (one.load_policy(path, trainable=False) for one in (mlx_backend, torch_backend))
    prompts = [theirs.tokenizer.encode(text) for text in PROMPTS]
    found = torch_backend.generate(theirs, prompts, max_tokens=40)
    assert found == mlx_backend.generate(ours, prompts, max_tokens=40)
    assert all(len(text) > 20 for text in found)


def test_generation_ends_where_the_model_says(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The end tokens of generation_config.json, and none of its penalties."""
    from mlxpref import torch_backend

    free = torch_backend.load_policy(str(tiny_model_dir), trainable=False)
    prompts = [free.tokenizer.encode(text) for text in PROMPTS]
    texts = torch_backend.generate(free, prompts, max_tokens=12)
    path = changed(tmp_path / "model", tiny_model_dir)
    said = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 2.0, "top_k": 3, "no_repeat_ngram_size": 1}
    (path / "generation_config.json").write_text(json.dumps(said))
    policy = torch_backend.load_policy(str(path), trainable=False)
    assert torch_backend.generate(policy, prompts, max_tokens=12) == texts
    ids = prompts[0]
    for _ in range(12):
        ids = [*ids, int(logps_after(free, ids).argmax())]
    own = ids[len(prompts[0]) :]
    assert texts[0] == free.tokenizer.decode(own)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [own[5], 5]}))
    policy = torch_backend.load_policy(str(path), trainable=False)
    until = own[: own.index(own[5])]
    assert torch_backend.generate(policy, prompts[:1], max_tokens=12) == [free.tokenizer.decode(until)]


def test_sampling_is_seeded_and_shaped_as_in_mlx_lm(tiny_model_dir: Path) -> None:
    """Finds: a seed, a temperature or a nucleus that does nothing; a nucleus of flattened probabilities."""
    from mlxpref import torch_backend

    policy = torch_backend.load_policy(str(tiny_model_dir), trainable=False)
    prompts = [policy.tokenizer.encode("Lily")] * 40

    def texts(**options: Any) -> list[str]:
        return torch_backend.generate(policy, prompts, max_tokens=1, **options)

    greedy = texts()
    assert len(set(greedy)) == 1
    drawn = texts(temperature=1.0, seed=1)
    assert drawn == texts(temperature=1.0, seed=1) != texts(temperature=1.0, seed=2)
    assert len(set(drawn)) > 5
    assert texts(temperature=1.0, top_p=1e-6) == greedy
    assert texts(temperature=1e-4) == greedy
    # At this temperature everything is as likely: only a nucleus taken before it leaves few.
    top = logps_after(policy, prompts[0])
    share = 0.1
    few = int((np.cumsum(np.sort(np.exp(top))[::-1]) < share).sum()) + 1
    assert len(set(texts(temperature=1e4, top_p=share))) <= few < len(set(texts(temperature=1e4)))


def logps_after(policy: Any, ids: list[int]) -> np.ndarray:
    """(V,) log-probs of the next token, float64."""
    import torch

    with torch.no_grad():
        logits = policy.model(torch.tensor([ids])).logits[0, -1].double().numpy()
    return logits - np.logaddexp.reduce(logits)


# --- which room --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "there, expected",
    [
        ({"installed": ("mlx", "torch"), "metal": True}, "mlx"),
        ({"installed": ("mlx", "torch"), "mlx_cuda": True, "cuda": True}, "mlx"),
        ({"installed": ("mlx", "torch"), "cuda": True}, "torch"),
        ({"installed": ("mlx", "torch")}, "mlx"),
        ({"installed": ("torch",)}, "torch"),
        ({"installed": ("torch",), "cuda": True}, "torch"),
        ({"installed": ("torch",), "metal": True}, "torch"),
        ({"installed": ("mlx",), "cuda": True}, "mlx"),
        ({"installed": ()}, "mlx"),
    ],
)
def test_auto_takes_what_is_there(there: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxpref import backends

    monkeypatch.setattr(backends, "_lacking", lambda name: [] if name in there["installed"] else [name])
    for found in ("metal", "mlx_cuda", "cuda"):
        monkeypatch.setattr(backends, f"_has_{found}", lambda found=found: there.get(found, False))
    assert backends.choose() == expected


def test_mlxs_cuda_build_counts_with_a_driver_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds: a build for CUDA taken for a GPU, and a GPU taken for that build."""
    from mlxpref import backends

    monkeypatch.setattr(backends, "_has_metal", lambda: False)
    monkeypatch.setattr(backends, "_lacking", lambda name: [])
    builds: set[str] = set()
    monkeypatch.setattr(backends, "_is_installed", lambda package: package in builds)
    versions = {"torch": "2.13.0+cpu"}
    monkeypatch.setattr(backends.importlib.metadata, "version", versions.__getitem__)
    for driver, build, version, expected in (
        (False, "mlx-cuda-13", "2.13.0", "mlx"),
        (True, "mlx-cuda-13", "2.13.0", "mlx"),
        (True, "mlx-cuda-12", "2.13.0", "mlx"),
        (True, "mlx-cpu", "2.13.0", "torch"),
        (True, "mlx-cpu", "2.13.0+cpu", "mlx"),
        (False, "mlx-cpu", "2.13.0", "mlx"),
    ):
        builds.clear()
        builds.update({build, "torch"})
        versions["torch"] = version
        monkeypatch.setattr(backends, "_has_cuda_driver", lambda driver=driver: driver)
        assert backends.choose() == expected, (driver, build, version)
