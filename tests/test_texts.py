"""Further texts behind a prompt: what is read, what is scored, and where it stands in the arrays."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpref.data.batching import collate
from mlxpref.data.parts import PlannedPart, Splitter
from mlxpref.data.plan import plan_pass, plan_steps
from mlxpref.data.relabel import relabel, unconditioned
from mlxpref.data.render import render_prompt
from mlxpref.data.shapes import ceil_scored
from mlxpref.data.texts import QUESTION
from mlxpref.data.tokenization import RESPONSE_CUT, TEXT_CUT, tokenize, tokenize_all
from mlxpref.data.tokens import TOO_LONG
from mlxpref.errors import DataError
from mlxpref.prepare import fingerprint
from mlxpref.records import Conditioned, Dropped, Message, Scored, Tokenized
from mlxpref.reference import ReferenceStore, reference_logps, response_key, row_keys
from tests.conftest import CHATML, make_tokenizer
from tests.test_batching import read_back
from tests.test_tokenization import REASONER, RECIPE, TEMPLATES, words

ALL = {**TEMPLATES, "reasoner": REASONER, "plain": None}
FURTHER = {"third": "A third one.", "gold": " Gold: 你好 ", "rationale": "It names the city."}
GOOD, BAD = "Paris is the capital of France.", "I do not know."


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make_tokenizer(text) for name, text in ALL.items()}


def example(n: int = 0, prompt: str = "What is the capital of France?", **changes: Any) -> Scored:
    given = {"responses": (GOOD, BAD), "scores": (9.0, 2.5), "example_id": f"e{n}", "extras": FURTHER}
    return Scored(**{"prompt": (Message("user", prompt),), **given, **changes})


def halves(one: Scored) -> list[Conditioned]:
    found = relabel(one, RECIPE)
    assert not isinstance(found, Dropped)
    return list(found)


def kept(row: Tokenized | Dropped) -> Tokenized:
    assert isinstance(row, Tokenized), row
    return row


def joint(first: str = "Write about cats.", second: str = "Write about dogs.", **changes: Any) -> Scored:
    prompts = ([{"role": "user", "content": first}], [{"role": "user", "content": second}])
    return example(prompt=first, **{"scores": None, "extras": {"instructions": prompts}, **changes})


def ids(array: np.ndarray) -> list[int]:
    return array.tolist()


# --- what is scored ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_scored_tokens_are_the_text_and_its_end_token(tokenizers: dict[str, Any], name: str) -> None:
    """Finds: a header, a question or a lead among the scored tokens; a text without its end."""
    tokenizer = tokenizers[name]
    row = kept(tokenize(unconditioned(example()), tokenizer, texts=FURTHER))
    assert list(row.texts) == ["gold", "rationale", "third"]
    for text, written in FURTHER.items():
        (found,) = row.texts[text]
        expected = {"trimmed": written.strip(), "spaced": f" {written} "}.get(name, written)
        assert tokenizer.decode(found) == expected + tokenizer.eos_token
        assert found.dtype == np.int32


@pytest.mark.parametrize("name", ALL)
def test_responses_are_read_alike_with_texts_and_without(tokenizers: dict[str, Any], name: str) -> None:
    """Finds: reference log-probs of responses that are lost because another objective is tried."""
    for half in halves(example()):
        whole = kept(tokenize(half, tokenizers[name]))
        for limit in (len(whole.prompt_ids) + 12, 1024):
            plain = kept(tokenize(half, tokenizers[name], max_length=limit))
            assert any((plain.prompt_cut, *plain.response_cut)) == (limit < 1024)
            row = kept(tokenize(half, tokenizers[name], texts=["third", "gold"], max_length=limit))
            assert row_keys(row)[:2] == row_keys(plain)
            assert not plain.texts and not plain.leads and len(plain.slots) == 2


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("plain", "unended", "thinking", "reasoner")])
def test_a_rationale_goes_on_in_the_conversation(tokenizers: dict[str, Any], name: str) -> None:
    """Finds: a lead that the model would not read in a chat, or the worse response praised in the rejected half."""
    tokenizer = tokenizers[name]
    rows, _ = tokenize_all(halves(example()), tokenizer, texts=["rationale"])
    assert [row.half for row in rows] == ["chosen", "rejected"]
    for row, half in zip(rows, halves(example()), strict=True):
        turns = (*half.prompt, Message("assistant", GOOD), Message("user", QUESTION.format(other=BAD)))
        text = render_prompt(turns, tokenizer)
        lead, found = row.slots[2]
        assert tokenizer.decode([*row.prompt_ids, *lead]) == text
        assert [*row.prompt_ids, *lead] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(found).strip().startswith("It names")
    assert ids(rows[0].leads[2]) == ids(rows[1].leads[2])


@pytest.mark.parametrize("name", ["plain", "unended", "thinking", "reasoner"])
def test_a_rationale_follows_what_was_written_before(tokenizers: dict[str, Any], name: str) -> None:
    """Finds: a lead cut from a conversation in which the template writes the first response anew."""
    tokenizer = tokenizers[name]
    row = kept(tokenize(unconditioned(example()), tokenizer, texts=["rationale"]))
    lead, _ = row.slots[2]
    assert ids(lead)[: len(row.response_ids[0])] == ids(row.response_ids[0])
    said = tokenizer.decode(lead[len(row.response_ids[0]) :])
    assert said.count(QUESTION.format(other=BAD)) == 1
    header = {"plain": "\n\n", "unended": "\nassistant: ", "reasoner": "<|im_start|>assistant\n"}
    assert said.endswith(header.get(name, "<|im_start|>assistant\n<think>\n\n</think>\n\n"))


def test_the_better_response_of_unscored_pairs_and_of_ties(tokenizers: dict[str, Any]) -> None:
    """Finds: the order of a half taken for the order of the data."""
    tokenizer = tokenizers["chatml"]
    unscored = kept(tokenize(unconditioned(example(scores=None)), tokenizer, texts=["rationale"]))
    lower_first = example(responses=(BAD, GOOD), scores=(2.0, 9.0))
    tied = relabel(example(scores=(5.0, 5.0)), RECIPE, ties="keep")
    assert not isinstance(tied, Dropped) and [row.responses for row in tied] == [(GOOD, BAD), (BAD, GOOD)]
    rows = [unscored, *tokenize_all([*halves(lower_first), *tied], tokenizer, texts=["rationale"])[0]]
    assert len(rows) == 5
    assert {tokenizer.decode(row.leads[2]).partition("<|im_end|>")[0] for row in rows} == {GOOD}


def test_texts_that_are_not_there_are_said(tokenizers: dict[str, Any]) -> None:
    bare = unconditioned(example(extras={}))
    for name, reason in (
        ("third", "no third"),
        ("rationale", "no rationale"),
        ("instructions", "the responses share one prompt, so there are no instructions to compare"),
    ):
        found = tokenize(bare, tokenizers["chatml"], texts=[name])
        assert isinstance(found, Dropped) and found.reason == reason
    for wrong in ("fourth", "mismatched"):
        with pytest.raises(DataError, match=wrong):
            tokenize(bare, tokenizers["chatml"], texts=[wrong])
    three = replace(bare, responses=("a", "b", "c"), extras=FURTHER)
    found = tokenize(three, tokenizers["chatml"], texts=["rationale"])
    assert isinstance(found, Dropped) and "compares two responses" in found.reason


# --- limits --------------------------------------------------------------------------------------


def test_every_slot_stays_within_max_length(tokenizers: dict[str, Any]) -> None:
    """Finds: a text or a lead that carries a row over the limit, or over a model's positions."""
    extras = {"third": words(400), "gold": "short", "rationale": words(40, "because")}
    one = example(responses=(words(40), words(30, "v")), extras=extras)
    for name in ("chatml", "reasoner"):
        whole, _ = tokenize_all(halves(one), tokenizers[name], texts=FURTHER, max_length=4000)
        assert not any(any(row.response_cut) for row in whole)
        # What a template shows only to ask counts with the prompt, though no text is behind it.
        header = 16 if name == "reasoner" else 0
        least = max(len(row.prompt_ids) + len(row.leads[3]) + 1 for row in whole)
        for limit in (least + header, least + 60, least + 400):
            rows, counts = tokenize_all(halves(one), tokenizers[name], texts=FURTHER, max_length=limit)
            assert len(rows) == 2, list(counts.lines())
            assert max(len(row.prompt_ids) + len(lead) + len(text) for row in rows for lead, text in row.slots) <= limit
            assert counts.notes[TEXT_CUT] >= 2 and RESPONSE_CUT not in counts.notes
            for row, full in zip(rows, whole, strict=True):
                for text in row.texts:
                    n = len(row.texts[text][0])
                    assert ids(row.texts[text][0]) == ids(full.texts[text][0])[:n]
            first, second = rows
            assert [len(t) for _, t in first.slots[2:]] == [len(t) for _, t in second.slots[2:]], "halves cut apart"
        assert len(rows[0].texts["rationale"][0]) == len(whole[0].texts["rationale"][0])
        none, counts = tokenize_all(halves(one), tokenizers[name], texts=FURTHER, max_length=least - 1 - header)
        assert not none and counts.dropped == {"rationale has no room within max_length": 2}


