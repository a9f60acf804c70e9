"""``mlxpref columns``: figures against log-probs taken one response at a time, and the way into training."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from mlxpref import backends
from mlxpref.cli import main
from mlxpref.columns import Place, Wanted
from mlxpref.columns.rows import sift
from mlxpref.config_layers import check_config
from mlxpref.data.relabelled import read_relabelled
from mlxpref.data.sources import SourceSpec, open_source, read_source
from mlxpref.errors import ConfigError, DataError
from mlxpref.objectives import TABLE
from mlxpref.prepare import prepare
from mlxpref.records import Conditioned, Message, MicroBatch, Prompt, Scored

PAIRS: list[dict[str, Any]] = [
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "I do not know that, and never did."},
    {"prompt": "Tell me a story.", "chosen": "Once upon a time there was a cat.", "rejected": "No."},
    {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "The dog said hello to the cat in the park."},
    {"prompt": "Is it so?", "chosen": "I think it is not, but who am I to say?", "rejected": "It is."},
]
SCORES = [(9.0, 4.0), (8.0, 7.0), (10.0, 9.0), (3.0, 6.0)]
"""The last pair's chosen response has the lower score: the data's order is not the preferred one."""

LISTS: list[dict[str, Any]] = [
    {"prompt": "Count.", "responses": ["One two.", "One.", "One two three.", "Nothing at all"]},
    {"prompt": "Name a pet.", "responses": ["A cat.", "A dog and a cat.", "Hm"]},
]


# --- a room that is computed by hand -------------------------------------------------------------


def seed_of(folder: str | Path) -> int:
    return zlib.crc32(Path(folder).name.encode())


def table(folder: str | Path) -> np.ndarray:
    return fakes.table(seed_of(folder))


def embedding(folder: str | Path) -> np.ndarray:
    """(SIZE, 3): the hidden state of each state of the fake policy."""
    return np.random.default_rng(seed_of(folder)).normal(size=(fakes.SIZE, 3))


@dataclass
class Named(fakes.FakePolicy):
    """A policy that knows what it was loaded from."""

    name: str = ""


def hidden_sums(policy: Named, batch: MicroBatch, *, reference: bool = False) -> np.ndarray:
    shared = batch.prompts.sum(-1)
    states = [shared[shelf.prompt][:, None] + shelf.inputs.cumsum(-1) for shelf in batch.shelves]
    before = np.concatenate([state.ravel() for state in states])[batch.scored] % fakes.SIZE
    rows = np.concatenate([embedding(policy.name)[before], np.zeros((1, 3))])
    return rows[batch.place].sum(2).astype(np.float32)


def greedy(ids: Sequence[int]) -> str:
    return f"The answer is {sum(ids)}."


class Room:
    """Loads fakes and remembers what it loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.policies: list[Named] = []
        self.answer: Callable[[Sequence[int]], str] = greedy
        self.broken = False

    def policy(self, name: str, base: str) -> Named:
        self.loaded.append(Path(name).name)
        one = Named(table(name), table(base), fingerprint=Path(base).name, path=base, name=name)
        if self.broken:
            one.policy = one.policy * np.nan
        self.policies.append(one)
        return one

    def load_policy(self, path: str, *, trainable: bool, **_: Any) -> Named:
        assert not trainable
        return self.policy(path, path)

    def load_adapter(self, path: str, *, model_path: str | None = None, dtype: str | None = None) -> Named:
        return self.policy(path, model_path or json.loads((Path(path) / "adapter_config.json").read_text())["model"])

    def generate(self, policy: Any, prompts: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [self.answer(ids) for ids in prompts]

    @property
    def asked(self) -> int:
        """References that were computed."""
        return sum(n for policy in self.policies for reference, n in policy.asked if reference)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    own = Room()
    names = ("load_policy", "load_adapter", "generate")
    module = fakes.backend(hidden_sums=hidden_sums, **{name: getattr(own, name) for name in names})
    monkeypatch.setattr(backends, "get", lambda name="auto": module)
    return own


def make_adapter(folder: Path, base: Path | str | None, **facts: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"fine_tune_type": "lora", "num_layers": 1, "model": None if base is None else str(base)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "mlxpref": facts}))
    save_file({"some.lora_a": np.zeros((2, 2), np.float32)}, folder / "adapters.safetensors")
    return folder


@pytest.fixture
def adapters(tmp_path: Path, tiny_model_dir: Path) -> list[Path]:
    return [make_adapter(tmp_path / name, tiny_model_dir) for name in ("one", "two")]


# --- data and commands ---------------------------------------------------------------------------


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return file


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    scored = [
        {**row, "score_chosen": high, "score_rejected": low, "id": f"p{i}"}
        for i, (row, (high, low)) in enumerate(zip(PAIRS, SCORES, strict=True))
    ]
    return write(tmp_path / "pairs.jsonl", scored)


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    return write(tmp_path / "lists.jsonl", LISTS)


@pytest.fixture
def relabelled(pairs: Path, tmp_path: Path) -> Path:
    ran = call("relabel", pairs, "--out", tmp_path / "relabelled", "--score-range", 1, 10, "--valid-fraction", 0.25)
    assert ran.exit_code == 0, ran.output
    return tmp_path / "relabelled"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def columns(*arguments: object) -> Result:
    ran = call("columns", *arguments, "--no-store")
    assert ran.exit_code == 0, ran.output
    return ran


def rows_of(folder: Path) -> list[Conditioned]:
    found = read_relabelled(folder)
    return [row for split in found.splits for row in found.read(split)]


def examples_of(folder: Path) -> list[Scored]:
    return read_source([open_source(SourceSpec(str(folder)))])[0]


# --- by hand -------------------------------------------------------------------------------------


