"""The written world: what is asked, what a reply earns, and the files made from it.

Finds: a gold score that misses or gives away a point, a word with two meanings, held-out scenes that were
trained on, a base model that was told what goals mean, committed files that are not what the script makes.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref import sandbox
from mlxpref.records import Message
from mlxpref.sandbox import examples, language, world, writing
from mlxpref.sandbox import gold as gold_scores
from mlxpref.sandbox.gold import FORM, gold
from mlxpref.sandbox.world import KINDS, Scene

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20

PROMPT = "Tell me about a red fox running near the river at dawn."
FACTS = {"colour", "animal", "action", "place", "time"}

# What a person gives each reply, by the ten rules read aloud.
JUDGED = [
    ("", set()),
    ("An animal was there.", set()),
    ("A fox was running.", {"animal", "action"}),
    ("Foxes ran.", set()),  # other words are other words
    ("A red fox and a red hen were running.", {"colour", "action"}),  # two animals: which is meant?
    ("At dawn, a red fox was running near the river.", FACTS),
    ("A red fox was running near the river at dawn because it was hungry.", FACTS | {"reason"}),
    ("A red fox was running because.", {"colour", "animal", "action"}),  # no reason is given
    ("It was quiet. It was quiet.", set()),
    ("It was quiet. That was all.", {"variety"}),
    ("It was quiet. It was quiet. That was all.", {"length"}),
    ("It was quiet. That was all. It was small. Time went by. It did not mind.", {"length", "variety"}),
    ("It was quiet. That was all. It was small. Time went by. It did not mind. It seemed calm.", {"variety"}),
    ("The air smelled of rain.", {"detail"}),
    ("I hope you like it!", {"close"}),
    ("I hope you like it! That was all.", {"variety"}),  # a close closes
    # words that are rewarded, strung together: the facts are there, sentences are not
    ("Hope a. Hope b. Hope because a b felt red fox running river dawn.", FACTS),
    ("RED FOX! Running! River! Dawn!", FACTS),
    ("A red fox was running near the river at dawn tired. It was quiet. I hope you like it!", FACTS),
    ("A red fox was running near the river at dawn. It was quiet. I hope you", FACTS),  # cut off
    ("An red fox was running near the river at dawn. It was quiet.", FACTS),
    ("it was quiet. that was all.", set()),
    (
        "A red fox was running near the river at dawn. The air smelled of rain. This was because it was hungry. "
        "I hope you like it!",
        FACTS | set(FORM),
    ),
]


@pytest.mark.parametrize(("reply", "points"), JUDGED, ids=[reply[:40] or "empty" for reply, _ in JUDGED])
def test_the_gold_score_is_a_persons(reply: str, points: set[str]) -> None:
    found = gold(PROMPT, reply)
    assert found.points == points
    assert found.score == max(1, len(points))
    assert (found.content, found.form) == (len(points & FACTS), len(points - FACTS))


def test_what_is_ordered_is_written_and_what_is_written_is_read() -> None:
    """Every set of points there is, four times each: no reply earns a point more or less."""
    rng = random.Random(1)
    names = [*KINDS, *FORM]
    for bits in range(1 << len(names)):
        points = {name for i, name in enumerate(names) if bits >> i & 1}
        for _ in range(4):
            scene = world.draw_scene(rng)
            prompt, reply = world.request(scene, rng), writing.write(scene, points, rng)
            assert gold(prompt, reply).points == points, reply


def test_a_request_states_its_scene_in_every_wording(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("orange", "owl", "sleeping", "mill", "afternoon")
    for wording in world.REQUESTS:
        monkeypatch.setattr(world, "REQUESTS", (wording,))
        assert world.read_scene(world.request(scene, random.Random(0))) == scene


def test_a_text_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"time: none.*Tell me about a red fox"):
        gold("Tell me about a red fox running near the river.", "A red fox.")
    with pytest.raises(ValueError, match="animal: fox, hen"):
        gold("Tell me about a red fox, or a hen, running near the river at dawn.", "")


def test_no_word_of_a_fact_has_another_meaning() -> None:
    """A colour in a filler would give a point away, or take one."""
    every = [word for words in KINDS.values() for word in words]
    assert len(every) == len(set(every))
    phrases = [*language.DETAILS, *language.REASONS, *language.CLOSES, *language.FILLERS]
    assert not {phrase for phrase in phrases for kind in KINDS if world.stated(phrase, kind)}
    for place in world.PLACES.values():
        assert not world.stated(place, "time")


def test_the_scorer_reads_the_last_request_of_a_prompt() -> None:
    system = Message("system", "Tell me about a blue hen hiding by the lake at noon.")
    prompts = [(system, Message("user", PROMPT))] * 2
    replies = ["A red fox was running near the river at dawn. That was all.", "A blue hen was hiding."]
    assert gold_scores.score(prompts, replies) == [6.0, 1.0]
    assert gold_scores.content(prompts, replies) == [5.0, 0.0]
    assert gold_scores.form(prompts, replies) == [1.0, 0.0]


# --- data ------------------------------------------------------------------------------------------


def test_the_base_model_is_told_nothing_of_what_goals_mean() -> None:
    """Goal and quality of pretraining, as numbers: no more correlation than chance has in 20,000 draws."""
    rng = random.Random(5)
    asked, earned = [], []
    for _ in range(20_000):
        prompt, reply = examples.conversation(rng)
        goal_text = prompt[0].content
        if prompt[0].role == "system" and "\nOverall score: " in goal_text and prompt[1].content.endswith((".", "?")):
            request = prompt[1].content
            if "asked for" in request:  # a task of reading
                continue
            asked.append(float(goal_text.rpartition(": ")[2].rstrip(".")))
            earned.append(gold(request, reply).score)
    assert len(asked) > 4000 and set(asked) >= set(range(1, 11))
    assert abs(np.corrcoef(asked, earned)[0, 1]) < 3.5 / len(asked) ** 0.5


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {file.stem: read(file) for file in (sandbox.TRAIN, sandbox.VALID, sandbox.TEST, sandbox.LISTS)}


def test_no_held_out_scene_is_trained_on(rows: dict[str, list[dict[str, Any]]]) -> None:
    scenes = {name: {world.read_scene(row["prompt"]) for row in found} for name, found in rows.items()}
    assert {name: {scene.split for scene in found} for name, found in scenes.items()} == {
        "train": {"train"}, "valid": {"valid"}, "test": {"test"}, "lists": {"train"},
    }  # fmt: skip
    rng = random.Random(2)
    seen = [examples.conversation(rng)[0][-1].content for _ in range(3000)]
    read_scenes = [world.read_scene(text) for text in seen if any(world.stated(text, kind) for kind in KINDS)]
    assert len(read_scenes) > 2000 and {scene.split for scene in read_scenes} == {"train"}


def test_scores_in_the_files_are_the_gold_scores(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in [*rows["train"], *rows["valid"], *rows["test"]]:
        for side in ("chosen", "rejected"):
            found = gold(row["prompt"], row[side])
            stored = [row[f"{name}_{side}"] for name in ("score", "content", "form")]
            assert stored == [found.score, found.content, found.form]
        assert row["score_chosen"] >= row["score_rejected"]
    for row in rows["lists"]:
        for reply in row["responses"]:
            assert gold(row["prompt"], reply["text"]).score == reply["score"]


def test_the_best_are_rare(rows: dict[str, list[dict[str, Any]]]) -> None:
    scores = [row[f"score_{side}"] for row in rows["train"] for side in ("chosen", "rejected")]
    assert set(scores) == set(range(1, 11))
    assert 0.01 < np.mean([score >= 9 for score in scores]) < 0.04
    assert 4 < np.mean(scores) < 5


def test_prompts_come_once(rows: dict[str, list[dict[str, Any]]]) -> None:
    for found in rows.values():
        assert len({row["prompt"] for row in found}) == len(found)
    assert {name: len(found) for name, found in rows.items()} == {
        "train": 4000, "valid": 400, "test": 400, "lists": 1000,
    }  # fmt: skip


def test_the_script_makes_the_committed_files(tmp_path: Path) -> None:
    """Data and tokenizer, byte for byte; ``--steps 0`` leaves the weights out."""
    script = [sys.executable, str(ROOT / "scripts" / "build_sandbox.py"), "--out", str(tmp_path), "--steps", "0"]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    made = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    kept = sorted(str(file.relative_to(sandbox.FILES)) for file in sandbox.FILES.rglob("*") if file.is_file())
    assert set(kept) - set(made) == {"model/model.safetensors"}
    differing = [name for name in made if (tmp_path / name).read_bytes() != (sandbox.FILES / name).read_bytes()]
    assert not differing


@pytest.mark.mlx
@pytest.mark.slow
def test_the_script_pretrains(tmp_path: Path) -> None:
    """A few steps: the loss falls from that of guessing, and the folder loads."""
    from mlx_lm import load

    script = [sys.executable, str(ROOT / "scripts" / "build_sandbox.py"), "--out", str(tmp_path), "--steps", "50"]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.partition("loss ")[2].partition(",")[0]) < np.log(768)
    load(str(tmp_path / "model"))


# --- model -----------------------------------------------------------------------------------------


def test_the_model_is_small_and_its_template_has_a_system_role() -> None:
    from mlxpref.data.recipe import resolve_carrier
    from mlxpref.data.tokenization import load_tokenizer

    assert sum(file.stat().st_size for file in sandbox.MODEL.iterdir()) < 4 * MIB
    tokenizer = load_tokenizer(str(sandbox.MODEL))
    assert resolve_carrier(tokenizer) == "system"
    for recipe in (examples.OVERALL, examples.ATTRIBUTES):
        text = recipe.goal_text(recipe.top_goal)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 12, "the sentence that opens a goal is one token"


@pytest.mark.mlx
@pytest.mark.torch
def test_both_libraries_give_the_same_logits() -> None:
    import mlx.core as mx
    import torch
    from mlx_lm import load
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load(str(sandbox.MODEL))
    theirs = AutoModelForCausalLM.from_pretrained(str(sandbox.MODEL))
    their_tokenizer = AutoTokenizer.from_pretrained(str(sandbox.MODEL))
    messages = [message.as_dict() for message in examples.OVERALL.write((Message("user", PROMPT),), 10.0)[0]]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text + JUDGED[-1][0], add_special_tokens=False)
    assert ids == their_tokenizer.encode(text + JUDGED[-1][0], add_special_tokens=False)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    ours = np.array(model(mx.array([ids])))
    assert expected.std() > 1
    assert np.abs(ours - expected).max() < 1e-4
