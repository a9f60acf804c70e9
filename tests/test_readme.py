"""README, followed by a user: every command of its sh blocks, in order, in one folder.

Finds: a command that does not work as it is written, that wants something no earlier one made, that ends
without what README says it leaves, that warns or opens a connection; a command nobody decided how to run.
No network: the hub is switched off in the environment, and a guard in every process refuses sockets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from document_commands import ROOT, fenced, statements

from mlxpref import sandbox
from mlxpref.objectives import TABLE

README = ROOT / "README.md"
COMMANDS = list(statements(fenced(README, "sh")))

# --- what a user puts in himself ---------------------------------------------------------------------

HUB_ID = "mlx-community/Qwen3-0.6B-4bit"
QWEN = "qwen3-0.6b-ultrafeedback.yaml"
QUESTION = "Why is the sky blue?"
RATE = 1e-5

PUT_IN: Mapping[str, str] = {HUB_ID: str(sandbox.MODEL), "path/to/model": str(sandbox.MODEL)}
"""Words of README -> what stands there on this machine. ``pairs.jsonl`` is a file the test writes."""

ADDED: Mapping[str, tuple[str, ...]] = {
    "mlxpref doctor": ("--no-network",),
    "mlxpref doctor -c": ("--no-network",),
    "mlxpref train -c": (
        "--model", str(sandbox.MODEL), "--data", "pairs.jsonl", "--iters", "6", "--set", "training.steps_per_eval=3",
    ),
    "mlxpref ablate -c": (
        "--rows", "12", "--set", "training.iters=2", "--set", "training.steps_per_eval=2", "--set", "data.limit=40",
        "--set", "training.val_batches=1",
    ),
}  # fmt: skip
"""Kind of a command -> what the test adds to it, to be small and to ask nobody."""

ANNOUNCED: Mapping[str, str] = {
    "mlxpref relabel #2": r"warning: in \d+ pairs? the data's chosen response has the lower score; the score decides",
}
"""Command -> the one warning README says it may give. Whether it does hangs on an adapter that has hardly learnt."""

CHOSEN_CONFIG = "configs/cpu-small.yaml"
"""What stands for ``configs/NAME.yaml``."""

BY_CI = "installs, from the network: run by CI in a fresh clone"
NOT_RUN: Mapping[str, str] = {
    "scripts/quickstart": f"{BY_CI}; what it starts is in test_quickstart.py",
    "scripts/quickstart --quick": f"{BY_CI}; what it starts is in test_quickstart.py",
    "python3 -m venv .venv '&&' . .venv/bin/activate": BY_CI,
    "pip install -e .": BY_CI,
    "pip install -e '.[cpu]'": BY_CI,
    "pip install -e '.[cuda]'": f"{BY_CI} where there is such a GPU",
    "pip install -e '.[torch]'": BY_CI,
}
"""Commands that are not run here, and why; all others are, and :data:`PROMISES` says what to look for."""


def user_pairs() -> list[dict[str, Any]]:
    """Fifty scored pairs of one's own, on 1–10 in halves, no request twice; some rejected replies are good."""
    things = ("kettle", "bicycle chain", "wool jumper", "front door lock", "cast iron pan",
              "garden hose", "keyboard", "desk lamp", "rain coat", "hand saw")  # fmt: skip
    troubles = ("makes noise", "smells", "got wet", "is stuck", "looks dull")
    long = "Look at your {} first. If it {}, clean it, dry it, and oil what moves; then try again, gently."
    short = "Maybe the {} only {} on Mondays."
    rows = []
    for n, (thing, trouble) in enumerate((thing, trouble) for thing in things for trouble in troubles):
        texts = long.format(thing, trouble), short.format(thing, trouble)
        scores = 5 + n % 4 / 2, 1 + n % 7 / 2
        request = f"My {thing} {trouble}. What can I do?"
        rows.append({
            "prompt": request, "chosen": texts[0], "rejected": texts[1],
            "score_chosen": scores[0], "score_rejected": scores[1],
        })  # fmt: skip
    for row in [row for n, row in enumerate(rows) if n % 5 < 2]:
        row["score_chosen"] = row["score_chosen"] + 3.5
        row["rejected"], row["score_rejected"] = row["chosen"].replace(", gently", ""), row["score_chosen"] - 0.5
    return rows


