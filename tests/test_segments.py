"""Encoding word by word: the ids that the tokenizer itself gives to the whole text, or not at all."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpref.data.render import Encoder, load_tokenizer
from mlxpref.data.segments import SPACE, Segments

ODD = [
    "", " ", "  ", "\n", " a", "a ", "a  b", "a\nb", f"a{SPACE}b", f"{SPACE}{SPACE}", "</s>", "a</s>b", "</s> a",
    " </s>", "<s", "é", "你好 🙂 x", "\x00", "\u2028 a", "Once upon a time", "the the  the", "x" * 200, "t h e",
    "<unk> </s></s>  <s>a",
]  # fmt: skip

PIECES = ["a", "the", " ", "  ", SPACE, "\n", "</s>", "<s>", "<", "s>", "é", "🙂", "upon"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def spaced(**changes: Any) -> Any:
    """What :func:`_make` makes, made once."""
    return _spaced(json.dumps(changes, sort_keys=True))


@cache
def _spaced(changes: str) -> Any:
    return _make(**json.loads(changes))


def _make(*, bytes_: bool = True, prepend: bool = True, chat: bool = False, **changes: Any) -> Any:
    """A tokenizer of the SentencePiece kind: a space is "▁", no pre-tokenizer, "<s>" begins a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=bytes_))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=specials, show_progress=False)
    core.train_from_iterator(TEXT, trainer)
    told = json.loads(core.to_str())
    steps = [{"type": "Prepend", "prepend": SPACE}] * prepend
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    told["normalizer"], told["pre_tokenizer"] = {"type": "Sequence", "normalizers": steps}, None
    vocabulary = told["model"]["vocab"]
    for byte in range(256 * bytes_):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    told["model"] |= {name: value for name, value in changes.items() if name in told["model"]}
    for pair in changes.get("joined", ()):
        vocabulary["".join(pair)] = len(vocabulary)
        told["model"]["merges"].insert(0, list(pair))
    told["added_tokens"][2] |= changes.get("added", {})
    core = Tokenizer.from_str(json.dumps(told))
    after = "$A </s>" if changes.get("ends") else "$A"
    core.post_processor = processors.TemplateProcessing(
        single=f"<s> {after}", pair="<s> $A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s> answer:"
    return tokenizer


@cache
def segments_of(kind: str) -> tuple[Segments, Any]:
    backend = spaced(bytes_=kind != "unknown", prepend=kind != "no prepend").backend_tokenizer
    found = Segments.of(backend)
    assert found is not None
    return found, backend


@pytest.mark.parametrize("kind", ["bytes", "unknown", "no prepend"])
@given(text=TEXTS | st.sampled_from(ODD))
@settings(max_examples=150, deadline=None)
def test_ids_are_the_tokenizers_own(kind: str, text: str) -> None:
    """Finds a place where words do depend on each other: spaces in a row, added tokens, characters nobody knows."""
    segments, backend = segments_of(kind)
    for special in (False, True):
        assert segments.ids(text, special=special) == backend.encode(text, add_special_tokens=special).ids


def test_words_are_forgotten_and_met_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a memory without bound, and ids of another word where it was emptied in the middle of a text."""
    monkeypatch.setattr("mlxpref.data.segments.KNOWN", 3)
    segments = Segments.of(spaced().backend_tokenizer)
    assert segments is not None
    text = " ".join(f"w{at % 7} the" for at in range(50))
    for _ in range(2):
        assert segments.ids(text, special=True) == spaced()(text)["input_ids"]
    assert len(segments._known) <= 3 and len(segments._known._older) <= 3


@cache
def encoders(chat: bool) -> tuple[Encoder, Encoder]:
    """One that goes word by word, and one that does not."""
    short, whole = Encoder(spaced(chat=chat)), Encoder(spaced(chat=chat))
    assert short.segments is not None
    whole.segments = None
    return short, whole


@pytest.mark.parametrize("chat", [False, True])
@given(prompt=TEXTS | st.sampled_from(ODD), rest=TEXTS | st.sampled_from(ODD))
@settings(max_examples=300, deadline=None)
def test_continuations_are_those_of_the_whole_text(chat: bool, prompt: str, rest: str) -> None:
    """Finds a short cut that changes tokens: only the prompt's last word is encoded again with what follows it."""
    short, whole = encoders(chat)
    assert short.continuation(prompt, rest) == whole.continuation(prompt, rest)


@pytest.mark.parametrize(
    "changes",
    [
        {"joined": [("e", SPACE)]},
        {"added": {"lstrip": True}},
        {"added": {"normalized": True}},
        {"added": {"single_word": True}},
        {"dropout": 0.1},
        {"ignore_merges": True},
        {"ends": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_tokenizers_are_left_alone(changes: dict[str, Any]) -> None:
    """Finds a tokenizer taken for one whose words are independent."""
    assert Segments.of(spaced().backend_tokenizer) is not None
    assert Segments.of(spaced(**changes).backend_tokenizer) is None


def test_a_token_over_a_space_does_change_ids() -> None:
    """Finds a check for nothing: with a token "e▁" the ids of a text are not those of its words."""
    backend, plain = spaced(joined=[("e", SPACE)]).backend_tokenizer, Segments.of(spaced().backend_tokenizer)
    assert plain is not None
    assert len(backend.encode("the the").ids) != len(plain.ids("the the", special=True))


def test_byte_level_tokenizers_go_their_own_way(chat_tokenizer: Any) -> None:
    """Finds ids of another way to encode than the tokenizer's own call."""
    encoder = Encoder(chat_tokenizer)
    assert encoder.segments is None
    for text in ODD[1:]:
        assert encoder.ids(text) == chat_tokenizer(text, add_special_tokens=False)["input_ids"]


def test_real_text_with_a_real_tokenizer(assets: Path) -> None:
    """Finds what made-up texts do not hold."""
    tokenizer = load_tokenizer(str(assets / "models" / "stories260K"))
    segments = Segments.of(tokenizer.backend_tokenizer)
    assert segments is not None
    lines = (assets / "data" / "ultrafeedback" / "eval.jsonl").read_text(encoding="utf8").split("\n")[:100]
    for text in (text for line in lines if line for text in json.loads(line).values() if isinstance(text, str)):
        assert segments.ids(text, special=True) == tokenizer(text)["input_ids"]