def test_rows_whose_text_is_too_long_are_dropped_where_that_is_asked(tokenizers: dict[str, Any]) -> None:
    one = example(extras={"third": words(300), "rationale": "x"})
    options = {"max_length": 300, "truncation": "drop"}
    assert len(tokenize_all(halves(one), tokenizers["chatml"], texts=["rationale"], **options)[0]) == 2
    rows, counts = tokenize_all(halves(one), tokenizers["chatml"], texts=["third"], **options)
    assert not rows and counts.dropped == {TOO_LONG: 2}


# --- responses of other prompts ------------------------------------------------------------------


def test_mismatched_is_a_response_to_the_next_other_prompt(tokenizers: dict[str, Any]) -> None:
    """Finds: a half of the same source taken for another prompt, one side of the pairs met only, an open end."""
    asked = ["a?", "b?", "b?", "c?"]
    examples = [
        example(n, prompt=text, responses=(f"good {n}", f"bad {n}"), scores=(9, 4)) for n, text in enumerate(asked)
    ]
    conditioned = [row for one in examples for row in halves(one)]
    plain = relabel(examples[3], RECIPE, plain=True)
    assert not isinstance(plain, Dropped)
    rows, _ = tokenize_all([*conditioned[:6], *plain, *conditioned[6:]], tokenizers["chatml"], texts=["mismatched"])
    found = [tokenizers["chatml"].decode(row.texts["mismatched"][0]).removesuffix("<|im_end|>") for row in rows]
    # Slot 0 of even rows, slot 1 of odd ones; rows of "b?" go on to "c?", whose first row states no goal.
    assert found == ["good 1", "bad 1", "good 3", "bad 3", "good 3", "bad 3", "good 0", "bad 0", "good 0"]
    assert not rows[0].leads
    once, _ = tokenize_all(conditioned, tokenizers["chatml"], texts=["mismatched", "rationale", "third"])
    assert [len(lead) > 0 for lead, _ in once[0].slots] == [False, False, False, True, False]
    assert ids(once[0].slots[2][1]) == ids(once[2].response_ids[0])