def ids_of(tokenizer: Any, prompt: Prompt, response: str) -> tuple[list[int], list[int]]:
    """Prompt and response as ChatML spells them."""
    text = "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in prompt)
    spelled = f"{text}<|im_start|>assistant\n", response + "<|im_end|>"
    prompt_ids, response_ids = (tokenizer.encode(one, add_special_tokens=False) for one in spelled)
    return prompt_ids, response_ids


class Hand:
    """Log-probs of a response, one at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def tokens(self, of: Path, prompt: Prompt, response: str) -> list[float]:
        return fakes.by_hand(table(of), *ids_of(self.tokenizer, prompt, response))

    def sums(self, of: Path, row: Conditioned | Scored) -> np.ndarray:
        return np.array([sum(self.tokens(of, row.prompt, response)) for response in row.responses])

    def means(self, of: Path, row: Conditioned | Scored) -> np.ndarray:
        return np.array([np.mean(self.tokens(of, row.prompt, response)) for response in row.responses])

    def hidden(self, of: Path, row: Conditioned | Scored) -> tuple[np.ndarray, np.ndarray]:
        """(K, 3) sums, (K,) tokens."""
        sums, lengths = [], []
        for response in row.responses:
            prompt, ids = ids_of(self.tokenizer, row.prompt, response)
            whole = [*prompt, *ids]
            states = [sum(whole[:t]) % fakes.SIZE for t in range(len(prompt), len(whole))]
            sums.append(embedding(of)[states].sum(0))
            lengths.append(len(ids))
        return np.array(sums), np.array(lengths)


@pytest.fixture
def hand(chat_tokenizer: Any) -> Hand:
    return Hand(chat_tokenizer)


# --- values --------------------------------------------------------------------------------------


def test_previous_is_the_adapters_log_prob_in_the_order_of_each_half(
    relabelled: Path, adapters: list[Path], room: Room, hand: Hand, tmp_path: Path
) -> None:
    """Finds: sums of the base, means instead of sums, prompts without their goal, values of the other half's order."""
    columns(relabelled, "--add", "previous", "--adapter-path", adapters[0], "--out", tmp_path / "out")
    before, after = rows_of(relabelled), rows_of(tmp_path / "out")
    assert [(row.prompt, row.responses) for row in before] == [(row.prompt, row.responses) for row in after]
    assert {row.half for row in after} == {"chosen", "rejected"} and len(after) == 8
    for row in after:
        assert row.goal_text is not None
        np.testing.assert_allclose(row.extras["previous"], hand.sums(adapters[0], row), rtol=1e-5)
    assert room.loaded == ["one"]


def test_the_first_round_has_the_base_as_its_previous_iterate(
    relabelled: Path, tiny_model_dir: Path, room: Room, hand: Hand, tmp_path: Path
) -> None:
    columns(relabelled, "--add", "previous", "--model", tiny_model_dir, "--out", tmp_path / "out")
    for row in rows_of(tmp_path / "out"):
        np.testing.assert_allclose(row.extras["previous"], hand.sums(tiny_model_dir, row), rtol=1e-5)


def test_aligned_logps_are_means_by_each_models_own_tokens(
    pairs: Path, make_model_dir: Any, plain_tokenizer: Any, room: Room, hand: Hand, tmp_path: Path
) -> None:
    """Finds: one tokenizer for both models, a mean of sums, a mean over all tokens of both models."""
    chat, plain = make_model_dir(), make_model_dir(tokenizer=plain_tokenizer)
    columns(pairs, "--add", "aligned_logps", "--model", chat, "--model", plain, "--out", tmp_path / "out")
    for row in examples_of(tmp_path / "out"):
        expected = []
        for response in row.responses:
            ids = [
                plain_tokenizer.encode(text, add_special_tokens=False)
                for text in (row.prompt[0].content + "\n\n", response + "<eos>")
            ]
            other = np.mean(fakes.by_hand(table(plain), *ids))
            expected.append((np.mean(hand.tokens(chat, row.prompt, response)) + other) / 2)
        np.testing.assert_allclose(row.extras["aligned_logps"], expected, rtol=1e-5)


def test_aligned_logps_of_adapters(
    relabelled: Path, adapters: list[Path], room: Room, hand: Hand, tmp_path: Path
) -> None:
    paths = [word for path in adapters for word in ("--adapter-path", path)]
    columns(relabelled, "--add", "aligned_logps", *paths, "--out", tmp_path / "out")
    for row in rows_of(tmp_path / "out"):
        expected = (hand.means(adapters[0], row) + hand.means(adapters[1], row)) / 2
        np.testing.assert_allclose(row.extras["aligned_logps"], expected, rtol=1e-5)


