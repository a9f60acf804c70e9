"""Adapters carried over between mlx-lm and PEFT: the same function, the same bits on the way back, and what is refused.

The witnesses are the libraries themselves: the logits of transformers' model under plain ``peft`` and those of
mlx-lm's, and the names of the modules that either has. Finds: factors not turned, a scale lost or applied twice, a
rank or layer of another module, a name that only one side knows, a setting of PEFT's that is ignored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import ARCHITECTURES, config_of
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mlxpref import names
from mlxpref.adapters import read_adapter
from mlxpref.cli import main
from mlxpref.conversion import as_mlx_folder, convert, facts_of, kind_of, write_converted
from mlxpref.conversion.settings import HARMLESS, REFUSED, TAKEN_FOR_EXPERTS, problems, rank_and_scale
from mlxpref.errors import AdapterError, RunError, UsageError
from mlxpref.files import safetensors_header
from mlxpref.tensors import Tensor, write_tensors

_MARKS = (
    pytest.mark.mlx,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
)


def in_both(test: Any) -> Any:
    """The marks of a test that runs models of both libraries, whose own deprecations are not its subject."""
    for mark in _MARKS:
        test = mark(test)
    return test


IDS = [[5, 9, 130, 77, 200, 31, 8]]
AT = "model.layers.1.self_attn.q_proj"
TIGHT = 1e-4
"""Largest difference of logits that spread by about 1 and that the adapters move by 1 and more."""

Weights = dict[str, np.ndarray]


# --- adapters and models to convert ------------------------------------------------------------


WIDTHS = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16), "mlp.down_proj": (64, 32)}
"""Inputs and outputs of some of the tiny llama's matrices."""
OUTSIDE = {"lm_head": (32, 384), "model.embed_tokens": (384, 32)}
"""Inputs and outputs of its head, tokens and width of its embedding."""


def random_tensor(rng: np.random.Generator, *shape: int, dtype: str = "F32") -> Tensor:
    values = rng.standard_normal(shape).astype(np.float32)
    if dtype == "F16":
        values = values.astype(np.float16)
    if dtype == "BF16":
        values = (values.view("<u4") & 0xFFFF0000).view("<f4")
    return Tensor(dtype, shape, lambda: values.astype(np.float64))


@pytest.fixture
def make_mlx(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """A function that writes an adapter as mlx-lm would."""

    def make(
        name: str = "mlx", *, kind: str = "lora", layers: tuple[int, ...] = (1, 2), keys: tuple[str, ...] = (*WIDTHS,),
        outside: tuple[str, ...] = (), full_names: bool = False, dtype: str = "F32", rank: int = 4, scale: float = 2.5,
        model: Any = None, facts: dict[str, Any] | None = None,
    ) -> Path:  # fmt: skip
        rng = np.random.default_rng(0)
        modules = {f"model.layers.{layer}.{key}": WIDTHS[key] for layer in layers for key in keys}
        tensors = {}
        for at, (inputs, outputs) in (modules | {at: OUTSIDE[at] for at in outside}).items():
            tensors[f"{at}.lora_a"] = random_tensor(rng, inputs, rank, dtype=dtype)
            tensors[f"{at}.lora_b"] = random_tensor(rng, rank, outputs, dtype=dtype)
            if kind == "dora":
                tensors[f"{at}.m"] = random_tensor(rng, outputs)
        named = [*(modules if full_names else keys), *outside]
        config = {
            "fine_tune_type": kind, "model": str(model or tiny_model_dir), "num_layers": 3 - min(layers),
            "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": named},
        }  # fmt: skip
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name / "adapters.safetensors", tensors)
        text = json.dumps(config | ({} if facts is None else {"mlxpref": facts}))
        (tmp_path / name / "adapter_config.json").write_text(text)
        return tmp_path / name

    return make