def test_mismatched_responses_are_cut_and_cannot_come_from_one_prompt(tokenizers: dict[str, Any]) -> None:
    long = [unconditioned(example(0, prompt="a? " + words(20))), unconditioned(example(1, responses=(words(20), "b")))]
    rows, _ = tokenize_all(long, tokenizers["chatml"], texts=["mismatched"], max_length=100)
    (found,) = rows[0].texts["mismatched"]
    assert len(rows[0].prompt_ids) + len(found) == 100
    assert ids(found) == ids(rows[1].response_ids[0])[: len(found)]
    with pytest.raises(DataError, match="all rows have the same one"):
        tokenize_all(halves(example()), tokenizers["chatml"], texts=["mismatched"])
    assert tokenize_all([], tokenizers["chatml"], texts=["mismatched"])[0] == []


# --- a prompt for each response ------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_responses_with_a_prompt_each(tokenizers: dict[str, Any], name: str) -> None:
    """Finds: a response behind the other's prompt, a prompt token lost or scored twice."""
    tokenizer = tokenizers[name]
    row = kept(tokenize(unconditioned(joint()), tokenizer, texts=["instructions"]))
    bare = kept(tokenize(unconditioned(joint()), tokenizer))
    sides = [
        kept(tokenize(unconditioned(example(prompt=text, extras={})), tokenizer))
        for text in ("Write about cats.", "Write about dogs.")
    ]
    assert tokenizer.decode(row.prompt_ids).endswith("Write about")
    for k, side in enumerate(sides):
        lead, response = row.slots[k]
        assert [*row.prompt_ids, *lead] == ids(side.prompt_ids)
        assert ids(response) == ids(side.response_ids[k])
        nothing, scored = row.slots[2 + k]
        assert (ids(nothing), ids(scored)) == ([], ids(lead))
        assert row_keys(bare)[k] == row_keys(side)[k]
    assert [len(found) for found in bare.slots] == [2, 2] and not bare.texts