def test_margin_rewards_are_a_number_for_each_adapter(
    relabelled: Path, adapters: list[Path], tiny_model_dir: Path, room: Room, hand: Hand, tmp_path: Path
) -> None:
    """Finds: β left out, the sign turned, responses and adapters transposed."""
    first, second = adapters
    add = (relabelled, "--add", "margin_rewards", "--beta", 0.5)
    columns(*add, "--adapter-path", first, "--out", tmp_path / "a")
    columns(*add, "--adapter-path", first, "--adapter-path", second, "--out", tmp_path / "b")
    for one, both in zip(rows_of(tmp_path / "a"), rows_of(tmp_path / "b"), strict=True):
        base = hand.sums(tiny_model_dir, one)
        rewards = [0.5 * (hand.sums(path, one) - base) for path in adapters]
        np.testing.assert_allclose(one.extras["margin_rewards"], rewards[0], rtol=1e-4)
        np.testing.assert_allclose(both.extras["margin_rewards"], np.transpose(rewards), rtol=1e-4)


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_implicit_rewards_become_the_scores_that_relabel_reads(
    pairs: Path, adapters: list[Path], tiny_model_dir: Path, room: Room, hand: Hand, tmp_path: Path, file_format: str
) -> None:
    """Finds: values in the order of the scores and not of the data, a penalty in tokens, a name nobody reads."""
    add = ("--add", "implicit_reward", "--adapter-path", adapters[0], "--length-penalty", 0.25)
    columns(pairs, *add, "--file-format", file_format, "--out", tmp_path / "out")
    found = examples_of(tmp_path / "out")
    assert [row.responses for row in found] == [(row["chosen"], row["rejected"]) for row in PAIRS]
    assert [(row.example_id, row.scores) for row in found] == [(f"p{i}", pair) for i, pair in enumerate(SCORES)]
    for row in found:
        gap = 0.1 * (hand.sums(adapters[0], row) - hand.sums(tiny_model_dir, row))
        expected = gap - 0.25 * np.array([len(text) for text in row.responses])
        np.testing.assert_allclose(row.attributes["implicit_reward"], expected, rtol=1e-4)
    goals = ("--score", "implicit_reward", "--mapping", "quantile")
    ran = call("relabel", tmp_path / "out", *goals, "--out", tmp_path / "goals")
    assert ran.exit_code == 0, ran.output
    halves = {row.example_id: row for row in rows_of(tmp_path / "goals") if row.half == "chosen"}
    for row in found:
        best = int(np.argmax(row.attributes["implicit_reward"]))
        assert halves[row.example_id].responses[0] == row.responses[best]


def test_implicit_rewards_against_the_previous_adapter(
    pairs: Path, adapters: list[Path], room: Room, hand: Hand, tmp_path: Path
) -> None:
    words = ("--adapter-path", adapters[0], "--previous-adapter", adapters[1], "--beta", 1)
    columns(pairs, "--add", "implicit_reward", *words, "--out", tmp_path / "out")
    for row in examples_of(tmp_path / "out"):
        expected = hand.sums(adapters[0], row) - hand.sums(adapters[1], row)
        np.testing.assert_allclose(row.attributes["implicit_reward"], expected, rtol=1e-4)


def test_a_density_ratio_is_a_mean_without_the_end_token(
    lists: Path, make_model_dir: Any, room: Room, hand: Hand, tmp_path: Path
) -> None:
    """Finds: an end token that is summed or counted, strong and weak exchanged."""
    strong, weak = make_model_dir(), make_model_dir()
    columns(lists, "--add", "density_ratio", "--strong", strong, "--weak", weak, "--out", tmp_path / "out")
    found = examples_of(tmp_path / "out")
    assert [len(row.responses) for row in found] == [4, 3]
    for row in found:
        expected = []
        for response in row.responses:
            better, worse = (hand.tokens(of, row.prompt, response)[:-1] for of in (strong, weak))
            expected.append((sum(better) - sum(worse)) / len(better))
        np.testing.assert_allclose(row.attributes["density_ratio"], expected, rtol=1e-4)


def test_siblings_of_other_tokenizers_are_refused_before_they_load(
    lists: Path, make_model_dir: Any, plain_tokenizer: Any, room: Room, tmp_path: Path
) -> None:
    words = ("--strong", make_model_dir(), "--weak", make_model_dir(tokenizer=plain_tokenizer))
    ran = call("columns", lists, "--add", "density_ratio", *words, "--out", tmp_path / "out")
    assert ran.exit_code == 2 and "different tokenizers" in ran.stderr
    assert not room.loaded and not (tmp_path / "out").exists()


def test_third_answers_the_prompt_with_its_goal(
    relabelled: Path, tiny_model_dir: Path, room: Room, hand: Hand, tmp_path: Path
) -> None:
    """Finds: answers to another row's prompt (they are asked sorted by length), goals left out."""
    columns(relabelled, "--add", "third", "--model", tiny_model_dir, "--out", tmp_path / "out")
    for row in rows_of(tmp_path / "out"):
        assert row.extras["third"] == greedy(ids_of(hand.tokenizer, row.prompt, "")[0])


def test_a_silent_model_costs_the_row_and_is_counted(
    relabelled: Path, tiny_model_dir: Path, room: Room, hand: Hand, tmp_path: Path
) -> None:
    silent = next(row for row in rows_of(relabelled) if row.example_id == "p1" and row.half == "chosen")
    at = tuple(ids_of(hand.tokenizer, silent.prompt, "")[0])
    room.answer = lambda ids: " \n" if tuple(ids) == at else greedy(ids)
    ran = columns(relabelled, "--add", "third", "--model", tiny_model_dir, "--out", tmp_path / "out")
    assert "dropped 1: third: the model answered with nothing (" in ran.stderr
    left = rows_of(tmp_path / "out")
    assert len(left) == 7 and (silent.prompt not in [row.prompt for row in left])


def test_confidence_compares_the_orders_of_two_adapters(
    adapters: list[Path], tiny_model_dir: Path, room: Room, hand: Hand, tmp_path: Path
) -> None:
    """Finds: a τ that is not brought to 0…1, ranks by log-prob (which rank the short response first)."""
    asked = [{**row, "prompt": f"{row['prompt']} {i}"} for i in range(6) for row in LISTS]
    lists = write(tmp_path / "many.jsonl", asked)
    words = ("--adapter-path", adapters[0], "--previous-adapter", adapters[1])
    columns(lists, "--add", "confidence", *words, "--out", tmp_path / "out")
    by_log_prob = []
    for row in examples_of(tmp_path / "out"):
        own, base = [hand.sums(path, row) for path in adapters], hand.sums(tiny_model_dir, row)
        assert row.extras["confidence"] == pytest.approx(alike(own[0] - base, own[1] - base))
        by_log_prob.append(alike(*own) == row.extras["confidence"])
    assert not all(by_log_prob)


