"""The shared fixtures themselves: a broken witness would make every test that leans on it pass.

Finds: a tokenizer that loses text, a tiny model that two libraries read differently, a socket guard
that guards nothing.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2.exceptions import TemplateError

ODD = "Zürich – 東京 🙂\u2028 tab\t\x00 <|im_end|"


def test_tokenizers_lose_no_text(chat_tokenizer: Any, plain_tokenizer: Any, no_system_tokenizer: Any) -> None:
    for tokenizer in (chat_tokenizer, plain_tokenizer, no_system_tokenizer):
        assert tokenizer.decode(tokenizer.encode(ODD, add_special_tokens=False)) == ODD


def test_templates_differ_in_the_system_role(chat_tokenizer: Any, no_system_tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    rendered = chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(TemplateError):
        no_system_tokenizer.apply_chat_template(messages, tokenize=False)
    assert no_system_tokenizer.apply_chat_template(messages[1:], tokenize=False)


@pytest.mark.mlx
@pytest.mark.torch
def test_both_libraries_read_the_same_model(tiny_model_dir: Path, chat_tokenizer: Any) -> None:
    import mlx.core as mx
    import mlx_lm
    import torch
    from transformers import AutoModelForCausalLM

    ids = chat_tokenizer.encode("Once upon a time there was a girl.")
    model, tokenizer = mlx_lm.load(str(tiny_model_dir))
    ours = np.array(model(mx.array([ids])))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours.std() > 0.3, "logits that hardly differ would hide faults"
    assert tokenizer.eos_token_ids == {chat_tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_models_of_two_seeds_differ(make_model_dir: Any, tiny_model_dir: Path) -> None:
    same, other = make_model_dir(), make_model_dir(seed=1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tiny_model_dir, same, other)]
    assert weights[0] == weights[1] != weights[2]


def connect() -> None:
    with socket.socket() as opened:
        opened.connect(("127.0.0.1", 9))


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection(("127.0.0.1", 9)),
        connect,
        lambda: socket.getaddrinfo("localhost", 80),
    ],
    ids=["create_connection", "connect", "getaddrinfo"],
)
def test_the_socket_guard_refuses(reach: Any, no_sockets: list[str]) -> None:
    with pytest.raises(AssertionError):
        reach()
    assert len(no_sockets) == 1
    no_sockets.clear()  # this attempt was meant