def test_the_shared_beginning_leaves_a_token_of_each_prompt(tokenizers: dict[str, Any]) -> None:
    """Finds: an instruction of no token, where one prompt begins with the whole other or both are equal."""
    plain = tokenizers["plain"]
    same = kept(tokenize(unconditioned(joint("Why?", "Why?")), plain, texts=["instructions"]))
    assert [len(found) for found in same.texts["instructions"]] == [1, 1]
    nested = kept(tokenize(unconditioned(joint("Write", "Write\n\nmore")), plain, texts=["instructions"]))
    assert min(map(len, nested.texts["instructions"])) == 1
    apart = tokenize(unconditioned(joint("cats", "dogs")), plain)
    assert isinstance(apart, Dropped) and apart.reason == "the prompts of the responses begin with different tokens"
    alike = kept(tokenize(unconditioned(joint(responses=("Yes.", "Yes."))), plain))
    assert ids(alike.response_ids[0]) == ids(alike.response_ids[1])
    twice = joint("Why?", "Why?", responses=("Yes.", "Yes."))
    assert isinstance(tokenize(unconditioned(twice), plain), Dropped)


def test_prompts_follow_their_responses_and_are_cut_alone(tokenizers: dict[str, Any]) -> None:
    """Finds: instructions in the order of the data beside responses in the order of the scores."""
    tokenizer = tokenizers["chatml"]
    turned = unconditioned(joint(scores=(1.0, 5.0)))
    assert turned.responses == (BAD, GOOD)
    row = kept(tokenize(turned, tokenizer, texts=["instructions"]))
    assert tokenizer.decode(row.leads[0]).startswith(" dogs.")
    long = unconditioned(joint("Write about cats.", "Write about dogs. " + words(200)))
    cut = kept(tokenize(long, tokenizer, texts=["instructions"], max_length=100))
    assert cut.prompt_cut > 0
    assert max(len(cut.prompt_ids) + len(lead) + len(text) for lead, text in cut.slots) <= 100
    goal = relabel(joint(scores=(9.0, 5.0)), RECIPE)
    assert not isinstance(goal, Dropped)
    found = tokenize(goal[0], tokenizer)
    assert isinstance(found, Dropped) and "a goal stands in one prompt" in found.reason
    both = joint(extras={**joint().extras, "third": "x"})
    found = tokenize(unconditioned(both), tokenizer, texts=["third", "instructions"])
    assert isinstance(found, Dropped) and "a further text has one prompt" in found.reason


# --- weights of tokens ---------------------------------------------------------------------------