def alike(now: np.ndarray, then: np.ndarray) -> float:
    """Share of the pairs that both order the same way."""
    same = [(now[i] < now[j]) == (then[i] < then[j]) for i in range(len(now)) for j in range(i)]
    return sum(same) / len(same)


@pytest.mark.parametrize("normalised", [False, True])
def test_ches_takes_the_response_with_the_higher_score_for_the_chosen_one(
    pairs: Path, tiny_model_dir: Path, room: Room, hand: Hand, tmp_path: Path, normalised: bool
) -> None:
    """Finds: the data's order taken for the preference, sums over the wrong tokens; relabel cannot find it."""
    more = ("--normalised",) if normalised else ()
    columns(pairs, "--add", "ches", "--model", tiny_model_dir, *more, "--out", tmp_path / "out")
    found = examples_of(tmp_path / "out")
    values = []
    for row in found:
        sums, lengths = hand.hidden(tiny_model_dir, row)
        sums = sums / lengths[:, None] if normalised else sums
        w, other = (0, 1) if row.scores is None or row.scores[0] > row.scores[1] else (1, 0)
        values.append(float(sums[w] @ sums[other] - sums[w] @ sums[w]))
        np.testing.assert_allclose(row.attributes["ches"], [values[-1]] * 2, rtol=1e-4)
    ran = call("relabel", tmp_path / "out", "--drop-top", "ches:0.25", "--out", tmp_path / "goals")
    assert ran.exit_code == 0, ran.output
    gone = found[int(np.argmax(values))].example_id
    assert {row.example_id for row in rows_of(tmp_path / "goals")} == {"p0", "p1", "p2", "p3"} - {gone}


def test_ches_of_a_list_is_its_worst_pair(
    lists: Path, tiny_model_dir: Path, room: Room, hand: Hand, tmp_path: Path
) -> None:
    columns(lists, "--add", "ches", "--model", tiny_model_dir, "--out", tmp_path / "out")
    for row in examples_of(tmp_path / "out"):
        sums, _ = hand.hidden(tiny_model_dir, row)
        expected = max(float(sums[0] @ other - sums[0] @ sums[0]) for other in sums[1:])
        assert row.attributes["ches"][0] == pytest.approx(expected, rel=1e-4)


# --- into training -------------------------------------------------------------------------------

NEEDED = {
    "inpo": ("previous", ("--adapter-path", "one")),
    "poft": ("aligned_logps", ("--adapter-path", "one", "--adapter-path", "two")),
    "modpo": ("margin_rewards", ("--adapter-path", "one", "--adapter-path", "two")),
    "selm": ("third", ("--adapter-path", "one")),
    "cream": ("confidence", ("--adapter-path", "one", "--previous-adapter", "two")),
}


@pytest.mark.parametrize("kind", ["relabelled", "pairs"])
@pytest.mark.parametrize("objective", NEEDED)
def test_objectives_find_what_was_added(
    objective: str, kind: str, relabelled: Path, pairs: Path, adapters: list[Path], tiny_model_dir: Path, room: Room,
    hand: Hand, tmp_path: Path,
) -> None:  # fmt: skip
    """Finds: a name, a shape or an order that prepare() does not read as it was written."""
    column, words = NEEDED[objective]
    paths = [tmp_path / word if word in ("one", "two") else word for word in words]
    source = relabelled if kind == "relabelled" else pairs
    columns(source, "--add", column, *paths, "--out", tmp_path / "out")
    config = check_config({"model": {"path": str(tiny_model_dir)}, "data": {"source": str(tmp_path / "out")}})
    rows = prepare(config, needs=TABLE[objective].needs).train
    assert len(rows) == (6 if kind == "relabelled" else 4)
    for row in rows:
        if column == "third":
            assert row.texts["third"][0][-1] == hand.tokenizer.eos_token_id
            continue
        value = np.array(row.extras[column])
        assert value.shape == {"confidence": (), "margin_rewards": (2, 2)}.get(column, (2,))
        if column == "previous":
            prompt = row.prompt_ids.tolist()
            sums = [np.sum(fakes.by_hand(table("one"), prompt, ids.tolist())) for ids in row.response_ids]
            np.testing.assert_allclose(value, sums, rtol=1e-5)


@pytest.mark.parametrize("kind", ["relabelled", "pairs"])
def test_columns_of_other_tokens_are_refused(
    kind: str, relabelled: Path, pairs: Path, adapters: list[Path], tiny_model_dir: Path, room: Room, tmp_path: Path
) -> None:  # fmt: skip
    """Finds sums of log-probs over whole responses beside those of cut ones, or without the goal."""
    source = relabelled if kind == "relabelled" else pairs
    columns(source, "--add", "previous", "--adapter-path", adapters[0], "--out", tmp_path / "out")
    base = {"model": {"path": str(tiny_model_dir)}, "data": {"source": str(tmp_path / "out")}}
    needs = TABLE["inpo"].needs
    shorter = check_config({**base, "tokenization": {"max_length": 300}})
    with pytest.raises(ConfigError, match="previous: max_length 1024, here 300"):
        prepare(shorter, needs=needs)
    assert prepare(shorter, needs=TABLE["dpo"].needs).train  # which reads no such column
    if kind == "pairs":
        with pytest.raises(ConfigError, match="previous: of prompts without goals; relabel first"):
            prepare(check_config({**base, "relabel": {}}), needs=needs)