def local_config(config: Path) -> str:
    """The configuration with a model and data that are on this machine."""
    found = yaml.safe_load(config.read_text())
    found["model"]["path"] = PUT_IN[HUB_ID]
    found["data"] |= {"source": "pairs.jsonl", "split": None}
    return yaml.safe_dump(found)


# --- the run -----------------------------------------------------------------------------------------

GUARD = '''
"""No connection leaves this process: each attempt is written down, and refused."""
import os, socket

def refuse(name, original):
    def call(*args, **options):
        if isinstance(args[0], socket.socket) and args[0].family == socket.AF_UNIX:
            return original(*args, **options)
        with open(os.environ["README_SOCKETS"], "a") as file:
            file.write(f"{name}{args[-1]!r}\\n")
        raise AssertionError("the network is not to be touched")
    return call

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name, getattr(socket.socket, name)))
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, refuse(name, getattr(socket, name)))
'''
"""Python runs a ``sitecustomize`` that it finds before everything else."""

PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "mlxpref": ("-m", "mlxpref"),
    "mlx_lm.generate": ("-m", "mlx_lm", "generate"),
}


@dataclass(frozen=True)
class Place:
    """A user's folder, and the environment of what is run in it."""

    folder: Path
    environment: Mapping[str, str]

    @classmethod
    def make(cls, folder: Path) -> Place:
        guard = folder / "guard"
        guard.mkdir()
        (guard / "sitecustomize.py").write_text(GUARD)
        added = {"PYTHONPATH": f"{guard}{os.pathsep}{ROOT}", "README_SOCKETS": str(guard / "opened")}
        home = folder / "home"
        home.mkdir()
        return cls(home, {**os.environ, **added, "HF_HUB_OFFLINE": "1", "MLXPREF_CACHE": str(folder / "cache")})

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def opened(self) -> str:
        """Connections that were tried."""
        file = Path(self.environment["README_SOCKETS"])
        return file.read_text() if file.exists() else ""


def written(words: list[str]) -> str:
    """A command as README has it, joined and without comments: its name in this file."""
    return shlex.join(words)


def kind(words: list[str]) -> str:
    """``mlxpref doctor -c``: what its additions and promises go by."""
    return " ".join(words[:2 if words[0] == "mlxpref" else 1] + ["-c"] * ("-c" in words))


def named() -> dict[str, list[str]]:
    """Commands that are run here by name: their kind, numbered from the second of a kind on."""
    found: dict[str, list[str]] = {}
    for words in filter(run_here, COMMANDS):
        n = sum(name.partition(" #")[0] == kind(words) for name in found)
        found[kind(words) + (f" #{n + 1}" if n else "")] = words
    return found


def as_typed(words: list[str]) -> list[str]:
    """A command with what a user puts in."""
    typed = [PUT_IN.get(word, word).replace("configs/NAME.yaml", CHOSEN_CONFIG) for word in words]
    return [*PROGRAMS[typed[0]], *typed[1:], *ADDED.get(kind(words), ())]


def run_here(words: list[str]) -> bool:
    return words[0] in PROGRAMS


@dataclass(frozen=True)
class Followed:
    """The folder after README was followed, and what its commands printed."""

    place: Place
    ran: Mapping[str, subprocess.CompletedProcess[str]]

    def said(self, which: str) -> str:
        """Standard output of the command of this kind."""
        return self.ran[which].stdout


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    place = Place.make(tmp_path_factory.mktemp("readme"))
    (place.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in user_pairs()))
    (place.folder / "configs").mkdir()
    for config in (ROOT / "configs").glob("*.yaml"):
        sandboxed = config.read_text().replace("mlxpref/sandbox/", f"{ROOT}/mlxpref/sandbox/")
        text = local_config(config) if config.name == QWEN else sandboxed
        (place.folder / "configs" / config.name).write_text(text)
    ran = {name: place.python(*as_typed(words)) for name, words in named().items()}
    return Followed(place, ran)


# --- what README promises of each command ------------------------------------------------------------


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def relabelled(it: Followed) -> None:
    """Each pair twice: who is asked for prefers whom he is asked for; TRL's columns; both halves in one split."""
    seen = []
    for split in ("train", "valid"):
        found = rows(it.place.folder / "relabelled" / f"{split}.jsonl")
        seen.append({row["prompt"][-1]["content"] for row in found})
        assert len(found) == 2 * len(seen[-1])
        for row in found:
            system, user = (message["content"] for message in row["prompt"])
            pair = next(pair for pair in user_pairs() if pair["prompt"] == user)
            sides = ("chosen", "rejected") if row["half"] == "chosen" else ("rejected", "chosen")
            assert system.endswith(f"Overall score: {pair[f'score_{sides[0]}']:g}.")
            assert [row[side][0]["content"] for side in ("chosen", "rejected")] == [pair[side] for side in sides]
    assert seen[1] and not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 50


