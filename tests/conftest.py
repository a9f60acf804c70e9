"""Fixtures every room's tests share, and a report of what was skipped.

Nothing here needs a network, an array framework at import, or files outside the project: tokenizers
and models are made on the spot, tiny and random, from a fixed seed.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before any library reads them: no test asks a hub, and none leaves files in the user's caches.
_CACHE = tempfile.mkdtemp(prefix="mlxpref-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = os.path.join(_CACHE, "datasets")
os.environ["MLXPREF_CACHE"] = os.path.join(_CACHE, "mlxpref")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np  # noqa: E402 - after the environment is set
import pytest  # noqa: E402 - after the environment is set

from mlxpref import blas  # noqa: E402 - after the environment is set

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

blas.preload()  # must come before the first import of mlx.core by any test module

SPECIALS = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)

TEXT = (
    "You are a helpful assistant. Generate a response of quality 10 out of 10.",
    "Once upon a time there was a little girl named Lily who loved to play in the park.",
    "What is the capital of France? The capital of France is Paris.",
    "Write a short story about a cat and a dog. The cat said hello to the dog.",
    "user assistant system response score goal quality the and of to in is was that it",
)

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "torch_dtype": "float32",
}


# --- the assets folder -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data; the test is skipped, by name, when it is not given."""
    folder = os.environ.get("MLXPREF_ASSETS")
    if not folder:
        pytest.skip("MLXPREF_ASSETS is not set (real models and data)")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"MLXPREF_ASSETS={folder} is not a folder")
    return path


# --- tokenizers --------------------------------------------------------------------------------


def make_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens: every string survives a round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|im_end|>" if chat_template else "<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML with a system role; a turn ends with ``<|im_end|>``."""
    return make_tokenizer(CHATML)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """No chat template; a text ends with ``<eos>``."""
    return make_tokenizer(None)


@pytest.fixture(scope="session")
def no_system_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML whose template raises on a system message, as Gemma's and Mistral's do."""
    return make_tokenizer(NO_SYSTEM)


# --- models ------------------------------------------------------------------------------------


def llama_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face's names, large enough for logits that differ."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(vocab, hidden) * 4,
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": np.ones(hidden, np.float32),
            at + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
            at + "self_attn.q_proj.weight": matrix(queries, hidden),
            at + "self_attn.k_proj.weight": matrix(keys, hidden),
            at + "self_attn.v_proj.weight": matrix(keys, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, queries),
            at + "mlp.gate_proj.weight": matrix(inner, hidden),
            at + "mlp.up_proj.weight": matrix(inner, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(vocab, hidden)
    return weights


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random llama as a Hugging Face folder; ``changes`` go into its config.json."""
    from safetensors.numpy import save_file

    eos = tokenizer.eos_token_id
    config = TINY_LLAMA | {"vocab_size": len(tokenizer), "eos_token_id": eos, "bos_token_id": None} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(llama_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model_dir(
    tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """A function that writes one more tiny model: ``make_model_dir(seed=1, num_hidden_layers=2)``."""

    def make(*, tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 0, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        return write_model(folder, tokenizer or chat_tokenizer, seed=seed, **changes)

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(make_model_dir: Callable[..., Path]) -> Path:
    """A random 3-layer llama with the chat tokenizer, for mlx_lm and transformers. Do not write to it."""
    return make_model_dir()


# --- guards ------------------------------------------------------------------------------------


class SocketOpened(AssertionError):
    """Something tried to talk to a network. Not an OSError, so that no retry swallows it."""


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every connection and name look-up of this process raises, and fails the test at its end."""
    attempts: list[str] = []

    def refuse(what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            target = next((a for a in args if not isinstance(a, socket.socket)), "?")
            attempts.append(f"{what}({target!r})")
            raise SocketOpened(attempts[-1])

        return call

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse(f"socket.{name}"))
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse(name))
    yield attempts
    assert not attempts, f"opened a socket: {attempts}"


# --- groups by need ----------------------------------------------------------------------------


def _missing() -> dict[str, str]:
    """Marker -> why its tests cannot run here."""
    missing = {}
    if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx_lm") is None:
        missing["mlx"] = "mlx or mlx-lm is not installed"
    lacking = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if lacking:
        missing["torch"] = f"{' and '.join(lacking)} not installed"
    if not Path("/dev/nvidiactl").exists():
        missing["cuda"] = "no NVIDIA GPU"
    return missing


LONGEST = ("test_quickstart.py", "test_readme.py", "test_torch_workers.py", "test_mlx_objectives.py")
"""Files that take minutes each: begun first, none of them is left alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    missing = _missing()
    for item in items:
        for name, why in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{name}: {why}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which groups did not run, and why: a green run with half the tests skipped is not green."""
    groups: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        where, reason = report.nodeid.partition("::")[0], str(report.longrepr)
        if isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        groups[f"{reason}  [{where}]"] += 1
    if groups:
        terminalreporter.section("groups not run")
        for group, n in sorted(groups.items()):
            terminalreporter.write_line(f"{n:4d} skipped: {group}")


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)