@pytest.fixture
def make_peft(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """A function that writes an adapter as PEFT would: modules by transformers' names → rank."""

    def make(name: str = "peft", ranks: dict[str, int] | None = None, **settings: Any) -> Path:
        rng = np.random.default_rng(1)
        arrays: Weights = {}
        for at, rank in (ranks or {AT: 4}).items():
            inputs, outputs = WIDTHS.get(at.split(".", 3)[-1], (32, 32))
            arrays[f"base_model.model.{at}.lora_A.weight"] = rng.standard_normal((rank, inputs)).astype(np.float32)
            arrays[f"base_model.model.{at}.lora_B.weight"] = rng.standard_normal((outputs, rank)).astype(np.float32)
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model_dir), "r": 4, "lora_alpha": 8}
        (tmp_path / name).mkdir()
        save_file(arrays, tmp_path / name / "adapter_model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | settings))
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Any) -> Callable[[str], Path]:
    """A function that gives the folder of a tiny random model, written by transformers."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        if name in folders:
            return folders[name]
        folder = tmp_path_factory.mktemp(name)
        config = torch_config(name, len(chat_tokenizer))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # fresh weights are too small for anything to be seen
                parameter.mul_(2.5).add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        chat_tokenizer.save_pretrained(folder)
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config_of(name.removesuffix("+tied")) | said))
        if name == "gpt2":  # as it lies on the hub
            weights = load_file(folder / "model.safetensors")
            bare = {key.removeprefix("transformer."): value for key, value in weights.items()}
            save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
        folders[name] = folder
        return folder

    return make


def torch_config(name: str, vocabulary: int) -> Any:
    from transformers import AutoConfig

    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tied = name.endswith("+tied") or name in ("gemma2", "gemma3_text", "cohere2", "gpt2")
    more = {"tie_word_embeddings": True} if tied else {}
    return AutoConfig.for_model(**{**config_of(name.removesuffix("+tied")), **tokens, **more})


def mlx_logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    import mlx.core as mx

    from mlxpref import mlx_backend

    policy = (
        mlx_backend.load_policy(str(folder), trainable=False)
        if adapter is None
        else mlx_backend.load_adapter(adapter, model_path=str(folder))
    )
    return np.array(policy.model(mx.array(IDS))[0].astype(mx.float32))


def peft_logits(folder: Path, adapter: Path) -> np.ndarray:
    """Through plain ``peft``, which warns of any key that it misses or does not know: that is an error here."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(adapter))
    with torch.no_grad():
        return np.array(model.eval()(torch.tensor(IDS)).logits[0])


def written(given: Path, out: Path, **options: Any) -> Path:
    write_converted(convert(given, **options), out)
    return out


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def set_config(folder: Path, **changes: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config_in(folder) | changes))
    return folder


