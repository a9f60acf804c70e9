"""A transformers model from a folder, as its files say it is: nothing missing, nothing left over, no noise."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging as hf_logging

from mlxpref.errors import ConfigError, ModelError, raise_all

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(asked: str | None, config: Mapping[str, Any]) -> str:
    """The dtype to load in, by name: the one asked for, float32 on a CPU, else the checkpoint's own.

    Raises:
        ConfigError: an unknown one.
    """
    if asked is not None and asked not in DTYPES:
        raise ConfigError(f"unknown dtype {asked!r}; one of {', '.join(DTYPES)}")
    if asked is None and not torch.cuda.is_available():
        return "float32"
    own = config.get("dtype") or config.get("torch_dtype") or "float32"
    return asked or (own if own in DTYPES else "float32")


def load_model(folder: Path, kind: str, config: Mapping[str, Any], load_in_4bit: bool, *, place: bool) -> Any:
    """The model of a folder, frozen or not, without noise of its own.

    Args:
        kind: one of ``DTYPES``.
        config: the folder's ``config.json``.
        load_in_4bit: quantise linear layers to NF4.
        place: on the device; else where transformers leaves it.

    Raises:
        ModelError: the folder is not what it says, or of an architecture unknown to transformers.
        ConfigError: 4 bits without CUDA and bitsandbytes.
    """
    dtype = DTYPES[kind]
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    if "quantization" in config:
        raise ModelError(
            f"{folder}: quantised for MLX, which transformers cannot read; give the original model, with "
            "model.load_in_4bit: true for a 4-bit base"
        )
    more = {"quantization_config": _four_bits(dtype)} if load_in_4bit else {}
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _without_dropout(settings)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=settings, dtype=dtype, output_loading_info=True, use_safetensors=True,
            ignore_mismatched_sizes=True, trust_remote_code=False, **more,
        )  # fmt: skip
    except SafetensorError as error:
        raise ModelError(
            f"{folder}: the weights cannot be read ({error}); the download is incomplete or damaged: fetch the folder "
            "again"
        ) from error
    except StrictDataclassError as error:
        raise ModelError(f"{folder}: config.json is refused ({' '.join(str(error).split())[:300]})") from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: {_explained(str(error))}") from error
    _check_fit(folder, found)
    _check_head(folder, model)
    model.generation_config = GenerationConfig()  # the folder's own would bring penalties, top_k and more
    return model if load_in_4bit or not place else model.to("cuda" if torch.cuda.is_available() else "cpu")


def _check_fit(folder: Path, found: Mapping[str, Any]) -> None:
    """ModelError unless the weights are those that config.json describes."""
    said = {"missing_keys": "lack", "mismatched_keys": "have in another shape", "unexpected_keys": "hold besides"}
    odd = {what: sorted(str(one[0] if isinstance(one, tuple) else one) for one in found[key])
           for key, what in said.items() if found[key]}  # fmt: skip
    problems = [f"they {what} {', '.join(some[:5])}" for what, some in odd.items()]
    raise_all(problems, ModelError, f"{folder}: the weights do not fit the model's config.json:")


def _check_head(folder: Path, model: Any) -> None:
    """ModelError where config.json ties a head that has weights of its own: transformers takes those, mlx-lm does
    not."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if not model.config.get_text_config().tie_word_embeddings or head is None or head.weight is table.weight:
        return
    if not torch.equal(head.weight, table.weight):
        raise ModelError(
            f"{folder}: by config.json the head is the embedding matrix, and the weights hold another one; write "
            "tie_word_embeddings: false there if that is the right one, or take it out of the weights"
        )
    head.weight = table.weight


def _explained(message: str) -> str:
    first = " ".join(message.split())[:300]
    if "no file named" in message:
        return "no weights (model*.safetensors). Download the whole model folder again"
    if "does not recognize this architecture" in message or "Unrecognized" in message:
        return f"the installed transformers knows no language model of this architecture ({first[:140]} …)"
    if "custom code" in message or "trust_remote_code" in message:
        return "the model comes with its own code, which is not run here; what can be loaded is in transformers"
    return f"the model cannot be loaded ({first})"


def _four_bits(dtype: torch.dtype) -> Any:
    """NF4 by bitsandbytes. ConfigError where that cannot be."""
    if not torch.cuda.is_available():
        raise ConfigError("model.load_in_4bit needs an NVIDIA GPU here (bitsandbytes); leave it out, or train on MLX")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _without_dropout(settings: Any) -> None:
    """Models of mlx-lm have no dropout of their own, nor noise; an adapter's is ``lora_parameters.dropout``."""
    for part in {id(one): one for one in (settings, settings.get_text_config())}.values():
        for key, value in list(vars(part).items()):
            if any(word in key for word in ("drop", "jitter")) and isinstance(value, float):
                setattr(part, key, 0.0)