class TestTokensOfColumns:
    """Log-probs of other tokens than a run reads are refused, and only those."""

    @pytest.fixture
    def add(self, adapters: list[Path], room: Room, tmp_path: Path) -> Callable[..., Path]:
        def write(source: Path, name: str, *words: object, column: str = "previous") -> Path:
            columns(source, "--add", column, "--adapter-path", adapters[0], *words, "--out", tmp_path / name)
            return tmp_path / name

        return write

    @pytest.fixture
    def ready(self, tiny_model_dir: Path) -> Callable[..., None]:
        def read(source: Path, relabel: Any = None, valid: Path | None = None, **tokenization: Any) -> None:
            data = {"source": str(source)} | ({} if valid is None else {"valid": str(valid)})
            base = {"model": {"path": str(tiny_model_dir)}, "data": data, "tokenization": tokenization}
            prepare(check_config({**base, **({} if relabel is None else {"relabel": relabel})}), needs=("previous",))

        return read

    @pytest.mark.parametrize("goals", [True, False])
    def test_what_is_computed_again_is_as_it_was_computed_last(
        self, goals: bool, pairs: Path, relabelled: Path, add: Callable[..., Path], ready: Callable[..., None]
    ) -> None:
        first = add(relabelled if goals else pairs, "first")
        again = add(first, "again", "--max-length", 256)
        ready(again, max_length=256)
        with pytest.raises(ConfigError, match="previous: max_length 256, here 1024"):
            ready(again)

    @pytest.mark.parametrize("goals", [True, False])
    def test_what_is_added_later_hides_nothing(
        self, goals: bool, pairs: Path, relabelled: Path, add: Callable[..., Path], ready: Callable[..., None]
    ) -> None:
        first = add(relabelled if goals else pairs, "first", "--max-length", 256)
        with pytest.raises(ConfigError, match="previous: max_length 256, here 1024"):
            ready(add(first, "more", column="third"))

    def test_goals_that_are_written_afterwards_make_other_prompts(
        self, pairs: Path, add: Callable[..., Path], ready: Callable[..., None], tmp_path: Path
    ) -> None:
        plain = add(pairs, "plain")
        ready(plain)
        ran = call("relabel", plain, "--out", tmp_path / "goals", "--score-range", 1, 10)
        assert ran.exit_code == 0, ran.output
        for source, section in ((tmp_path / "goals", None), (plain, {"score_range": [1, 10]})):
            with pytest.raises(ConfigError, match="previous: of prompts without goals; relabel first"):
                ready(source, section)
        ready(add(tmp_path / "goals", "right"))

    @pytest.mark.parametrize("goals", [True, False])
    def test_validation_rows_are_looked_at_too(
        self, goals: bool, pairs: Path, relabelled: Path, add: Callable[..., Path], ready: Callable[..., None]
    ) -> None:
        source = relabelled if goals else pairs
        with pytest.raises(ConfigError, match="previous: max_length 256, here 1024"):
            ready(add(source, "long"), valid=add(source, "short", "--max-length", 256))

    def test_a_file_of_the_folder_is_the_folders(
        self, pairs: Path, add: Callable[..., Path], ready: Callable[..., None]
    ) -> None:
        with pytest.raises(ConfigError, match="previous: max_length 256, here 1024"):
            ready(add(pairs, "short", "--max-length", 256) / "train.jsonl")

    def test_the_same_limits_said_otherwise_are_the_same(
        self, relabelled: Path, add: Callable[..., Path], ready: Callable[..., None]
    ) -> None:
        """Half of max_length is the default; rows that ``drop`` leaves are whole, as ``cut`` leaves them."""
        made = add(relabelled, "made", "--max-length", 256)
        ready(made, max_length=256, max_prompt_length=128, truncation="drop")
        with pytest.raises(ConfigError, match="previous: max_prompt_length 128, here 64"):
            ready(made, max_length=256, max_prompt_length=64)


def test_recipe_options_counts_and_splits_are_kept(
    relabelled: Path, adapters: list[Path], room: Room, tmp_path: Path
) -> None:
    before = read_relabelled(relabelled)
    words = ("--add", "previous", "--add", "margin_rewards", "--adapter-path", adapters[0])
    columns(relabelled, *words, "--out", tmp_path / "out")
    after = read_relabelled(tmp_path / "out")
    assert after.recipe == before.recipe and after.rows == before.rows
    assert {key: after.options[key] for key in before.options} == before.options
    assert after.counts.items() >= before.counts.items()
    (made,) = after.options["columns"]
    assert made["add"] == ["previous", "margin_rewards"] and made["tokenization"]["max_length"] == 1024
    columns(tmp_path / "out", "--add", "third", "--adapter-path", adapters[0], "--out", tmp_path / "more")
    again = read_relabelled(tmp_path / "more")
    assert [one["add"][0] for one in again.options["columns"]] == ["previous", "third"]
    assert [row.extras["previous"] for row in rows_of(tmp_path / "more")] == [
        row.extras["previous"] for row in rows_of(tmp_path / "out")
    ]


def test_parquet_stays_parquet(pairs: Path, adapters: list[Path], room: Room, hand: Hand, tmp_path: Path) -> None:
    call("relabel", pairs, "--out", tmp_path / "in", "--file-format", "parquet")
    words = [word for path in adapters for word in ("--adapter-path", path)]
    columns(tmp_path / "in", "--add", "margin_rewards", "--add", "aligned_logps", *words, "--out", tmp_path / "out")
    assert (tmp_path / "out/train.parquet").is_file()
    for row in rows_of(tmp_path / "out"):
        assert np.shape(row.extras["margin_rewards"]) == (2, 2)
        expected = (hand.means(adapters[0], row) + hand.means(adapters[1], row)) / 2
        np.testing.assert_allclose(row.extras["aligned_logps"], expected, rtol=1e-5)