def pieces_of(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text, "weight": float(n)} for n, text in enumerate(texts)]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4), words=st.sampled_from(["Ünï, 你好 🙂! Why?", GOOD, " a  b\n\nc"]))
def test_a_token_has_the_weight_of_the_piece_it_begins_in(
    tokenizers: dict[str, Any], name: str, cuts: list[int], words: str
) -> None:
    """Witness: decode ever more tokens. Finds a shift by the prompt, a space, or a character of several tokens."""
    tokenizer = tokenizers[name]
    places = [0, *sorted(min(cut, len(words)) for cut in cuts), len(words)]
    pieces = pieces_of(*(words[a:b] for a, b in pairwise(places)))
    extras = {"token_weights": (pieces_of(BAD), pieces)}
    row = kept(tokenize(unconditioned(example(responses=(BAD, words), extras=extras)), tokenizer, token_weights=True))
    weights, response = row.extras["token_weights"][1], ids(row.response_ids[1])
    assert weights.dtype == np.float32 and len(weights) == len(response)
    assert weights[-1] == len(pieces) - 1
    taken = {"trimmed": len(words) - len(words.lstrip()), "spaced": -1}.get(name, 0)
    for t in range(len(response) - 1):
        before = tokenizer.decode(response[:t])
        begins = len(before.rstrip("\ufffd")) + taken
        inside = [n for n in range(len(pieces)) if places[n] <= begins < places[n + 1]]
        expected = inside[0] if inside else 0 if begins < 0 else len(pieces) - 1
        assert weights[t] == expected, (tokenizer.decode(response[t : t + 1]), begins)
    assert not row.extras["token_weights"][0].any()


def test_weights_are_cut_with_their_responses(tokenizers: dict[str, Any]) -> None:
    tokenizer, text = tokenizers["chatml"], words(60)
    extras = {"token_weights": (pieces_of(text[:100], text[100:]), pieces_of(BAD))}
    one = unconditioned(example(responses=(text, BAD), extras=extras))
    whole = kept(tokenize(one, tokenizer, token_weights=True))
    cut = kept(tokenize(one, tokenizer, token_weights=True, max_length=120))
    assert cut.response_cut[0] > 0
    n = len(cut.response_ids[0])
    assert cut.extras["token_weights"][0].tolist() == whole.extras["token_weights"][0][:n].tolist()
    assert "token_weights" not in kept(tokenize(one, tokenizer)).extras
    bare = tokenize(unconditioned(example()), tokenizer, token_weights=True)
    assert isinstance(bare, Dropped) and bare.reason == "no token_weights"


def test_weights_of_responses_with_a_prompt_each(tokenizers: dict[str, Any]) -> None:
    extras = {**joint().extras, "token_weights": (pieces_of("Paris ", GOOD[6:]), pieces_of(BAD))}
    row = kept(tokenize(unconditioned(joint(extras=extras)), tokenizers["chatml"], token_weights=True))
    first, second = row.extras["token_weights"]
    assert 0 < first.sum() < len(first) == len(row.response_ids[0])
    assert not second.any() and len(second) == len(row.response_ids[1])


def test_characters_a_tokenizer_drops_move_no_weight() -> None:
    """Finds: the token after an unknown character taken to begin where that stood."""
    from tokenizers import normalizers

    dropping = make_tokenizer(None)
    dropping.backend_tokenizer.normalizer = normalizers.Replace("ü", "")
    extras = {"token_weights": (pieces_of("aü", "\nb", " üc"), pieces_of(BAD))}
    one = unconditioned(example(responses=("aü\nb üc", BAD), extras=extras))
    row = kept(tokenize(one, dropping, token_weights=True))
    assert [dropping.decode([token]) for token in row.response_ids[0]] == ["a", "\n", "b", " c", "<eos>"]
    assert row.extras["token_weights"][0].tolist() == [0, 1, 1, 2, 2]


