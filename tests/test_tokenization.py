"""The boundary between prompt and response, the end of a turn, and what cutting leaves alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.data.recipe import ATTRIBUTES_TEMPLATE, Recipe, resolve_carrier
from mlxpref.data.relabel import relabel, unconditioned
from mlxpref.data.relabelled import write_relabelled
from mlxpref.data.render import Encoder, render_turn, turn_end
from mlxpref.data.sources import SourceSpec, read_source
from mlxpref.data.tokenization import (
    GOAL_LOST,
    NO_PREFIX,
    PROMPT_CUT,
    RESPONSE_CUT,
    encode_prompt,
    load_tokenizer,
    render_prompt,
    tokenize,
    tokenize_all,
)
from mlxpref.data.truncation import GAP, cut_prompt
from mlxpref.errors import ConfigError, DataError, ModelError
from mlxpref.records import Conditioned, Counts, Dropped, Message, Scored, Tokenized
from tests.conftest import CHATML, make_tokenizer

# Templates of the shapes met in the wild, with the special tokens of the test tokenizer.
TRIMMED = (  # Llama 3, Gemma: contents trimmed, nothing after the end token
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
SPACED = (  # Llama 2, Mistral: no header of its own, spaces around the response, eos at the end
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
UNENDED = (  # writes no end token at all
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (  # Qwen 3: an empty reasoning block when reasoning is off, in header and finished turn alike
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
REASONER = (  # R1: the header opens a reasoning block that a finished turn does not show
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "trimmed": TRIMMED, "spaced": SPACED, "unended": UNENDED, "thinking": THINKING}

RECIPE = Recipe(carrier="first_user")
SYSTEM = Recipe(carrier="system")

RESPONSES = (
    "Paris, of course.",
    "  leading and trailing space  ",
    "\nA line break first.",
    "Ünïcödé, 你好, 🙂!",
    "one\n\ntwo\n",
)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make_tokenizer(text) for name, text in {**TEMPLATES, "plain": None}.items()}


def scored(prompt: str | tuple[Message, ...] = "What is the capital of France?", **changes: Any) -> Scored:
    given = {
        "prompt": (Message("user", prompt),) if isinstance(prompt, str) else prompt,
        "responses": ("Paris is the capital of France.", "I do not know."),
        "scores": (9.0, 2.5),
        "example_id": "e",
    }
    return Scored(**{**given, **changes})


def halves(example: Scored, recipe: Recipe = RECIPE) -> list[Conditioned]:
    found = relabel(example, recipe)
    assert not isinstance(found, Dropped)
    return list(found)


def both_kept(both: list[Conditioned], tokenizer: Any, **options: Any) -> list[Tokenized]:
    rows, counts = tokenize_all(both, tokenizer, **options)
    assert len(rows) == 2, counts
    return rows


def kept(example: Conditioned, tokenizer: Any, **options: Any) -> Tokenized:
    row = tokenize(example, tokenizer, **options)
    assert isinstance(row, Tokenized), row
    return row


def words(n: int, word: str = "w") -> str:
    return " ".join(f"{word}{i}" for i in range(n))


# --- the boundary ---


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
@pytest.mark.parametrize("response", RESPONSES)
def test_scored_tokens_are_the_response_and_its_end_token(tokenizers: dict[str, Any], name: str, response: str) -> None:
    """Finds a header, a piece of the prompt, or a template's last line break among the scored tokens."""
    tokenizer = tokenizers[name]
    row = kept(unconditioned(scored(responses=(response, "other"))), tokenizer)
    *body, end = row.response_ids[0].tolist()
    written = {"trimmed": response.strip(), "spaced": f" {response} "}.get(name, response)
    assert tokenizer.decode(body) == written
    assert tokenizer.decode([end]) == tokenizer.eos_token
    assert end not in body


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_prompt_is_what_generation_starts_from(tokenizers: dict[str, Any], name: str) -> None:
    """Finds a training prompt that is not the one asked at generation, or depends on its responses."""
    tokenizer = tokenizers[name]
    example = unconditioned(scored(responses=RESPONSES, scores=None))
    row = kept(example, tokenizer)
    assert row.prompt_ids.tolist() == encode_prompt(example.prompt, tokenizer)
    assert tokenizer.decode(row.prompt_ids) == render_prompt(example.prompt, tokenizer)
    for response in RESPONSES:
        alone = kept(unconditioned(scored(responses=(response, "x"))), tokenizer)
        assert alone.prompt_ids.tolist() == row.prompt_ids.tolist()
    assert row.prompt_ids.dtype == row.response_ids[0].dtype == np.int32