TOOLS = [{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["pairs", "lists", "rated", "hyphened", "joint"])
def test_data_come_back_as_they_were(
    kind: str, file_format: str, adapters: list[Path], room: Room, tmp_path: Path
) -> None:
    """Finds: anything of a source that does not survive being written in a form of ours."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Human: hi"}]
    given: dict[str, list[dict[str, Any]]] = {
        "pairs": [
            {**PAIRS[0], "prompt": turns, "score_chosen": 4, "score_rejected": 2, "honesty_chosen": 1,
             "honesty_rejected": 5, "confidence": 0.25, "group": "a", "tools": TOOLS, "rationale": "Because.",
             "win_rates": [0.75, 0.25]},
            {**PAIRS[1], "score_chosen": 1, "score_rejected": 2, "honesty_chosen": 2, "honesty_rejected": 3,
             "confidence": 0.5, "group": "b"},
        ],
        "lists": [
            {"prompt": turns, "responses": [
                {"text": "a", "score": 1, "honesty": 3, "win_rates": 0.25},
                {"text": "b", "score": 2, "honesty": 1, "win_rates": 0.5},
                {"text": "c", "score": 0, "honesty": 2, "win_rates": 0.75}]},
            {"prompt": "Hi.", "responses": [{"text": "a", "score": 1, "honesty": 2, "win_rates": 0.0},
                                            {"text": "b", "score": 5, "honesty": 3, "win_rates": 1.0}]},
        ],
        "rated": [{"prompt": "Hi.", "responses": [{"text": "a", "attributes": {"rating": 1}},
                                                  {"text": "b", "attributes": {"rating": 3}}]}],
        "hyphened": [{"prompt": "Hi.", "responses": [{"text": "a", "attributes": {"its-own": 1}},
                                                     {"text": "b", "attributes": {"its-own": 3}}]}],
        "joint": [{"i_chosen": "Why?", "r_chosen": "So.", "i_rejected": "How?", "r_rejected": "Thus.",
                   "score_chosen": 3, "score_rejected": 1}],
    }  # fmt: skip
    before = read_source([open_source(SourceSpec(str(write(tmp_path / "in.jsonl", given[kind]))))])[0]
    words = ("--add", "previous", "--adapter-path", adapters[0], "--file-format", file_format)
    columns(tmp_path / "in.jsonl", *words, "--out", tmp_path / "out")
    after = examples_of(tmp_path / "out")
    for one, other in zip(before, after, strict=True):
        extras = {name: value for name, value in other.extras.items() if name != "previous"}
        assert (other.prompt, other.responses, other.scores, other.example_id) == (
            one.prompt, one.responses, one.scores, one.example_id,
        )  # fmt: skip
        assert (other.attributes, extras) == (one.attributes, one.extras)
        assert len(other.extras["previous"]) == len(one.responses)


def test_every_split_of_data_is_written(adapters: list[Path], room: Room, tmp_path: Path) -> None:
    write(tmp_path / "in/train.jsonl", PAIRS[:2])
    write(tmp_path / "in/validation.jsonl", PAIRS[2:])
    words = ("--add", "previous", "--adapter-path", adapters[0])
    ran = columns(tmp_path / "in", *words, "--out", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["columns.json", "train.jsonl", "valid.jsonl"]
    assert "of prompts without goals" in ran.stderr
    columns(tmp_path / "in", *words, "--split", "valid", "--limit", 1, "--out", tmp_path / "few")
    assert json.loads((tmp_path / "few/columns.json").read_text())["splits"] == {"valid": 1}


# --- repeating, dropping, storing ----------------------------------------------------------------


def test_the_same_call_writes_the_same_bytes(
    relabelled: Path, adapters: list[Path], room: Room, tmp_path: Path
) -> None:
    words = ("--add", "previous", "--add", "margin_rewards", "--add", "third", "--adapter-path", adapters[0])
    for name in ("a", "b"):
        columns(relabelled, *words, "--out", tmp_path / name)
    for file in ("train.jsonl", "valid.jsonl", "recipe.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert room.loaded == ["one", "one"], "an adapter is loaded once a call"


def test_rows_that_do_not_fit_are_dropped_and_counted(
    pairs: Path, adapters: list[Path], room: Room, hand: Hand, tmp_path: Path
) -> None:
    """Finds: values that slide to the next row where one is dropped."""
    words = ("--add", "previous", "--adapter-path", adapters[0], "--truncation", "drop", "--max-length", 40)
    ran = columns(pairs, *words, "--out", tmp_path / "out")
    found = examples_of(tmp_path / "out")
    assert "longer than max_length" in ran.stderr and 0 < len(found) < 4
    for row in found:
        np.testing.assert_allclose(row.extras["previous"], hand.sums(adapters[0], row), rtol=1e-5)
    ran = call("columns", pairs, *words, "--strict", "--out", tmp_path / "strict")
    assert ran.exit_code == 1 and "strict" in ran.stderr and not (tmp_path / "strict").exists()


def test_a_split_without_rows_is_an_error_before_a_model_loads(
    pairs: Path, adapters: list[Path], room: Room, tmp_path: Path
) -> None:
    words = ("--add", "previous", "--adapter-path", adapters[0], "--truncation", "drop", "--max-length", 8)
    ran = call("columns", pairs, *words, "--out", tmp_path / "out")
    assert ran.exit_code == 1 and "no row is left" in ran.stderr and "longer than max_length" in ran.stderr
    assert not room.loaded


def test_log_probs_of_the_base_come_from_the_store(
    relabelled: Path, adapters: list[Path], tiny_model_dir: Path, room: Room, tmp_path: Path
) -> None:
    store = ("--store", tmp_path / "store")
    add = ("columns", relabelled, "--add", "margin_rewards", "--adapter-path", adapters[0], *store)
    for name in ("a", "b"):
        assert call(*add, "--out", tmp_path / name).exit_code == 0
    assert room.asked == 8, "computed by the first call alone"
    aligned = ("--add", "aligned_logps", "--model", tiny_model_dir, *store)
    assert call("columns", relabelled, *aligned, "--out", tmp_path / "c").exit_code == 0
    assert room.asked == 8 and (tmp_path / "a/train.jsonl").read_bytes() == (tmp_path / "b/train.jsonl").read_bytes()


def test_a_column_that_was_there_is_replaced_and_said(
    relabelled: Path, adapters: list[Path], room: Room, hand: Hand, tmp_path: Path
) -> None:
    columns(relabelled, "--add", "previous", "--adapter-path", adapters[0], "--out", tmp_path / "a")
    ran = columns(tmp_path / "a", "--add", "previous", "--adapter-path", adapters[1], "--out", tmp_path / "b")
    assert "the data had a column previous; it is replaced" in ran.stderr
    row = rows_of(tmp_path / "b")[0]
    np.testing.assert_allclose(row.extras["previous"], hand.sums(adapters[1], row), rtol=1e-5)


def test_an_adapter_trained_against_another_is_said(
    relabelled: Path, tiny_model_dir: Path, room: Room, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "third", tiny_model_dir, init_from="second")
    words = ("--add", "margin_rewards", "--adapter-path", adapter)
    ran = columns(relabelled, *words, "--out", tmp_path / "out")
    assert "was trained against adapter second" in ran.stderr


# --- refusals ------------------------------------------------------------------------------------

A, B, M = ("--adapter-path", "one"), ("--adapter-path", "two"), ("--model", "MODEL")
REFUSED = {
    "nothing": ((), "nothing to add"),
    "unknown": (("--add", "previus", *A), "did you mean previous?"),
    "no adapter": (("--add", "confidence", *M), "give --adapter-path once"),
    "no policy": (("--add", "previous"), "previous comes from one policy"),
    "two adapters": (("--add", "previous", *A, *B), "previous comes from one policy"),
    "no reward": (("--add", "margin_rewards", *M), "once for each reward"),
    "no model": (("--add", "aligned_logps"), "give --model or --adapter-path"),
    "no third": (("--add", "third", *M, *M), "comes from one policy"),
    "no previous": (("--add", "confidence", *A), "give --previous-adapter"),
    "no weak": (("--add", "density_ratio", "--strong", "MODEL"), "give --strong and --weak"),
    "idle": (("--add", "previous", *A, "--beta", 0.2), "--beta acts on"),
    "idle flag": (("--add", "previous", *A, "--normalised"), "--normalised acts on ches"),
    "beta": (("--add", "margin_rewards", *A, "--beta", 0), "--beta 0: a number above 0"),
    "tokens": (("--add", "third", *M, "--max-tokens", 0), "--max-tokens 0"),
    "bases": (("--add", "margin_rewards", *A, *M, *M), "give it once"),
    "revision": (("--add", "previous", *A, "--model-revision", "x"), "--model-revision is for one --model"),
    "missing": (("--add", "previous", "--adapter-path", "nowhere"), "is this an adapter folder?"),
    "missing model": (("--add", "third", "--model", "./nowhere"), "no such folder"),
    "score": (("--add", "implicit_reward", *A), "give the data it was made from"),
    "own input": (("--add", "previous", *A, "--out", "relabelled"), "is, or lies in, what is read"),
    "within": (("--add", "previous", *A, "--out", "relabelled/more"), "is, or lies in, what is read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_loaded_or_written(
    case: str, relabelled: Path, adapters: list[Path], tiny_model_dir: Path, room: Room, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words, says = REFUSED[case]
    given = [str(tiny_model_dir) if word == "MODEL" else word for word in words]
    out = () if "--out" in given else ("--out", "out")
    before = sorted(tmp_path.rglob("*"))
    ran = call("columns", "relabelled", *given, *out)
    assert ran.exit_code == 2 and says in " ".join(ran.stderr.split()), ran.output
    assert not room.loaded and sorted(tmp_path.rglob("*")) == before


def test_an_occupied_folder_is_refused_as_relabel_and_merge_refuse_it(
    pairs: Path, relabelled: Path, adapters: list[Path], room: Room
) -> None:
    """A script has one exit code to look at; nothing is loaded first, and what is there stays."""
    before = {file: file.read_bytes() for file in adapters[1].iterdir()}
    out = ("--out", adapters[1])
    ran = call("columns", relabelled, "--add", "previous", "--adapter-path", adapters[0], *out)
    assert "nothing is overwritten" in " ".join(ran.stderr.split()) and not room.loaded
    others = call("relabel", pairs, *out), call("merge", f"{adapters[0]}=1", *out)
    assert {one.exit_code for one in (ran, *others)} == {1}
    assert {file: file.read_bytes() for file in adapters[1].iterdir()} == before


def test_problems_are_told_together(relabelled: Path, room: Room, tmp_path: Path) -> None:
    words = ("--add", "implicit_reward", "--beta", -1, "--normalised", "--out", relabelled)
    said = call("columns", relabelled, *words).stderr
    for part in ("--adapter-path once", "--beta -1", "--normalised acts", "is, or lies in", "made from"):
        assert part in said


def test_an_adapter_of_another_model_is_refused(
    relabelled: Path, tiny_model_dir: Path, room: Room, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "other", tiny_model_dir)
    wrong = {"model.layers.0.self_attn.q_proj.lora_a": np.zeros((999, 2), np.float32)}
    save_file(wrong | {"model.layers.0.self_attn.q_proj.lora_b": np.zeros((2, 32), np.float32)},
              adapter / "adapters.safetensors")  # fmt: skip
    ran = call("columns", relabelled, "--add", "previous", "--adapter-path", adapter, "--out", tmp_path / "out")
    assert ran.exit_code == 2 and "made for another model" in ran.stderr and not room.loaded


def test_an_adapter_without_a_base_asks_for_one(
    relabelled: Path, tiny_model_dir: Path, room: Room, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "lost", None)
    words = (relabelled, "--add", "previous", "--adapter-path", adapter, "--out", tmp_path / "out")
    ran = call("columns", *words)
    assert ran.exit_code == 2 and "give one with --model" in ran.stderr
    columns(*words, "--model", tiny_model_dir)


def test_nothing_is_left_of_a_call_that_fails(
    relabelled: Path, adapters: list[Path], room: Room, tmp_path: Path
) -> None:
    room.broken = True
    before = sorted(tmp_path.rglob("*"))
    ran = call("columns", relabelled, "--add", "previous", "--adapter-path", adapters[0], "--out", tmp_path / "out")
    assert ran.exit_code == 1 and "not finite" in ran.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_policy_is_loaded_once_for_all_that_it_says() -> None:
    """Finds: a model that is loaded for each of its columns."""
    wanted = Wanted(("previous", "margin_rewards", "confidence", "third"), adapters=("a",), previous_adapter="b")
    assert not list(wanted.problems())
    a, b = Place(adapter="a"), Place(adapter="b")
    assert wanted.measures() == {a: {"own", "base", "third"}, b: {"own"}}


def test_a_strict_sift_says_which_rows() -> None:
    row = Conditioned((Message("user", "a"),), ("b", "c"), None, None, None, None, "x", where="pairs.jsonl:3")
    rows: Any = [SimpleNamespace(split="train", text=row)]
    with pytest.raises(DataError, match=r"pairs.jsonl:3: it is bad"):
        sift(rows, {}, lambda at, row: "it is bad", strict=True)


# --- with MLX ------------------------------------------------------------------------------------


@pytest.mark.mlx
def test_mlx_says_the_same_of_a_response_alone(
    relabelled: Path, tiny_model_dir: Path, tmp_path: Path, hand: Hand
) -> None:
    """Unbatched, without a cache, straight from the model: log-probs, and the greedy response."""
    import mlx.core as mx

    from mlxpref import mlx_backend

    policy = mlx_backend.load_policy(str(tiny_model_dir), lora_parameters={"rank": 2}, num_layers=2, seed=3)
    rng = np.random.default_rng(0)
    policy.set_masters({n: mx.array(rng.normal(size=v.shape) * 0.1, mx.float32) for n, v in policy.masters.items()})
    mlx_backend.save_adapter(policy, tmp_path / "adapter", extra={})
    words = ("--add", "previous", "--add", "margin_rewards", "--add", "third", "--max-tokens", 5)
    columns(relabelled, *words, "--adapter-path", tmp_path / "adapter", "--out", tmp_path / "out")
    policy.model.eval()

    def sums(prompt: list[int], ids: list[int]) -> float:
        logits = policy.model(mx.array([[*prompt, *ids]]))[0].astype(mx.float32)
        logps = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        return float(sum(logps[len(prompt) - 1 + at, token] for at, token in enumerate(ids)))

    for row in rows_of(tmp_path / "out"):
        pairs = [ids_of(hand.tokenizer, row.prompt, response) for response in row.responses]
        own = [sums(*pair) for pair in pairs]
        with policy.as_reference():
            base = [sums(*pair) for pair in pairs]
        np.testing.assert_allclose(row.extras["previous"], own, atol=2e-3)
        expected = 0.1 * (np.array(own) - base)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(row.extras["margin_rewards"], expected, atol=5e-4)
        (text,) = mlx_backend.generate(policy, [pairs[0][0]], max_tokens=5)
        assert row.extras["third"] == text


@pytest.mark.mlx
@pytest.mark.parametrize("share", [True, False])
def test_mlx_sums_the_hidden_states_that_predict_a_response(tiny_model_dir: Path, share: bool) -> None:
    """Finds: states of the tokens themselves, padding in the sum, the reference's for the policy's."""
    import mlx.core as mx

    from mlxpref import mlx_backend
    from mlxpref.data.batching import collate
    from mlxpref.data.plan import plan_pass
    from mlxpref.records import Tokenized

    policy = mlx_backend.load_policy(str(tiny_model_dir), lora_parameters={"rank": 2}, num_layers=2, seed=3)
    rng = np.random.default_rng(0)
    policy.set_masters({n: mx.array(rng.normal(size=v.shape) * 0.1, mx.float32) for n, v in policy.masters.items()})
    policy.model.eval()

    def ids() -> np.ndarray:
        return rng.integers(0, 300, rng.integers(1, 20)).astype(np.int32)

    rows = [Tokenized(ids(), (ids(), ids()), f"{i}") for i in range(5)]
    plan = plan_pass(rows, micro_batch_tokens=256, share_prompts=share, max_shapes=4)

    def direct(row: Tokenized, k: int) -> np.ndarray:
        whole = [*row.prompt_ids.tolist(), *row.response_ids[k].tolist()]
        hidden = np.array(policy.model.model(mx.array([whole]))[0].astype(mx.float32))
        return hidden[len(row.prompt_ids) - 1 : -1].sum(0)

    for part in (part for step in plan.steps for part in step):
        batch = collate(rows, part)
        found = mlx_backend.hidden_sums(policy, batch)
        reference = mlx_backend.hidden_sums(policy, batch, reference=True)
        assert found.dtype == np.float32 and found.shape == (len(part.rows), 2, 32)
        for b, index in enumerate(part.rows):
            expected = [direct(rows[index], k) for k in range(2)]
            with policy.as_reference():
                before = [direct(rows[index], k) for k in range(2)]
            np.testing.assert_allclose(found[b], expected, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(reference[b], before, rtol=1e-3, atol=1e-3)
            assert np.abs(np.array(expected) - before).max() > 0.01