def test_spans_that_lag_behind_are_refused(monkeypatch: pytest.MonkeyPatch, tokenizers: dict[str, Any]) -> None:
    """Byte-pair models that have neither a character nor a token for what they do not know leave it out and count
    spans without it (tokenizers 0.22). Finds: weights laid on the tokens before."""
    from mlxpref.data import pieces

    right = pieces._encoded

    def lagging(text: str, special: bool, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
        found, spans = right(text, special, tokenizer)
        lags = [0 if token == tokenizer.eos_token_id else 2 for token in found]  # added tokens are found in the text
        return found, [(max(0, a - n), max(0, b - n)) for n, (a, b) in zip(lags, spans, strict=True)]

    monkeypatch.setattr(pieces, "_encoded", lagging)
    extras = {"token_weights": (pieces_of(GOOD), pieces_of(BAD))}
    for name in ("chatml", "unended"):
        found = tokenize(unconditioned(example(extras=extras)), tokenizers[name], token_weights=True)
        assert isinstance(found, Dropped) and "loses characters" in found.reason


def test_space_a_tokenizer_does_not_count_begins_its_token() -> None:
    """Finds: a token that begins with a space taken to begin after it."""
    from tokenizers import processors

    trimming = make_tokenizer(CHATML)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    extras = {"token_weights": (pieces_of("of ", "the ", "cat"), pieces_of(BAD))}
    one = unconditioned(example(responses=("of the cat", BAD), extras=extras))
    row = kept(tokenize(one, trimming, token_weights=True))
    weights = row.extras["token_weights"][0].tolist()
    after_space = [trimming.decode([token]).startswith(" ") for token in row.response_ids[0]]
    assert [weight for weight, spaced in zip(weights, after_space, strict=True) if spaced] == [0, 1]
    assert weights[0] == 0 and weights[-1] == 2


def test_a_response_that_repeats_the_prompt() -> None:
    """Finds: pieces laid where the prompt says the same."""
    tokenizer, said = make_tokenizer(CHATML), "Say Paris."
    extras = {"token_weights": (pieces_of("Say ", "Paris."), pieces_of(BAD))}
    one = unconditioned(example(prompt=said, responses=(said, BAD), extras=extras))
    weights = kept(tokenize(one, tokenizer, token_weights=True)).extras["token_weights"][0].tolist()
    assert weights[0] == 0 and weights[-1] == 1 and weights == sorted(weights)


def test_a_template_that_changes_the_response_has_no_place_for_weights() -> None:
    shouting = make_tokenizer(CHATML.replace("message['content']", "message['content'] | upper"))
    extras = {"token_weights": (pieces_of(GOOD), pieces_of(BAD))}
    found = tokenize(unconditioned(example(extras=extras)), shouting, token_weights=True)
    assert isinstance(found, Dropped) and "no place in the response" in found.reason


# --- arrays --------------------------------------------------------------------------------------


def made_up(n: int, *, seed: int = 0, k: int = 2) -> list[Tokenized]:
    """Rows of k responses, one text of the example and one of each response, leads before some of them."""
    rng = np.random.default_rng(seed)

    def some(low: int, high: int) -> np.ndarray:
        return rng.integers(1, fakes.SIZE, rng.integers(low, high)).astype(np.int32)

    return [
        Tokenized(
            some(1, 60),
            tuple(some(1, 60) for _ in range(k)),
            f"row-{at}",
            texts={"third": (some(1, 40),), "instructions": tuple(some(1, 20) for _ in range(k))},
            leads=tuple(some(0, 30) for _ in range(2 * k + 1)),
        )
        for at in range(n)
    ]


def test_slots_are_responses_and_then_texts_by_name() -> None:
    """Finds: log-probs of one text handed to an objective as another's."""
    (row,) = made_up(1)
    scored = [*row.response_ids, *row.texts["instructions"], *row.texts["third"]]
    assert [ids(found) for _, found in row.slots] == [ids(found) for found in scored]
    assert [ids(lead) for lead, _ in row.slots] == [ids(lead) for lead in row.leads]
    assert row.n_tokens == len(row.prompt_ids) + sum(map(len, scored)) + sum(map(len, row.leads))


@pytest.mark.parametrize("share_prompts", [True, False])
def test_arrays_hold_leads_unscored_and_texts_once(share_prompts: bool) -> None:
    """Against the row written out: prompt, lead, text without its last token; scored from the text on."""
    rows = made_up(24) + made_up(6, seed=1, k=3)
    plan = plan_steps(rows, batch_size=6, share_prompts=share_prompts, micro_batch_tokens=1500, max_shapes=12)
    seen = 0
    for part in (part for step in plan.steps for part in step):
        reference = [[-found.astype(np.float32) for _, found in row.slots] for row in rows]
        batch = collate(rows, part, reference, columns={"third_reference", "instructions"})
        assert batch.mask.shape == batch.place.shape == batch.reference.shape
        assert batch.extras == {}
        for b, index in enumerate(part.rows):
            row = rows[index]
            assert batch.mask.shape[1] == len(row.slots) == part.shape.responses
            for s, (lead, found) in enumerate(row.slots):
                read, scored, fed = read_back(batch, b, s)
                assert read == [*row.prompt_ids, *lead]
                assert scored == ids(found)
                assert fed == [*read, *scored[:-1]]
                assert batch.mask[b, s].sum() == len(found) and batch.mask[b, s, : len(found)].all()
                assert batch.reference[b, s, : len(found)].tolist() == [-token for token in scored]
                seen += 1
        assert int(batch.mask.sum()) <= part.shape.scored
    assert seen == sum(len(row.slots) for row in rows)
    assert plan.tokens == sum(row.n_tokens for row in rows)
    longest = max(len(row.prompt_ids) + len(lead) + len(text) - 1 for row in rows for lead, text in row.slots)
    assert max(shape.prompt + shape.rows[0] for shape in plan.shapes) == longest


def test_leads_do_not_go_through_the_head() -> None:
    """Finds: scored positions, each a row of the vocabulary, kept for tokens nobody scores."""
    long = replace(made_up(1)[0], leads=(np.ones(900, np.int32),) * 5)
    (part,) = plan_pass([long]).steps[0]
    assert part.shape.scored == ceil_scored(sum(len(found) for _, found in long.slots))


def test_log_probs_of_every_slot_are_its_own(tmp_path: Path) -> None:
    """Finds: a lead that is not read, or reference log-probs joined to another slot."""
    rows = made_up(9)
    policy = fakes.FakePolicy(fakes.table(1), fakes.table(2))
    store = ReferenceStore(tmp_path, "base")
    found, counts = reference_logps(rows, fakes.backend(), policy, store)
    for row, values in zip(rows, found, strict=True):
        for (lead, text), of_slot in zip(row.slots, values, strict=True):
            expected = fakes.by_hand(policy.reference, [*row.prompt_ids, *lead], ids(text))
            np.testing.assert_allclose(of_slot, expected, rtol=1e-6)
    again, counts = reference_logps(rows, fakes.backend(), policy, store)
    assert counts.computed == 0 and [len(x) for x in again[0]] == [len(text) for _, text in rows[0].slots]
    with pytest.raises(ValueError, match="log-probs of"):
        store.put(rows[0], again[0][:2])


def test_rows_with_and_without_a_text_do_not_share_a_micro_batch() -> None:
    first, second = made_up(2)
    other = replace(second, texts={"third": second.texts["third"], "gold": second.texts["instructions"]})
    part = PlannedPart((0, 1), Splitter([first, second], share_prompts=True, budget=8192).shape([0, 1]))
    with pytest.raises(ValueError, match="different texts"):
        collate([first, other], part)
    with pytest.raises(DataError, match="the text 'gold'"):
        collate([first, second], part, columns=["gold_reference"])


# --- what texts must leave alone -----------------------------------------------------------------


def test_rows_without_texts_are_found_where_they_were() -> None:
    """Finds: a change that makes every stored reference log-prob and every run's fingerprint a stranger.
    The sums were taken before there were further texts."""
    rows = [
        Tokenized(
            np.array([1, 2, 3], np.int32),
            (np.array([4, 5], np.int32), np.array([6], np.int32)),
            "e",
            (9.0, 2.0),
            9.0,
            "chosen",
            extras={"goal_distances": (0.0, 49.0)},
        )
    ]
    assert hashlib.sha256(b"".join(row_keys(rows[0]))).hexdigest()[:16] == "d2ffbb987378235b"
    assert fingerprint({"train": rows, "valid": []})[:16] == "8357e6b57236ae16"


def test_what_a_text_changes() -> None:
    """Finds: a run resumed on other texts, or a lead that two references share."""
    (row,) = made_up(1)
    bare = replace(row, texts={}, leads=())
    known = {fingerprint({"train": [one]}) for one in (row, bare, replace(row, leads=row.leads[::-1]))}
    renamed = replace(row, texts={"instructions": row.texts["instructions"], "gold": row.texts["third"]})
    assert len(known | {fingerprint({"train": [renamed]})}) == 4
    keys = row_keys(row)
    lead, text = row.slots[0]
    assert keys[0] == response_key(np.concatenate([row.prompt_ids, lead]), text) != row_keys(bare)[0]
    assert len(set(keys)) == 5