def trained(it: Followed) -> None:
    """An adapter of mlx-lm's names that has learnt something, and reference log-probs kept on disk."""
    from safetensors.numpy import load_file

    folder = it.place.folder / "adapter"
    weights = load_file(folder / "adapters.safetensors")
    assert {name.rpartition(".")[2] for name in weights} == {"lora_a", "lora_b"}
    assert any(weight.any() for name, weight in weights.items() if name.endswith("lora_b"))
    assert json.loads((folder / "adapter_config.json").read_text())["fine_tune_type"] == "lora"
    assert any(file.is_file() for file in Path(it.place.environment["MLXPREF_CACHE"]).rglob("*"))


def evaluated(it: Followed) -> None:
    """Figures for each half, the top goal and none, by score gap, and for good responses that were rejected."""
    said = it.said("mlxpref evaluate")
    heading = said.splitlines()[0]
    views = ("goal: chosen's score", "goal: rejected's score", "top goal", "no goal")
    assert [view for view in views if view in heading] == list(views)
    for line in ("accuracy", "margin (nats)", "change of log-prob, chosen", "change of log-prob, rejected"):
        assert figures(said, line), line
    good = held_out_good_rejected(it)
    assert figures(said, "  high-score rejected responses")[0] == good
    assert bool(figures(said, "change of log-prob, high-score rejected")) == bool(good)
    assert "accuracy by score gap" in said