def raw(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name → type, shape and bytes of every tensor."""
    header, content = safetensors_header(file), file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return {
        name: (one["dtype"], tuple(one["shape"]), content[slice(*(start + at for at in one["data_offsets"]))])
        for name, one in header.items()
    }


def delta(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """What PEFT's factors add to a weight (outputs, inputs), float64."""
    return scale * b.astype(np.float64) @ a.astype(np.float64)


# --- names -------------------------------------------------------------------------------------


NAMED = [name for name in ARCHITECTURES if name != "rwkv7"]


@in_both
@pytest.mark.parametrize("name", NAMED)
def test_names_are_those_of_both_libraries(name: str) -> None:
    """Every matrix of mlx-lm's model is a module of transformers' under the translated name, or refused by name."""
    import torch
    from mlx_lm.utils import _get_classes
    from transformers import AutoModelForCausalLM

    config = torch_config(name, 384)
    with torch.device("meta"):
        theirs = dict(AutoModelForCausalLM.from_config(config).named_modules())
    model_class, args = _get_classes(config={**config_of(name), "vocab_size": 384})
    model = model_class(args.from_dict({**config_of(name), "vocab_size": 384}))
    ours = [key for key, one in model.named_modules() if hasattr(one, "weight") and one.weight.ndim >= 2]
    for module in ours:
        try:
            path = names.to_torch(module, name)
        except AdapterError:
            assert ".switch_mlp." in module or module.endswith(".gate")
            continue
        found = theirs[path]
        kind = "Embedding" if isinstance(found, torch.nn.Embedding) else type(found).__name__
        assert kind in ("Linear", "Embedding", "Conv1D", "Conv1d"), f"{path} is a {type(found)}"
        assert (kind == "Embedding") == names.is_embedding(module), module
        assert names.to_mlx(path, name) == module


@pytest.mark.parametrize(
    ("model_type", "ours", "theirs"),
    [
        ("gptj", "model.h.0.attn.q_proj", "transformer.h.0.attn.q_proj"),
        ("gemma3", "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("gemma4", "language_model.lm_head", "lm_head"),
        ("qwen3_5", "language_model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("nemotron_h", "backbone.layers.0.mixer.q_proj", "model.layers.0.mixer.q_proj"),
        ("mixtral", "model.layers.0.block_sparse_moe", "model.layers.0.mlp"),
        ("unheard_of", "model.layers.0.block_sparse_moe.x", "model.layers.0.block_sparse_moe.x"),
    ],
)
def test_names_that_differ(model_type: str, ours: str, theirs: str) -> None:
    """Architectures whose tiny models are slow to make; seen with mlx-lm 0.32 and transformers 5.23."""
    assert names.to_torch(ours, model_type) == theirs
    assert names.to_mlx(theirs, model_type) == ours


# --- there and back ----------------------------------------------------------------------------


THERE_AND_BACK: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"kind": "dora"},
    "all layers": {"layers": (0, 1, 2), "keys": ("self_attn.v_proj",)},
    "one layer": {"layers": (2,), "scale": 0.1, "rank": 3},
    "full names": {"layers": (0, 2), "full_names": True},
    "head and embedding": {"outside": ("lm_head", "model.embed_tokens")},
    "half": {"dtype": "F16"},
    "bfloat16": {"dtype": "BF16", "kind": "dora"},
    "negative scale": {"scale": -1 / 3},
}


@pytest.mark.parametrize("what", THERE_AND_BACK)
def test_there_and_back_is_the_same_to_the_bit(what: str, make_mlx: Callable[..., Path], tmp_path: Path) -> None:
    """Tensors byte by byte, and the config with all that training wrote into it."""
    facts = {"recipe": {"carrier": "system"}, "step": 7, "base_fingerprint": "abc", "model": {"path": "m"}}
    given = make_mlx(**THERE_AND_BACK[what], facts=facts)
    out = written(given, tmp_path / "out")
    back = written(out, tmp_path / "back")
    assert raw(back / "adapters.safetensors") == raw(given / "adapters.safetensors")
    assert config_in(back) == config_in(given)
    assert facts_of(out) == facts
    again = written(back, tmp_path / "again")
    assert raw(again / "adapter_model.safetensors") == raw(out / "adapter_model.safetensors")
    assert config_in(again) == config_in(out)


def test_nothing_of_ours_stands_in_pefts_config(make_mlx: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT warns of keys that it does not know."""
    given = make_mlx(facts={"recipe": None})
    config = config_in(written(given, tmp_path / "out"))
    assert set(config) <= HARMLESS | set(REFUSED)
    assert config["target_modules"] == sorted(WIDTHS) and config["layers_to_transform"] == [1, 2]
    assert (config["r"], config["lora_alpha"]) == (4, 10)


def test_without_our_file_it_is_the_same_adapter(make_mlx: Callable[..., Path], tmp_path: Path) -> None:
    """As when PEFT has saved it anew: the words for goals are gone, what it computes is not."""
    given = make_mlx(facts={"recipe": {"carrier": "system"}})
    out = written(given, tmp_path / "out")
    (out / "mlxpref.json").unlink()
    back = read_adapter(written(out, tmp_path / "back"))
    former = read_adapter(given)
    assert raw(tmp_path / "back" / "adapters.safetensors") == raw(given / "adapters.safetensors")
    assert back.facts.get("recipe") is None and back.config["num_layers"] == 2
    assert back.lora == {**former.lora, "keys": sorted(WIDTHS)}


def test_what_was_trained_further_keeps_its_words_for_goals(make_mlx: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT saved another rank into the same folder: new settings, the recipe stays."""
    out = written(make_mlx(facts={"recipe": {"carrier": "system"}}), tmp_path / "out")
    arrays = load_file(out / "adapter_model.safetensors")
    save_file({name: np.delete(one, 0, int("lora_B" in name)) for name, one in arrays.items()},
              out / "adapter_model.safetensors")  # fmt: skip
    set_config(out, r=3, lora_alpha=3)
    back = read_adapter(written(out, tmp_path / "back"))
    assert back.facts["recipe"] == {"carrier": "system"} and back.facts["model"]["path"]
    assert (back.lora["rank"], back.lora["scale"]) == (3, 1.0)


def test_a_base_of_the_users_choice(
    make_mlx: Callable[..., Path], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT gets the model that a quantised one was made from; back, the adapter is the quantised one's again."""
    quantised = make_model_dir(quantization={"bits": 4})
    given = make_mlx(model=quantised, facts={"base_fingerprint": "abc", "model": {"path": "x"}})
    assert any("--model" in line for line in convert(given).said)
    plain, other = make_model_dir(), make_model_dir()
    out = written(given, tmp_path / "out", model=str(plain))
    assert config_in(out)["base_model_name_or_path"] == str(plain) and config_in(out)["revision"] is None
    assert config_in(written(out, tmp_path / "back")) == config_in(given)
    moved = config_in(written(out, tmp_path / "moved", model=str(other)))
    assert moved["model"] == str(other) and moved["mlxpref"]["base_fingerprint"] is None
    assert moved["mlxpref"]["model"] == {"path": str(other), "revision": None}


# --- PEFT's ranks, scales and layers -----------------------------------------------------------


V = "model.layers.2.self_attn.v_proj"
Q = "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_of_their_own(
    rslora: bool, make_peft: Callable[..., Path], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """What every module adds to its weight, and PEFT's own ranks on the way back."""
    settings = {"rank_pattern": {"layers.2.self_attn.v_proj": 1, "q_proj": 16}, "alpha_pattern": {r"v_pr\w+": 32},
                "use_rslora": rslora}  # fmt: skip
    given = make_peft(ranks={AT: 16, Q: 16, V: 1, "model.layers.0.mlp.down_proj": 4}, **settings)
    converted = convert(given)
    write_converted(converted, tmp_path / "out")
    adapter, arrays = read_adapter(tmp_path / "out"), load_file(given / "adapter_model.safetensors")
    assert adapter.lora["rank"] == 16 and adapter.lora["keys"] == sorted(adapter.factors)
    for module, (a, b) in adapter.factors.items():
        theirs = [arrays[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB"]
        rank, alpha = theirs[0].shape[0], 32 if "v_proj" in module else 8
        expected = delta(*theirs, alpha / (rank**0.5 if rslora else rank))
        np.testing.assert_allclose(adapter.lora["scale"] * (a.read() @ b.read()).T, expected, rtol=1e-6)
    assert any("rank 1, 4 filled up" in line for line in converted.said)
    assert any("scale" in line for line in converted.said)
    back = written(tmp_path / "out", tmp_path / "back")
    assert config_in(back) == config_in(given)
    assert raw(back / "adapter_model.safetensors") == raw(given / "adapter_model.safetensors")  # powers of two
    moved = config_in(written(tmp_path / "out", tmp_path / "moved", model=str(make_model_dir())))
    assert moved == config_in(given) | {"base_model_name_or_path": moved["base_model_name_or_path"], "revision": None}
    assert moved["base_model_name_or_path"] != config_in(given)["base_model_name_or_path"]


def test_a_ratio_that_is_no_power_of_two_is_rounded_once(make_peft: Callable[..., Path], tmp_path: Path) -> None:
    """Then the way back is the same to a unit in the last place, and it is said."""
    given = make_peft(ranks={AT: 4, V: 4, Q: 4}, alpha_pattern={"v_proj": 3})
    converted = convert(given)
    assert any("rounded to float32 in 1 module" in line for line in converted.said)
    back = written(written(given, tmp_path / "out"), tmp_path / "back")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (given, back))
    for name in first:
        np.testing.assert_array_max_ulp(first[name], second[name], maxulp=1)
        assert "v_proj" in name or np.array_equal(first[name], second[name])


def test_bfloat16_is_widened_rather_than_rounded(make_peft: Callable[..., Path], tmp_path: Path) -> None:
    """A ratio of 3/8 does not fit into 8 bits of mantissa; on the way back the type is the old one, to the bit."""
    given = make_peft(ranks={AT: 4, Q: 4, V: 4}, alpha_pattern={"v_proj": 3})
    rng = np.random.default_rng(3)
    shapes = {name: one.shape for name, one in load_file(given / "adapter_model.safetensors").items()}
    tensors = {name: random_tensor(rng, *shape, dtype="BF16") for name, shape in shapes.items()}
    write_tensors(given / "adapter_model.safetensors", tensors)
    out = written(given, tmp_path / "out")
    types = {name: dtype for name, (dtype, _, _) in raw(out / "adapters.safetensors").items()}
    assert [name for name, dtype in types.items() if dtype == "F32"] == [f"{V}.lora_b"]
    back = written(out, tmp_path / "back")
    assert raw(back / "adapter_model.safetensors") == raw(given / "adapter_model.safetensors")


def test_padding_that_was_trained_is_kept(make_peft: Callable[..., Path], tmp_path: Path) -> None:
    """Another program may fill the zeros: cut off, they would be lost."""
    out = written(make_peft(ranks={AT: 4, V: 2}, rank_pattern={"v_proj": 2}), tmp_path / "out")
    arrays = load_file(out / "adapters.safetensors")
    arrays[f"{V}.lora_a"][:, 3] = 1
    save_file(arrays, out / "adapters.safetensors")
    config = config_in(written(out, tmp_path / "back"))
    assert (config["r"], config["rank_pattern"], config["lora_alpha"]) == (4, {}, 16)


@pytest.mark.torch
def test_patterns_are_read_as_peft_reads_them() -> None:
    from peft.utils.other import get_pattern_key

    config: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "alpha_pattern": {},
        "rank_pattern": {"q_proj": 1, r"layers\.1\..*v_proj": 2, "^model.layers.0.mlp.up_proj": 3, "proj": 5, "j$": 6},
    }  # fmt: skip
    for module in (AT, Q, V, "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj", "x.proj", "proj", "aj"):
        expected = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"].keys(), module), 4)
        assert rank_and_scale(module, config)[0] == expected, module


# --- the models themselves ---------------------------------------------------------------------


KEYS = {"gpt2": None, "phi3": None, "mixtral": ["self_attn.q_proj", "self_attn.o_proj"]}
"""Modules that mlx-lm's adapters have; None: all matrices of the layers."""


@in_both
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "mixtral"])
def test_one_made_here_computes_the_same_in_peft(
    name: str, kind: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    from mlxpref import mlx_backend

    folder = model_dir(name)
    keys = KEYS.get(name, ["self_attn.q_proj", "mlp.down_proj"])
    lora = {"rank": 4, "scale": 1.5} | ({} if keys is None else {"keys": keys})
    policy = mlx_backend.load_policy(str(folder), fine_tune_type=kind, num_layers=2, lora_parameters=lora)
    rng = np.random.default_rng(2)
    policy.set_values({
        key: (value * (1 + 0.2 * rng.random(value.shape)) if key.endswith(".m")
              else value + 0.2 * rng.standard_normal(value.shape)).astype(np.float32)
        for key, value in policy.values().items()
    })  # fmt: skip
    mlx_backend.save_adapter(policy, tmp_path / "mlx", extra={"recipe": None})
    out = written(tmp_path / "mlx", tmp_path / "out")
    expected = mlx_logits(folder, tmp_path / "mlx")
    np.testing.assert_allclose(peft_logits(folder, out), expected, atol=TIGHT)
    assert np.abs(expected - mlx_logits(folder)).max() > 0.5, "the comparison could not fail"
    back = written(out, tmp_path / "back")
    assert raw(back / "adapters.safetensors") == raw(tmp_path / "mlx" / "adapters.safetensors")
    assert config_in(back) == config_in(tmp_path / "mlx")




@in_both
@pytest.mark.parametrize("name", ["llama", "llama+tied", "gemma2"])
def test_an_embedding_is_the_same_in_both(name: str, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """mlx-lm adapts a tied embedding at both ends; PEFT does so with ``ensure_weight_tying``."""
    from mlxpref import mlx_backend

    folder = model_dir(name)
    keys = ["model.embed_tokens", "self_attn.q_proj"] + (["lm_head"] if name == "llama" else [])
    lora = {"rank": 4, "scale": 0.5, "keys": keys}
    policy = mlx_backend.load_policy(str(folder), num_layers=1, lora_parameters=lora)
    rng = np.random.default_rng(4)
    policy.set_values({key: (0.3 * rng.standard_normal(one.shape)).astype(np.float32)
                       for key, one in policy.values().items()})  # fmt: skip
    mlx_backend.save_adapter(policy, tmp_path / "mlx", extra={})
    out = written(tmp_path / "mlx", tmp_path / "out")
    expected = mlx_logits(folder, tmp_path / "mlx")
    np.testing.assert_allclose(peft_logits(folder, out), expected, atol=TIGHT)
    assert np.abs(expected - mlx_logits(folder)).max() > 0.5
    assert raw(written(out, tmp_path / "back") / "adapters.safetensors") == raw(tmp_path / "mlx/adapters.safetensors")


def by_peft(folder: Path, out: Path, **settings: Any) -> Path:
    """An adapter with random factors, made and saved by ``peft``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says that it saves embeddings, too
        model.save_pretrained(out)
    return out


BY_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": ("llama", {
        "target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 6,
        "rank_pattern": {"layers.1.self_attn.q_proj": 8, "down_proj": 2}, "alpha_pattern": {"v_proj": 5},
    }),
    "rslora": ("qwen2", {"target_modules": "all-linear", "r": 8, "lora_alpha": 4, "use_rslora": True}),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "lora_dropout": 0.1}),
    "some left out": ("phi3", {"target_modules": ["qkv_proj", "o_proj"], "exclude_modules": r".*s\.1\.self.*o_proj"}),
    "dora": ("gemma2", {"target_modules": ["k_proj", "gate_proj"], "use_dora": True, "rank_pattern": {"k_proj": 3}}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "experts' attention": ("mixtral", {"target_modules": ["q_proj", "k_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embedding": ("llama+tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
}  # fmt: skip


@in_both
@pytest.mark.parametrize("what", BY_PEFT)
def test_one_made_by_peft_computes_the_same_here(
    what: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    name, settings = BY_PEFT[what]
    folder = model_dir(name)
    given = by_peft(folder, tmp_path / "peft", **settings)
    expected = peft_logits(folder, given)
    out = written(given, tmp_path / "out")
    np.testing.assert_allclose(mlx_logits(folder, out), expected, atol=TIGHT)
    assert np.abs(expected - mlx_logits(folder)).max() > 0.1, "the comparison could not fail"
    np.testing.assert_allclose(peft_logits(folder, written(out, tmp_path / "back")), expected, atol=TIGHT)


@in_both
def test_one_of_trl_loads(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Two steps of ``DPOTrainer``, saved as it saves; the folder is taken as it is, and for a start, too."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'mlxpref[trl]'")
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from mlxpref import mlx_backend

    folder = model_dir("llama")
    rows = [{"prompt": f"Story {i}.", "chosen": " a cat and a dog" * (i + 1), "rejected": " no"} for i in range(4)]
    trainer = DPOTrainer(
        str(folder), train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=2, learning_rate=0.05,
            use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
            save_strategy="no", model_init_kwargs={"dtype": "float32"},
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    found = as_mlx_folder(tmp_path / "saved", cache=tmp_path / "cache")
    expected = peft_logits(folder, tmp_path / "saved")
    np.testing.assert_allclose(mlx_logits(folder, found), expected, atol=TIGHT)
    assert np.abs(expected - mlx_logits(folder)).max() > 1e-2, "nothing was trained"
    policy = mlx_backend.load_policy(str(folder), init_from=str(found))
    assert set(policy.values()) == set(load_file(found / "adapters.safetensors"))


# --- what is refused ---------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[Weights], object]) -> None:
    file = next(folder.glob("*.safetensors"))
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file, metadata={"format": "pt"})


SETTINGS: dict[str, Any] = {
    "modules_to_save": ["lm_head"], "bias": "all", "lora_bias": True, "target_parameters": ["experts.down_proj"],
    "trainable_token_indices": [1], "layer_replication": [[0, 2]], "use_qalora": True, "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1}, "init_lora_weights": "pissa_niter_4", "peft_type": "IA3", "r": "four",
    "a_setting_yet_to_come": 1, "rank_pattern": [1], "lora_alpha": float("nan"),
}  # fmt: skip


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_that_cannot_be_followed_are_named(key: str, make_peft: Callable[..., Path]) -> None:
    """Ignored, the adapter would compute something else."""
    with pytest.raises(AdapterError, match=f"\n  {key} "):
        convert(make_peft(**{key: SETTINGS[key]}))


def test_all_of_them_are_named_at_once(make_peft: Callable[..., Path]) -> None:
    with pytest.raises(AdapterError, match=r"bias 'all'[\s\S]*lora_bias True[\s\S]*modules_to_save"):
        convert(make_peft(bias="all", lora_bias=True, modules_to_save=["lm_head"]))


@pytest.mark.torch
def test_every_setting_of_peft_is_known() -> None:
    """A new one must be looked at: does it change what a finished adapter computes?"""
    from peft import LoraConfig

    assert {field.name for field in fields(LoraConfig)} <= HARMLESS | REFUSED.keys()
    assert not list(problems({**LoraConfig(r=4).to_dict(), "peft_type": "LORA"}))


@pytest.mark.torch
def test_where_peft_looks_among_the_experts() -> None:
    """PEFT's own table, of the architectures that mlx-lm has."""
    mlx_models = pytest.importorskip("mlx_lm.models")
    import pkgutil

    from peft.utils import transformers_weight_conversion as theirs

    ours = {module.name for module in pkgutil.iter_modules(mlx_models.__path__)}
    table = theirs._MODEL_TO_CONVERSION_PATTERN
    assert {name for name, like in table.items() if like == "qwen2_moe"} & ours == TAKEN_FOR_EXPERTS


P = f"base_model.model.{AT}"
TENSORS: dict[str, tuple[Callable[[Weights], object], str]] = {
    "half a pair": (lambda w: w.pop(f"{P}.lora_B.weight"), f"{AT}: half a pair"),
    "misfit": (lambda w: w.update({f"{P}.lora_B.weight": np.zeros((32, 3), np.float32)}), r"\(4, 32\) and \(32, 3\)"),
    "convolution": (lambda w: w.update({f"{P}.lora_A.weight": np.zeros((4, 8, 4), np.float32)}), r"\(4, 8, 4\)"),
    "rank": (
        lambda w: w.update({f"{P}.lora_A.weight": np.zeros((3, 32), np.float32),
                            f"{P}.lora_B.weight": np.zeros((32, 3), np.float32)}),
        "rank 3, where adapter_config.json says 4",
    ),
    "unknown": (lambda w: w.update({"base_model.model.x.lora_C.weight": np.zeros(1, np.float32)}), "lora_C.weight: u"),
    "prefix": (lambda w: w.update({AT: w.pop(f"{P}.lora_A.weight")}), f"{AT}: unknown"),
    "bias": (lambda w: w.update({f"{P}.lora_B.bias": np.zeros(32, np.float32)}), "lora_B.bias: unknown"),
    "magnitudes": (
        lambda w: w.update({f"{P}.lora_magnitude_vector": np.ones(32, np.float32)}), "a lora_magnitude_vector"
    ),
    "layer": (
        lambda w: [w.update({key.replace("layers.1", "layers.9"): w.pop(key)}) for key in list(w)], "has 3 layers"
    ),
    "experts": (
        lambda w: [w.update({key.replace("self_attn", "mlp.experts.0"): w.pop(key)}) for key in list(w)],
        "mlx-lm stacks its experts",
    ),
    "whole weights": (
        lambda w: w.update({"base_model.model.lm_head.weight": np.ones((384, 32), np.float32)}), "lm_head: saved whole"
    ),
    "nothing": (lambda w: w.clear(), "there are none"),
    "whole numbers": (lambda w: w.update({f"{P}.lora_A.weight": np.zeros((4, 32), np.int32)}), "of type I32"),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_cannot_be_converted_are_named(what: str, make_peft: Callable[..., Path]) -> None:
    change, says = TENSORS[what]
    folder = make_peft()
    edited(folder, change)
    with pytest.raises(AdapterError, match=says):
        convert(folder)


def test_dora_without_magnitudes_is_damaged(make_peft: Callable[..., Path]) -> None:
    with pytest.raises(AdapterError, match=f"{AT}: no lora_magnitude_vector"):
        convert(make_peft(use_dora=True))


def with_embedding(folder: Path, head: bool = False) -> Path:
    def change(weights: Weights) -> None:
        at = "base_model.model.model.embed_tokens"
        weights[f"{at}.lora_embedding_A"] = np.ones((4, 384), np.float32)
        weights[f"{at}.lora_embedding_B"] = np.ones((32, 4), np.float32)
        if head:
            weights["base_model.model.lm_head.lora_A.weight"] = np.ones((4, 32), np.float32)
            weights["base_model.model.lm_head.lora_B.weight"] = np.ones((384, 4), np.float32)

    edited(folder, change)
    return folder


def test_an_embedding_that_is_the_head(
    make_peft: Callable[..., Path], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Adapted at one end only, or with other factors at either end, it is nothing that mlx-lm has."""
    tied = make_model_dir(tie_word_embeddings=True)
    given = with_embedding(make_peft(base_model_name_or_path=str(tied)), head=True)
    with pytest.raises(AdapterError, match=r"embed_tokens: the embedding[\s\S]*ensure_weight_tying|lm_head: the head"):
        convert(given)
    set_config(given, ensure_weight_tying=True)
    assert set(convert(given).mlx.factors) == {AT, "model.embed_tokens"}
    edited(given, lambda w: w["base_model.model.lm_head.lora_B.weight"].fill(2))
    with pytest.raises(AdapterError, match="lm_head: the head"):
        convert(given)
    with pytest.raises(AdapterError, match="no lora_magnitude_vector"):
        convert(set_config(given, use_dora=True))


@pytest.mark.parametrize(
    ("model_type", "module", "says"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.switch_mlp.up_proj", "stack of experts"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate", "router"),
        ("qwen3_moe", "model.layers.1.mlp.gate", "router"),
        ("qwen3_next", "model.layers.1.mlp.shared_expert.up_proj", "one of the experts"),
        ("mamba", "backbone.layers.1.mixer.dt_proj", "never calls this layer"),
    ],
)
def test_modules_that_transformers_has_not(
    model_type: str, module: str, says: str, make_mlx: Callable[..., Path], make_model_dir: Callable[..., Path]
) -> None:
    """Plain modules beside them are no reason to convert half an adapter."""
    given = make_mlx(keys=("self_attn.q_proj",), model=make_model_dir(model_type=model_type))
    edited(given, lambda w: [w.update({key.replace(AT, module): w.pop(key)}) for key in list(w) if AT in key])
    with pytest.raises(AdapterError, match=f"{module}: .*{says}"):
        convert(given)


def test_other_adapters_of_mlx_that_peft_cannot_have(make_mlx: Callable[..., Path]) -> None:
    full = make_mlx("full")
    set_config(full, fine_tune_type="full")
    with pytest.raises(AdapterError, match="a full fine-tune"):
        convert(full)
    with pytest.raises(AdapterError, match="embed_tokens: DoRA of an embedding"):
        convert(make_mlx("dora", kind="dora", outside=("model.embed_tokens",)))
    ranks = make_mlx("ranks")
    edited(ranks, lambda w: w.update({f"{AT}.lora_a": w[f"{AT}.lora_a"][:, :2], f"{AT}.lora_b": w[f"{AT}.lora_b"][:2]}))
    with pytest.raises(AdapterError, match="rank 2, 4, where mlx-lm has one"):
        convert(ranks)


# --- which form a folder has -------------------------------------------------------------------


def test_the_form_is_read_from_the_files(make_mlx: Callable[..., Path], make_peft: Callable[..., Path]) -> None:
    """A name says nothing, nor does a file that lies beside."""
    mlx, peft = make_mlx("peft"), make_peft("adapters")
    shutil.copy(mlx / "adapters.safetensors", peft)
    shutil.copy(peft / "adapter_model.safetensors", mlx)
    assert (kind_of(mlx), kind_of(peft)) == ("mlx", "peft")
    (peft / "adapter_config.json").write_text("{")
    assert kind_of(peft) is None and kind_of(mlx / "nowhere") is None
    (peft / "adapter_config.json").write_text("[]")
    assert kind_of(peft) is None
    (peft / "adapter_config.json").write_text("{}")
    assert kind_of(peft) == "mlx"  # by its adapters.safetensors, to be refused for what its config lacks
    with pytest.raises(UsageError, match=r"form of mlx-lm already"):
        convert(mlx, to="mlx")


def test_a_peft_folder_is_converted_once(
    make_mlx: Callable[..., Path], make_peft: Callable[..., Path], make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Another file, or another base, is another adapter."""
    mlx, peft, cache = make_mlx(), make_peft(), tmp_path / "cache"
    assert as_mlx_folder(mlx, cache=cache) == mlx and not cache.exists()
    assert as_mlx_folder(tmp_path, cache=cache) == tmp_path, "no adapter: its reader says so"
    first = as_mlx_folder(peft, cache=cache)
    stamps = [file.stat().st_mtime_ns for file in sorted(first.iterdir())]
    assert as_mlx_folder(peft, cache=cache) == first and first.parent == cache
    assert [file.stat().st_mtime_ns for file in sorted(first.iterdir())] == stamps
    other = as_mlx_folder(peft, cache=cache, model=str(make_model_dir()))
    set_config(peft, lora_alpha=3)
    assert len({first, other, as_mlx_folder(peft, cache=cache)}) == 3
    assert len(list(cache.iterdir())) == 3, "something is left beside them"


def test_many_processes_may_ask_at_once(make_peft: Callable[..., Path], tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    peft, cache = make_peft(), tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: as_mlx_folder(peft, cache=cache), range(16)))
    assert len(found) == 1 and len(list(cache.iterdir())) == 1
    assert read_adapter(found.pop()).lora["rank"] == 4


def test_the_cache_is_where_all_caches_are(
    make_peft: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "mine"))
    assert as_mlx_folder(make_peft()).parent == tmp_path / "mine" / "converted"


# --- wrong inputs, from the command line -------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)], catch_exceptions=False)


def test_what_was_read_and_written_is_said(
    make_mlx: Callable[..., Path], make_peft: Callable[..., Path], tmp_path: Path
) -> None:
    ran = run(make_mlx(), "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    assert "mlx-lm, lora of rank 4, scale 2.5, 6 modules in 2 of 3 layers" in ran.stdout
    assert "PEFT, lora with r 4, lora_alpha 10, 6 modules, for " in ran.stdout and not ran.stderr
    peft = make_peft(ranks={AT: 4, Q: 4, V: 2}, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 16})
    ran = run(peft, "--out", tmp_path / "back", "--to", "mlx")
    assert ran.exit_code == 0, ran.output
    assert "(rank_pattern, alpha_pattern), 3 modules" in ran.stdout
    assert "1 module of rank 2 filled up with zeros to 4" in ran.stdout
    assert "1 module of scale 8: the ratio to 2" in ran.stdout and "no bit lost" in ran.stdout


def listing(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        yield str(file), hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no weights": (lambda at: (at / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickle": (
        lambda at: (at / "adapter_model.safetensors").rename(at / "adapter_model.bin"), "save_pretrained"
    ),
    "cut off": (
        lambda at: (at / "adapter_model.safetensors").write_bytes((at / "adapter_model.safetensors").read_bytes()[:-9]),
        "damaged or cut off",
    ),
    "our file": (lambda at: (at / "mlxpref.json").write_text("{"), "mlxpref.json: not the JSON"),
    "base": (lambda at: set_config(at, base_model_name_or_path="/no/model"), "name a copy of it with --model"),
    "no base": (lambda at: set_config(at, base_model_name_or_path=None), "names no base model"),
    "infinite": (
        lambda at: edited(at, lambda w: w[f"{P}.lora_A.weight"].fill(np.inf)), f"{AT}.lora_a: not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_failure_says_why_and_leaves_nothing_behind(
    what: str, make_peft: Callable[..., Path], tmp_path: Path
) -> None:
    damage, says = WRONG[what]
    folder = make_peft()
    damage(folder)
    before = list(listing(tmp_path))
    ran = run(folder, "--out", tmp_path / "out")
    assert ran.exit_code == 1 and says in ran.stderr, ran.output
    assert list(listing(tmp_path)) == before


def test_an_occupied_folder_is_refused_before_anything_is_read(make_mlx: Callable[..., Path], tmp_path: Path) -> None:
    given = make_mlx()
    before = list(listing(tmp_path))
    ran = run(tmp_path / "nowhere", "--out", given)
    assert ran.exit_code == 1 and "is there already" in ran.stderr
    assert list(listing(tmp_path)) == before
    with pytest.raises(RunError, match="is there already"):
        write_converted(convert(given), given)


def test_the_form_it_has_is_no_conversion(make_peft: Callable[..., Path], tmp_path: Path) -> None:
    ran = run(make_peft(), "--out", tmp_path / "out", "--to", "peft")
    assert ran.exit_code == 2 and "in the form of PEFT already" in ran.stderr
    assert run(make_peft("b"), "--out", tmp_path / "out", "--to", "gguf").exit_code == 2


@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_a_base_of_another_shape_is_refused(
    form: str, make_mlx: Callable[..., Path], make_peft: Callable[..., Path], make_model_dir: Any, tmp_path: Path
) -> None:
    """Converted with the words of another model, it would load nowhere."""
    other = make_model_dir(hidden_size=48, intermediate_size=80)
    given = make_mlx() if form == "mlx" else make_peft()
    ran = run(given, "--out", tmp_path / "out", "--model", other)
    assert ran.exit_code == 1 and "was made for another model" in ran.stderr, ran.output
    assert not (tmp_path / "out").exists()