@pytest.mark.parametrize("name", ["chatml", "trimmed", "spaced", "thinking"])
def test_tokens_are_those_of_the_whole_text(tokenizers: dict[str, Any], name: str) -> None:
    """Finds a response encoded apart where the tokenizer would have read prompt and response as one."""
    tokenizer = tokenizers[name]
    example = unconditioned(scored())
    row = kept(example, tokenizer)
    for response, ids in zip(example.responses, row.response_ids, strict=True):
        turns = [*example.prompt, Message("assistant", response)]
        text = tokenizer.apply_chat_template([turn.as_dict() for turn in turns], tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        ours = [*row.prompt_ids.tolist(), *ids.tolist()]
        assert whole[: len(ours)] == ours
        assert tokenizer.decode(whole[len(ours) :]).strip() == "", "text after the end token is not scored"


def test_encoding_the_tail_is_encoding_the_whole(tokenizers: dict[str, Any]) -> None:
    """Finds a short cut that changes tokens: only what follows the last added token is encoded again."""
    tokenizer = tokenizers["chatml"]
    encoder = Encoder(tokenizer)
    prompt = render_prompt((Message("system", "be brief"), Message("user", words(50))), tokenizer)
    assert len(encoder.tail(prompt)) < 40
    for rest in RESPONSES:
        both = encoder.ids(prompt + rest)
        assert encoder.ids(prompt) + encoder.continuation(prompt, rest) == both


def test_a_merge_over_the_boundary_leaves_the_prompt_alone() -> None:
    """Finds prompt tokens that change with the response: a model cannot take a token back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: n for n, token in enumerate(["<eos>", "a", "b", "Ċ", "ĊĊ", "Ċa"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("Ċ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    example = unconditioned(scored("b", responses=("\nb", "ab")))
    row = kept(example, tokenizer)
    assert row.prompt_ids.tolist() == [vocab["b"], vocab["ĊĊ"]]
    assert row.response_ids[0].tolist() == [vocab["Ċ"], vocab["b"], vocab["<eos>"]]
    assert row.response_ids[1].tolist() == [vocab["a"], vocab["b"], vocab["<eos>"]]


def test_reasoning_is_off_in_training_and_asking(tokenizers: dict[str, Any]) -> None:
    """Finds a reasoning block that is scored, or that only one of the two prompts has."""
    text = render_prompt((Message("user", "hi"),), tokenizers["thinking"])
    assert text.endswith("<think>\n\n</think>\n\n")


def test_a_rewritten_turn_falls_back_and_is_counted() -> None:
    """Finds a boundary guessed in silence where the template's header is not in the finished turn."""
    tokenizer = make_tokenizer(REASONER)
    rows, counts = tokenize_all(halves(scored()), tokenizer)
    assert counts.notes == {NO_PREFIX: 2}
    assert tokenizer.decode(rows[0].prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(rows[0].response_ids[0]) == "Paris is the capital of France.<|im_end|>"


def test_specials_are_added_once() -> None:
    """Finds a doubled or a missing BOS, and a prompt that ends with EOS."""
    from tokenizers.processors import TemplateProcessing

    for template in (None, "{{ bos_token }}" + CHATML):
        tokenizer = make_tokenizer(template)
        tokenizer.bos_token = "<pad>"
        bos, eos = tokenizer.convert_tokens_to_ids(["<pad>", tokenizer.eos_token])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<pad> $A " + tokenizer.eos_token, special_tokens=[("<pad>", bos), (tokenizer.eos_token, eos)]
        )
        row = kept(unconditioned(scored()), tokenizer)
        assert row.prompt_ids.tolist().count(bos) == 1 and row.prompt_ids[0] == bos
        assert row.prompt_ids[-1] != eos
        assert all(bos not in ids and ids.tolist().count(eos) == 1 for ids in row.response_ids)


def test_end_token_is_the_one_the_template_writes() -> None:
    """Finds eos scored where the model ends its turn with another token (Gemma, Llama 3)."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.eos_token = "<eos>"
    end = turn_end(tokenizer)
    assert tokenizer.decode([end.token]) == "<|im_end|>" and end.written and end.after == "\n"
    row = kept(unconditioned(scored()), tokenizer)
    assert [tokenizer.decode(ids[-1:]) for ids in row.response_ids] == ["<|im_end|>"] * 2


def test_tools_reach_the_template() -> None:
    """Finds tools that are read and then forgotten."""
    tokenizer = make_tokenizer("{% if tools %}TOOLS {{ tools | length }}\n{% endif %}" + CHATML)
    example = unconditioned(scored(extras={"tools": [{"name": "search"}, {"name": "sum"}]}))
    assert tokenizer.decode(kept(example, tokenizer).prompt_ids).startswith("TOOLS 2\n")
    assert render_turn(example.prompt, "x", tokenizer, tools=example.extras["tools"]).startswith("TOOLS 2\n")


# --- the two halves ---


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_halves_exchange_their_responses(tokenizers: dict[str, Any], name: str) -> None:
    """Finds a second half whose labels or tokens are not the first's exchanged."""
    first, second = (kept(half, tokenizers[name]) for half in halves(scored()))
    assert [ids.tolist() for ids in first.response_ids] == [ids.tolist() for ids in second.response_ids[::-1]]
    assert first.scores == second.scores[::-1] == (9.0, 2.5)
    texts = [tokenizers[name].decode(row.prompt_ids) for row in (first, second)]
    assert texts[0] != texts[1]
    assert texts[0].replace("score: 9.", "score: 2.5.") == texts[1]


@pytest.mark.parametrize("recipe", [RECIPE, SYSTEM])
@pytest.mark.parametrize("max_length", [240, 300, 420])
def test_halves_are_cut_at_the_same_place(tokenizers: dict[str, Any], recipe: Recipe, max_length: int) -> None:
    """Finds halves that differ in more than the goal once they are cut: 10 is longer to write than 2.5."""
    for n in range(60, 80):  # so that some lie just about the limit
        long = scored(words(n), responses=(words(n, "x"), words(n // 2, "y")), scores=(10.0, 2.5))
        first, second = both_kept(halves(long, recipe), tokenizers["chatml"], max_length=max_length)
        assert [ids.tolist() for ids in first.response_ids] == [ids.tolist() for ids in second.response_ids[::-1]]
        texts = [tokenizers["chatml"].decode(row.prompt_ids) for row in (first, second)]
        assert texts[0].replace("score: 10.", "score: 2.5.") == texts[1]


def test_halves_about_the_limit_are_cut_together(tokenizers: dict[str, Any]) -> None:
    """Finds one half cut and the other not, where only the longer number passes the limit."""
    both = halves(scored(words(40), responses=(words(20, "x"), words(20, "y")), scores=(10.0, 2.5)))
    whole = [kept(half, tokenizers["chatml"]) for half in both]
    lengths = [len(row.prompt_ids) + max(map(len, row.response_ids)) for row in whole]
    for max_length in range(min(lengths) - 4, max(lengths) + 5):
        first, second = both_kept(both, tokenizers["chatml"], max_length=max_length)
        assert [len(ids) for ids in first.response_ids] == [len(ids) for ids in second.response_ids[::-1]]
        texts = [tokenizers["chatml"].decode(row.prompt_ids) for row in (first, second)]
        assert texts[0].replace("score: 10.", "score: 2.5.") == texts[1]


# --- cutting ---


def conversations() -> Iterator[tuple[str, Scored, Recipe]]:
    long = words(400)
    yield "goal and body in one message", scored(long), RECIPE
    yield "goal alone in the system message", scored(long), SYSTEM
    system = (Message("system", words(300, "s")), Message("user", "Who?"))
    yield "long system text after the goal", scored(prompt=system), SYSTEM
    turns = (Message("user", long), Message("assistant", words(200, "r")), Message("user", words(90, "u")))
    yield "several long turns", scored(prompt=turns), RECIPE
    quoted = RECIPE.goal_text(9.0)
    yield "the goal's words quoted in the body", scored(f"{long} {quoted} {long}"), RECIPE


CONVERSATIONS = list(conversations())


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize(("example", "recipe"), [c[1:] for c in CONVERSATIONS], ids=[c[0] for c in CONVERSATIONS])
@pytest.mark.parametrize("max_length", [290, 400, 600])
def test_the_goal_survives_every_cut(
    tokenizers: dict[str, Any], template: str, example: Scored, recipe: Recipe, max_length: int
) -> None:
    """Finds the goal cut off long prompts, which makes the two halves contradict each other."""
    tokenizer = tokenizers[template]
    for half in halves(example, recipe):
        row = kept(half, tokenizer, max_length=max_length, max_prompt_length=max_length - 40)
        text = tokenizer.decode(row.prompt_ids)
        assert half.goal_text is not None and half.goal_text in text
        before = tokenizer.decode(encode_prompt(half.prompt, tokenizer))
        assert row.prompt_cut > 0
        assert text.split(half.goal_text)[0] == before.split(half.goal_text)[0]
        assert len(row.prompt_ids) + max(map(len, row.response_ids)) <= max_length
        assert row.prompt_cut + len(row.prompt_ids) == len(encode_prompt(half.prompt, tokenizer))


def test_a_cut_takes_the_middle(tokenizers: dict[str, Any]) -> None:
    """Finds a cut that takes the question's beginning or end, the frame of a turn, or more than it must."""
    tokenizer = tokenizers["chatml"]
    example = unconditioned(scored(words(400)))
    row = kept(example, tokenizer, max_length=300)
    text = tokenizer.decode(row.prompt_ids)
    assert re.fullmatch(
        r"<\|im_start\|>user\nw0 w1 w2.*\S ?" + re.escape(GAP) + r".*w398 w399<\|im_end\|>\n<\|im_start\|>assistant\n",
        text,
        re.DOTALL,
    )
    longest = max(map(len, row.response_ids))
    assert 300 - 8 <= len(row.prompt_ids) + longest <= 300
    assert not any(row.response_cut)


def test_short_turns_stay_whole(tokenizers: dict[str, Any]) -> None:
    """Finds a last question cut although an earlier turn is the long one."""
    turns = (Message("user", words(300)), Message("assistant", "Yes."), Message("user", "And why is that?"))
    row = kept(unconditioned(scored(prompt=turns)), tokenizers["chatml"], max_length=300)
    text = tokenizers["chatml"].decode(row.prompt_ids)
    assert "Yes.<|im_end|>" in text and "And why is that?<|im_end|>" in text


def test_responses_are_cut_when_the_prompt_has_given_its_share(tokenizers: dict[str, Any]) -> None:
    """Finds prompts cut below their limit, a response cut at its head, or an end token on a cut one."""
    tokenizer = tokenizers["chatml"]
    example = unconditioned(scored(words(400), responses=(words(400, "x"), "short")))
    whole = kept(example, tokenizer, max_length=100_000)
    row = kept(example, tokenizer, max_length=200, max_prompt_length=80)
    assert 80 - 8 <= len(row.prompt_ids) <= 80
    cut, short = row.response_ids
    assert len(row.prompt_ids) + len(cut) <= 200
    assert cut.tolist() == whole.response_ids[0][: len(cut)].tolist()
    assert row.response_cut == (len(whole.response_ids[0]) - len(cut), 0)
    assert short.tolist() == whole.response_ids[1].tolist()
    small = kept(unconditioned(scored("Hi", responses=(words(400, "x"), "short"))), tokenizer, max_length=100)
    assert small.prompt_cut == 0, "a prompt below its limit is not cut for its responses"


@pytest.mark.parametrize("example", [unconditioned(scored()), halves(scored())[0], halves(scored(), SYSTEM)[1]])
def test_nothing_is_cut_that_fits(tokenizers: dict[str, Any], example: Conditioned) -> None:
    """Finds a limit that is off by one, or by what a goal might take: exactly max_length is not too long."""
    tokenizer = tokenizers["chatml"]
    row = kept(example, tokenizer)
    exactly = len(row.prompt_ids) + max(map(len, row.response_ids))
    same = kept(example, tokenizer, max_length=exactly)
    assert (same.prompt_cut, same.response_cut) == (0, (0, 0))
    less = kept(example, tokenizer, max_length=exactly - 1)
    assert less.prompt_cut or any(less.response_cut)
    assert tokenize(example, tokenizer, max_length=exactly - 1, truncation="drop") == Dropped(
        "longer than max_length", "e"
    )


@pytest.mark.parametrize("scores", [(9.0, 2.5), (10.0, 1.0), (3.0, 7.3333333333)])
def test_halves_that_both_fit_are_neither_cut_nor_dropped(tokenizers: dict[str, Any], scores: Any) -> None:
    """Finds a row cut for a longer number than either half's; one token less, and both are too long."""
    tokenizer, both = tokenizers["chatml"], halves(scored(scores=scores))
    whole = [kept(half, tokenizer) for half in both]
    exactly = max(len(row.prompt_ids) + max(map(len, row.response_ids)) for row in whole)
    for truncation in ("cut", "drop"):
        rows, counts = tokenize_all(both, tokenizer, max_length=exactly, truncation=truncation)
        assert [row.prompt_ids.tolist() for row in rows] == [row.prompt_ids.tolist() for row in whole]
        assert not counts.notes and not counts.dropped
    rows, counts = tokenize_all(both, tokenizer, max_length=exactly - 1, truncation="drop")
    assert not rows and counts.dropped == {"longer than max_length": 2}


def test_a_prompt_that_is_all_goal_is_dropped(tokenizers: dict[str, Any]) -> None:
    """Finds a goal cut because nothing else was left to cut."""
    (half, _) = halves(scored())
    found = tokenize(half, tokenizers["chatml"], max_length=40)
    assert found == Dropped("prompt longer than max_length even when cut", "e")


def test_every_limit_leaves_a_response_or_drops_the_row(tokenizers: dict[str, Any]) -> None:
    """Finds an empty response, or a row over its limit, where the prompt leaves just no room."""
    example = scored(words(60), scores=(7.3333333333, 2))  # a goal longer than most
    (half, _) = halves(example, Recipe(template="Of quality {score}.", carrier="first_user"))
    dropped = 0
    for max_length in range(30, 230):
        row = tokenize(half, tokenizers["chatml"], max_length=max_length)
        if isinstance(row, Dropped):
            assert row.reason == "prompt longer than max_length even when cut"
            dropped += 1
        else:
            assert all(map(len, row.response_ids))
            assert len(row.prompt_ids) + max(map(len, row.response_ids)) <= max_length
    assert 0 < dropped < 50


def test_cut_prompt_cuts_no_more_than_it_must() -> None:
    """Finds a search that stops early, or drops the space between goal and body."""
    prompt = (Message("user", "GOAL\n\n" + "a" * 100), Message("user", "bbGOALbbbb"))

    def n_left(bound: int) -> int:
        cut = cut_prompt(prompt, "GOAL", lambda p: sum(len(m.content) for m in p) <= bound)
        assert cut[0].content.startswith("GOAL\n\n")
        return sum(len(m.content) for m in cut)

    assert n_left(116) == 116
    assert n_left(80) == 80
    assert n_left(0) <= len("GOAL\n\n") + 2 * len(GAP), "a quotation of the goal is body"


# --- rows that do not travel on ---


def test_responses_of_no_token_are_dropped() -> None:
    """Finds a response of nothing but an end token: some tokenizers drop characters they do not know."""
    tokenizer = make_tokenizer(CHATML)
    from tokenizers.normalizers import Replace

    tokenizer.backend_tokenizer.normalizer = Replace("☃", "")
    found = tokenize(unconditioned(scored(responses=("☃☃", "fine"))), tokenizer)
    assert found == Dropped("response encodes to no token", "e")


def test_responses_of_the_same_tokens_are_dropped(tokenizers: dict[str, Any]) -> None:
    """Finds pairs without a difference, which cost a step and teach nothing."""
    example = unconditioned(scored(responses=(words(300) + " yes", words(300) + " no")))
    assert tokenize(example, tokenizers["chatml"], max_length=100) == Dropped("all responses are the same tokens", "e")


def test_a_refused_conversation_is_dropped_with_the_template_s_words(no_system_tokenizer: Any) -> None:
    """Finds a template's complaint swallowed, or a run that dies of one row."""
    good, bad = unconditioned(scored()), halves(scored(), SYSTEM)[0]
    rows, counts = tokenize_all([good, bad], no_system_tokenizer)
    assert len(rows) == counts.kept == 1
    (reason,) = counts.dropped
    assert "System role not supported" in reason
    with pytest.raises(DataError, match="System role not supported"):
        encode_prompt(bad.prompt, no_system_tokenizer)


def test_a_template_that_forgets_the_goal_is_found() -> None:
    """Finds conditioned rows whose condition never reaches the model."""
    tokenizer = make_tokenizer(
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    found = tokenize(halves(scored(), SYSTEM)[0], tokenizer)
    assert found == Dropped("the chat template drops the goal", "e")
    assert resolve_carrier(tokenizer) == "first_user"


def test_a_tokenizer_that_cannot_read_the_goal_is_noted() -> None:
    """Finds goals that encode to the same tokens whatever the number."""
    from tokenizers.normalizers import Replace

    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = Replace("9", "")
    _, counts = tokenize_all(halves(scored()), tokenizer)
    assert counts.notes == {GOAL_LOST: 1}


def test_strict_names_the_rows(tokenizers: dict[str, Any]) -> None:
    """Finds rows dropped in silence where every row was to be used."""
    examples = [unconditioned(scored(words(200), example_id=f"row {n}")) for n in range(30)]
    with pytest.raises(DataError, match=r"30 examples(?s:.*)row 9: longer than max_length(?s:.*)20 more"):
        tokenize_all(examples, tokenizers["chatml"], max_length=50, truncation="drop", strict=True)


def test_strict_names_a_source_once_for_all_its_halves(tokenizers: dict[str, Any]) -> None:
    """Finds a list of ten that names five, and a count of halves where sources are meant."""
    examples = [half for n in range(2) for half in halves(scored(words(200), example_id=f"row {n}"))]
    assert len(examples) == 4
    with pytest.raises(DataError) as caught:
        tokenize_all(examples, tokenizers["chatml"], max_length=50, truncation="drop", strict=True)
    assert str(caught.value).splitlines() == [
        "2 examples cannot be used (strict):",
        "  row 0: longer than max_length",
        "  row 1: longer than max_length",
    ]


def test_strict_names_each_reason_of_a_source(tokenizers: dict[str, Any]) -> None:
    """Finds a second fault that hides behind the first of the same id."""
    long = unconditioned(scored(words(200)))
    same = unconditioned(scored("Hi", responses=("Good.", "Good.")))
    with pytest.raises(DataError, match=r"1 example cannot(?s:.*)longer than(?s:.*)e: all responses are the same"):
        tokenize_all([long, same], tokenizers["chatml"], max_length=50, truncation="drop", strict=True)


@pytest.mark.parametrize(
    "options",
    [{"max_length": 1}, {"max_length": 64, "max_prompt_length": 64}, {"max_prompt_length": 0}, {"truncation": "x"}],
)
def test_impossible_limits_are_refused(tokenizers: dict[str, Any], options: dict[str, Any]) -> None:
    """Finds limits that leave no response, found out only when nothing is left."""
    with pytest.raises(ConfigError):
        tokenize(unconditioned(scored()), tokenizers["chatml"], **options)


# --- all at once ---


def test_all_at_once_is_one_by_one(tokenizers: dict[str, Any]) -> None:
    """Finds a cache or a batch that mixes rows up."""
    examples = []
    goals: dict[str, set[str | None]] = {}
    for n in range(300):
        example = scored(words(1 + n % 90), responses=(words(1 + n % 70, "x"), words(n % 7, "y") + "."))
        both = halves(replace(example, example_id=f"e{n}"))
        examples += both
        goals[f"e{n}"] = {half.goal_text for half in both}
    for name in ("chatml", "plain"):
        rows, counts = tokenize_all(examples, tokenizers[name], max_length=400)
        alone = [
            kept(half, tokenizers[name], max_length=400, goal_texts=goals[half.example_id]) for half in examples
        ]
        assert counts.kept == len(rows) == len(alone)
        for a, b in zip(rows, alone, strict=True):
            assert a.prompt_ids.tolist() == b.prompt_ids.tolist()
            assert [ids.tolist() for ids in a.response_ids] == [ids.tolist() for ids in b.response_ids]
            assert (a.example_id, a.half, a.goal, a.prompt_cut, a.response_cut) == (
                b.example_id, b.half, b.goal, b.prompt_cut, b.response_cut,
            )  # fmt: skip
        assert counts.notes[PROMPT_CUT] == sum(row.prompt_cut > 0 for row in rows) > 0
        assert counts.notes[RESPONSE_CUT] == sum(any(row.response_cut) for row in rows) > 0


def test_columns_keep_numbers_of_one_type(tokenizers: dict[str, Any]) -> None:
    """Finds a column whose type changes from batch to batch, and text among the numbers."""
    extras = ({"margin": 1, "group": 3, "source": "web"}, {"margin": 0.5, "group": 4, "source": "web"})
    examples = [replace(unconditioned(scored(attributes={"honesty": (1, 2)})), extras=extra) for extra in extras]
    rows, _ = tokenize_all(examples, tokenizers["chatml"])
    assert [dict(row.extras) for row in rows] == [
        {"margin": 1.0, "group": 3, "honesty": (1, 2), "goal_distances": (0.0, 42.25)},
        {"margin": 0.5, "group": 4, "honesty": (1, 2), "goal_distances": (0.0, 42.25)},
    ]
    assert all(isinstance(row.extras["margin"], float) for row in rows)


def test_distances_to_the_goal_travel_with_the_row(tokenizers: dict[str, Any]) -> None:
    """Finds a list whose overall scores tie taken for one that prefers nothing."""
    recipe = Recipe(template=ATTRIBUTES_TEMPLATE, attributes=("help", "truth"))
    several = scored(
        responses=("a", "b", "c"), scores=(5, 5, 5), attributes={"help": (9, 8, 2), "truth": (3, 3, 8)}
    )
    one = scored(responses=("a", "b", "c"), scores=(9, 5, 6))
    rows, _ = tokenize_all([*halves(several, recipe), *halves(one)], tokenizers["chatml"])
    assert [row.extras["goal_distances"] for row in rows] == [
        (0.0, 1.0, 74.0),
        (0.0, 1.0, 61.0),
        (0.0, 61.0, 74.0),
        (0.0, 9.0, 16.0),
        (0.0, 1.0, 9.0),
        (0.0, 1.0, 16.0),
    ]
    (plain,), _ = tokenize_all([unconditioned(replace(one, scores=None))], tokenizers["chatml"])
    assert "goal_distances" not in plain.extras


# --- tokenizers on disk ---


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    """Finds a traceback, or a tokenizer made up, where files are missing or damaged."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))
    make_tokenizer(None).save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    """Finds a model taught never to stop."""
    (tmp_path / "config.json").write_text("{}")
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no token that ends a turn"):
        load_tokenizer(str(tmp_path))


def test_an_own_template(tmp_path: Path) -> None:
    """Finds a template that is accepted and not used, given as a file or as text."""
    (tmp_path / "config.json").write_text("{}")
    make_tokenizer(None).save_pretrained(tmp_path)
    (tmp_path / "own.jinja").write_text(UNENDED)
    for given in (UNENDED, str(tmp_path / "own.jinja")):
        tokenizer = load_tokenizer(str(tmp_path), chat_template=given)
        assert render_prompt((Message("user", "hi"),), tokenizer) == "user: hi\nassistant: "


@pytest.mark.parametrize("model", ["stories260K", "tinystories-656k"])
def test_real_tokenizers(assets: Path, model: str) -> None:
    """Finds what made-up tokenizers do not do: sentencepiece's leading space, several eos ids, lost text."""
    tokenizer = load_tokenizer(str(assets / "models" / model))
    found, _ = read_source(SourceSpec(str(assets / "data" / "ultrafeedback" / "eval.jsonl")))
    examples = [half for example in found if example.scores[0] != example.scores[1] for half in halves(example)]
    rows, counts = tokenize_all(examples, tokenizer, max_length=512)
    assert counts.kept > 0.9 * len(examples)
    by_id = {(example.example_id, example.half): example for example in examples}
    lossless = model == "stories260K"
    for row in rows:
        example = by_id[row.example_id, row.half]
        assert row.prompt_ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in row.prompt_ids[1:]
        assert len(row.prompt_ids) + max(map(len, row.response_ids)) <= 512
        prompt = tokenizer.decode(row.prompt_ids)
        if lossless:
            assert example.goal_text in prompt
        for text, ids, cut in zip(example.responses, row.response_ids, row.response_cut, strict=True):
            whole = tokenizer.decode([*row.prompt_ids, *ids])
            assert whole.startswith(prompt)
            if not cut:
                assert ids[-1] == tokenizer.eos_token_id
            if lossless and not cut:
                assert whole[len(prompt) :] == text + tokenizer.eos_token
            if lossless and cut:
                assert text.startswith(whole[len(prompt) :].rstrip("\ufffd"))


def test_a_tokenizer_that_drops_characters(assets: Path) -> None:
    """Finds an empty response scored as one end token."""
    tokenizer = load_tokenizer(str(assets / "models" / "tinystories-656k"))
    found = tokenize(unconditioned(scored(responses=("你好", "Hello"))), tokenizer)
    assert found == Dropped("response encodes to no token", "e")


# --- mlxpref inspect ---


def test_inspect_marks_what_is_scored(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Finds marks around a header, an unmarked end token, a summary that counts other rows."""
    rows = halves(scored(words(100), responses=("Good.", words(80, "x"))), SYSTEM)
    write_relabelled(tmp_path / "data", {"train": rows}, SYSTEM, counts={"train": Counts(kept=2)})
    ran = CliRunner().invoke(
        main,
        ["inspect", str(tmp_path / "data"), "--model", str(tiny_model_dir), "--max-length", "400", "-n", "1"],
    )
    assert ran.exit_code == 0, ran.output
    assert "<|im_start|>assistant\n⟦Good.<|im_end|>⟧" in ran.output
    assert ran.output.count("⟦") == ran.output.count("⟧") == 2
    assert "half chosen" in ran.output and "Overall score: 9." in ran.output
    assert "2 rows kept, 0 dropped" in ran.output
    assert "kept 2: prompt cut to fit max_length" in ran.output
    assert re.search(r"prompt \d+ tokens \(\d+ cut\)", ran.output)
    assert "\x1b" not in ran.output


def test_inspect_names_the_goal_of_each_row_of_a_list(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Finds the goal of another row: a list has several rows of one id and half."""
    rows = halves(scored(responses=("Good.", "Fair.", "Bad."), scores=(9, 5.5, 2)), SYSTEM)
    write_relabelled(tmp_path / "data", {"train": rows}, SYSTEM)
    ran = CliRunner().invoke(main, ["inspect", str(tmp_path / "data"), "--model", str(tiny_model_dir)])
    assert ran.exit_code == 0, ran.output
    shown = ran.output.split("=====\n")[1:]
    assert len(shown) == 3
    for text, goal in zip(shown, ("9", "5.5", "2"), strict=True):
        assert text.startswith(f"goal {goal}\n") and f"Overall score: {goal}." in text
        assert text.index("----- chosen, score " + goal) < text.index("----- response 2, score")


def test_inspect_shows_what_a_configuration_trains_on(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Finds a preview of other rows than those of `train -c`: without goals, of another length, unsplit."""
    lines = [
        {"prompt": f"Say {n}", "chosen": words(90), "rejected": "No.", "score_chosen": 8, "score_rejected": 4}
        for n in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {tiny_model_dir}}}\ndata: {{source: {tmp_path / 'pairs.jsonl'}, valid_fraction: 0.25}}\n"
        "relabel: {score_range: [1, 10], mapping: identity}\ntokenization: {max_length: 300}\n"
    )
    run = lambda *more: CliRunner().invoke(main, ["inspect", "-c", str(config), "-n", "99", *more])  # noqa: E731 - a shorthand
    for split, n in (("train", 12), ("valid", 4)):
        ran = run("--split", split)
        assert ran.exit_code == 0, ran.output
        assert ran.output.count("\ngoal 8\n") == ran.output.count("\ngoal 4\n") == n // 2
        assert f"{n} rows kept, 0 dropped" in ran.output and " cut) scored" in ran.output
    wrong = {"--limit 9": "leave out --limit", "pairs.jsonl": "SOURCE", "--split x": "gives train, valid"}
    for more, said in wrong.items():
        ran = run(*more.split())
        assert ran.exit_code == 2 and said in ran.output, ran.output


def test_inspect_counts_one_row_as_one(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Finds "1 rows", strict that is accepted and idle, a limit that cuts between two halves of an example."""
    rows = [half for n in range(3) for half in halves(scored(example_id=f"row {n}"), SYSTEM)]
    write_relabelled(tmp_path / "data", {"train": rows[:4], "valid": rows[4:]}, SYSTEM)
    base = ["inspect", str(tmp_path / "data"), "--model", str(tiny_model_dir), "-n", "0"]
    run = lambda *more: CliRunner().invoke(main, [*base, *more])  # noqa: E731 - a shorthand
    assert "2 rows kept, 0 dropped" in run("--limit", "1").output
    assert "2 rows kept, 0 dropped" in run("--split", "validation").output
    short = ("--max-length", "8", "--truncation", "drop")
    assert "0 rows kept, 4 dropped" in run(*short).output
    ran = run(*short, "--strict")
    assert ran.exit_code == 1 and "2 examples cannot be used" in ran.stderr
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}\n')
    ran = CliRunner().invoke(main, ["inspect", str(source), "--model", str(tiny_model_dir), "-n", "0"])
    assert "1 row kept, 0 dropped" in ran.output


def test_inspect_takes_the_score_that_is_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    source = tmp_path / "list.jsonl"
    row = {"prompt": "Hi", "responses": [{"text": "A.", "help": 1, "truth": 5}, {"text": "B.", "help": 4, "truth": 2}]}
    source.write_text(json.dumps(row) + "\n")
    ran = CliRunner().invoke(main, ["inspect", str(source), "--model", str(tiny_model_dir), "--score", "help"])
    assert ran.exit_code == 0, ran.output
    assert "chosen, score 4" in ran.output and "⟦B." in ran.output.split("rejected")[0]


def test_inspect_marks_single_tokens(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Finds tokens shown twice or lost, and characters torn into bytes."""
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"prompt": "Hi", "chosen": "Hello, 你好!", "rejected": "No."}\n', encoding="utf-8")
    ran = CliRunner().invoke(main, ["inspect", str(source), "--model", str(tiny_model_dir), "--tokens"])
    assert ran.exit_code == 0, ran.output
    line = next(line for line in ran.output.splitlines() if "你" in line)
    assert "".join(re.findall("⟦(.*?)⟧", line)) == "Hello, 你好!<|im_end|>"
    assert line.count("⟦") > 4
    assert "not relabelled" in ran.output


def test_inspect_shows_the_further_texts_an_objective_reads(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Finds a preview without the third response, and a rationale scored together with what leads to it."""
    line = {"prompt": "Say it", "chosen": "Yes.", "rejected": "No.", "third": "Perhaps.", "rationale": "It is kind."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    config = tmp_path / "run.yaml"
    for objective, scored_text in (("xpo", "Perhaps."), ("rationale_dpo", "It is kind.")):
        config.write_text(
            f"model: {{path: {tiny_model_dir}}}\ndata: {{source: {tmp_path / 'pairs.jsonl'}}}\nobjective: {objective}\n"
        )
        ran = CliRunner().invoke(main, ["inspect", "-c", str(config)])
        assert ran.exit_code == 0, ran.output
        assert ran.output.count("⟦") == 3 and f"⟦{scored_text}<|im_end|>⟧" in ran.output
        name = "third" if objective == "xpo" else "rationale"
        shown = ran.output.partition(f"----- {name} · ")[2]
        assert shown and ("No." in shown.partition("⟦")[0]) == (name == "rationale")