def figures(said: str, line: str) -> list[float]:
    """The numbers of a table's line, by view; none if the line is not there."""
    found = re.search(rf"^{re.escape(line)}  +(.*)$", said, flags=re.MULTILINE)
    return [] if found is None else [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", found[1])]


def held_out_good_rejected(it: Followed) -> int:
    """Rejected responses of the held-out pairs that score as the middle one of their chosen ones, or better."""
    held_out = {row["prompt"][-1]["content"] for row in rows(it.place.folder / "relabelled" / "valid.jsonl")}
    pairs = [pair for pair in user_pairs() if pair["prompt"] in held_out]
    middle = statistics.median(pair["score_chosen"] for pair in pairs)
    return sum(pair["score_rejected"] >= middle for pair in pairs)


def answers(it: Followed) -> dict[str, str]:
    parts = re.split(r"^--- goal (\S+)\n", it.said("mlxpref generate"), flags=re.MULTILINE)[1:]
    return {goal: text.strip() for goal, text in zip(parts[::2], parts[1::2], strict=True)}


def generated(it: Followed) -> None:
    """An answer at each of the two goals."""
    assert list(answers(it)) == ["2", "10"]
    assert all(answers(it).values())


def inspected(it: Followed) -> None:
    """What is scored stands in its marks, both responses of every example; the prompt before it, goal included."""
    said = it.said("mlxpref inspect")
    examples = said.split("\n===== ")[1:]
    assert len(examples) == 3
    for example in examples:
        scored = re.findall(r"⟦(.+?)<\|end\|>⟧", example)
        assert len(scored) == 2 and "My " in example.partition("⟦")[0]
        assert "Overall score:" in example.partition("⟦")[0] and "Overall score:" not in " ".join(scored)
    assert "rows kept, 0 dropped" in said


def examined(it: Followed) -> None:
    assert re.search(r"checks: \d+ to look at, 0 failed$", it.said("mlxpref doctor"))


def examined_with_config(it: Followed) -> None:
    said = it.said("mlxpref doctor -c")
    assert all(re.search(rf"^ok +{what}: ", said, flags=re.MULTILINE) for what in ("config", "model", "data"))


def asked_with_mlx_lm(it: Followed) -> None:
    """The goal sentence put in by hand is what the recipe puts in: mlx-lm answers as we do, 100 tokens long."""
    text = it.said("mlx_lm.generate").split("=" * 10)[1].strip()
    assert text and answers(it)["10"].startswith(text)


def probed(it: Followed) -> None:
    _, row = it.said("mlxpref probe").splitlines()[:2]
    assert re.search(r" (shared|plain) .* exact \(", row)


def trained_with_config(it: Followed) -> None:
    """The run folder the file names, with what --set said over it."""
    folder = it.place.folder / "runs" / "cpu-small"
    assert (folder / "adapters.safetensors").is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["learning_rate"] == RATE


def swept(it: Followed) -> None:
    """One line for each of the four combinations, two runs behind each; the table and the picture as files."""
    folder = it.place.folder / "sweep"
    for value in ("dpo", "ipo", "0.05"):
        assert value in it.said("mlxpref ablate -c")
    assert len(list(folder.rglob("adapters.safetensors"))) >= 8
    assert len(json.loads((folder / "table.json").read_text())["combinations"]) == 4
    assert [file.suffix for file in folder.glob("*.png")] == [".png"]


def scored_by_a_model(it: Followed) -> None:
    """Rows as they were, with one number more a response."""
    found = rows(next((it.place.folder / "scored").glob("*.jsonl")))
    assert len(found) == 50 and all(isinstance(row["implicit_reward_chosen"], float) for row in found)


def relabelled_again(it: Followed) -> None:
    """Goals are quantiles of the new scores, on the scale that is asked for."""
    found = rows(it.place.folder / "relabelled-again" / "train.jsonl")
    assert {row["half"] for row in found} == {"chosen", "rejected"}
    assert len({row["goal"] for row in found}) > 10


def with_previous(it: Followed) -> None:
    """Log-probs of the round before, one a response, in the order of the responses."""
    found = rows(it.place.folder / "next-round" / "train.jsonl")
    assert all(len(row["previous"]) == 2 and max(row["previous"]) < 0 for row in found)


def carried_over(it: Followed) -> None:
    """PEFT's two files, and ours beside them."""
    names = {file.name for file in (it.place.folder / "adapter-peft").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "mlxpref.json"}


def evaluated_by_torch(it: Followed) -> None:
    """The other backend, on the adapter in the other form, finds what MLX found."""
    assert "backend: torch" in it.ran["mlxpref evaluate #2"].stderr
    for line in ("margin (nats)", "change of log-prob, chosen"):
        theirs, ours = (figures(it.said(name), line) for name in ("mlxpref evaluate #2", "mlxpref evaluate"))
        assert theirs and theirs == pytest.approx(ours, rel=2e-3, abs=2e-3)


def agreed(it: Followed) -> None:
    assert "the two agree" in it.said("mlxpref parity")


def exported(it: Followed) -> None:
    names = {file.name for file in (it.place.folder / "from-here").iterdir()}
    assert names == {"parity.json", "parity.safetensors"}


def agreed_with_an_export(it: Followed) -> None:
    assert "the two agree" in it.said("mlxpref parity #3")


def extrapolated(it: Followed) -> None:
    """The same factors, 1.3 times as strong."""
    adapters = [it.place.folder / name for name in ("adapter", "further")]
    scales = [json.loads((a / "adapter_config.json").read_text())["lora_parameters"]["scale"] for a in adapters]
    assert scales[1] == pytest.approx(1.3 * scales[0])


PROMISES: Mapping[str, Callable[[Followed], None]] = {
    "mlxpref doctor": examined,
    "mlxpref relabel": relabelled,
    "mlxpref train": trained,
    "mlxpref evaluate": evaluated,
    "mlxpref generate": generated,
    "mlxpref inspect": inspected,
    "mlxpref doctor -c": examined_with_config,
    "mlx_lm.generate": asked_with_mlx_lm,
    "mlxpref probe": probed,
    "mlxpref train -c": trained_with_config,
    "mlxpref ablate -c": swept,
    "mlxpref columns": scored_by_a_model,
    "mlxpref relabel #2": relabelled_again,
    "mlxpref columns #2": with_previous,
    "mlxpref convert": carried_over,
    "mlxpref evaluate #2": evaluated_by_torch,
    "mlxpref parity": agreed,
    "mlxpref parity #2": exported,
    "mlxpref parity #3": agreed_with_an_export,
    "mlxpref merge": extrapolated,
}


WITH_TORCH = ("mlxpref evaluate #2", "mlxpref parity", "mlxpref parity #3")
"""Commands that need the extra torch."""


# --- the tests ---------------------------------------------------------------------------------------


def test_every_command_is_run_or_left_out_for_a_reason() -> None:
    """A new line fails here until somebody decides what it promises, or who runs it."""
    assert sorted(written(words) for words in COMMANDS if not run_here(words)) == sorted(NOT_RUN)
    assert list(named()) == list(PROMISES)


def test_what_is_put_in_is_asked_for() -> None:
    """A substitution README has no place for would hide that its words have changed."""
    words = [word for command in COMMANDS for word in command]
    assert {*PUT_IN, "pairs.jsonl", "configs/NAME.yaml", f"configs/{QWEN}", QUESTION} <= set(words)
    assert set(ADDED) <= {kind(command) for command in COMMANDS}


def test_the_number_of_objectives_is_right() -> None:
    told = re.findall(r"\b(\d+)(?: objectives|\]\(docs/objectives\.md\))", README.read_text())
    assert told and set(map(int, told)) == {len(TABLE)}


def test_the_user_has_what_readme_speaks_of() -> None:
    """Of the fifty pairs: two different scores each, and good replies among the rejected."""
    pairs = user_pairs()
    assert len({pair["prompt"] for pair in pairs}) == len(pairs) == 50
    assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
    middle = statistics.median(pair["score_chosen"] for pair in pairs)
    assert sum(pair["score_rejected"] >= middle for pair in pairs) >= 5


@pytest.mark.mlx
@pytest.mark.slow
class TestFollowed:
    @pytest.mark.parametrize("which", PROMISES)
    def test_a_command_does_what_readme_says(self, which: str, followed: Followed) -> None:
        if which in WITH_TORCH and importlib.util.find_spec("torch") is None:
            pytest.skip("torch is not installed")
        done = followed.ran[which]
        assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"
        stumbles = [line for line in (done.stdout + done.stderr).splitlines() if stumble(line, which)]
        assert not stumbles, f"{done.args}\n" + "\n".join(stumbles)
        PROMISES[which](followed)

    def test_the_goal_to_type_is_shown_word_for_word(self, followed: Followed) -> None:
        (by_hand,) = (words for words in COMMANDS if words[0] == "mlx_lm.generate")
        sentence = by_hand[by_hand.index("--system-prompt") + 1]
        shown = followed.place.python(
            "-m", "mlxpref", "generate", QUESTION, "--adapter-path", "adapter", "--show-prompt"
        )
        assert f"<|system|>{sentence}<|end|>" in shown.stdout, shown.stderr

    def test_nothing_asked_the_network(self, followed: Followed) -> None:
        assert followed.ran and not followed.place.opened()


def stumble(line: str, which: str) -> bool:
    """Would a user stop at this line of a command? What the machine lacks (a BLAS, a compiler) is no fault of README's,
    and what README announces of this command no surprise."""
    from mlxpref import backends

    if which in ANNOUNCED and re.fullmatch(ANNOUNCED[which], line):
        return False
    if any(remark in line for remark in backends.get("mlx").device_info().get("remarks", ())):
        return False
    return bool(re.search(r"warning\b|^Traceback", line, flags=re.IGNORECASE))


def test_the_guard_sees_a_connection(tmp_path: Path) -> None:
    """Witness of the one above."""
    place = Place.make(tmp_path)
    tried = place.python("-c", "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert tried.returncode == 1
    assert place.opened().startswith("create_connection(")


@pytest.mark.mlx
def test_a_stumble_is_one() -> None:
    """Witness: lines that must not pass, beside those that may."""
    lines = ["warning: 3 rows dropped", "x.py:3: UserWarning: old", "Traceback (most recent call last):"]
    assert all(stumble(line, which) for line in lines for which in ("mlxpref train", *ANNOUNCED))
    assert not stumble("step 20/24  loss 0.6367", "mlxpref train")


@pytest.mark.mlx
def test_a_warning_that_readme_announces_is_one_of_its_command_alone(tmp_path: Path) -> None:
    """The words are what `relabel` prints where the new score is higher for the rejected response."""
    rewards = [{"implicit_reward_chosen": 0.1, "implicit_reward_rejected": n / 5} for n in range(50)]
    scored = [row | own for row, own in zip(user_pairs(), rewards, strict=True)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    (words,) = (words for name, words in named().items() if name in ANNOUNCED)
    given = [str(tmp_path) if word == "scored" else word for word in words[1:]]
    command = [sys.executable, "-m", "mlxpref", *given[:-1], str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = (line for line in ran.stderr.splitlines() if line.startswith("warning"))
    assert not any(stumble(line, which) for which in ANNOUNCED)
    assert all(stumble(line, which) for which in PROMISES if which not in ANNOUNCED)
    assert "in how many pairs, and the new score decides" in " ".join(README.read_text().split())
