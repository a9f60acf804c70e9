"""Our runs beside those of TRL's own ``DPOTrainer``: 30 steps from one start, on the same rows in the same order.

The two share a framework's kernels at most: tokens, batches, masks, log-probs, loss, gradients, clipping, AdamW,
schedule and metrics are theirs on one side and ours on the other. Seen with TRL 1.16. The differences that were
reached are in what ``pytest tests/test_trl_trainer.py -o junit_family=xunit1 --junitxml=trl.xml`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'mlxpref[trl]'")
pytest.importorskip("trl", reason="TRL is not installed: pip install 'mlxpref[trl]'")

from conftest import CHATML, make_tokenizer
from trl_trainer import N_STEPS, Case, Ran, our_rows, ours, theirs, trainer_of

from mlxpref import backends
from mlxpref.conversion import convert, write_converted
from mlxpref.data.relabel_sources import relabel_sources
from mlxpref.data.relabelled import write_relabelled
from mlxpref.data.sources import SourceSpec

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*:FutureWarning")]

NOTHING_BEHIND = CHATML.replace("<|im_end|>\n", "<|im_end|>")
"""A turn ends with its end token, as Llama 3's does; of one that goes on, see the test of what TRL scores."""

PAIR = ("prompt", "chosen", "rejected")
PEOPLE, DEEDS = ("girl", "cat", "dog", "boy", "fox"), ("play", "sing", "run", "sleep")

CASES = {
    "goals": Case(beta=0.3, learning_rate=2e-3, weight_decay=0.01),
    "moved": Case(
        start="moved", beta=0.3, rank=4, alpha=16.0, modules=("q_proj", "v_proj"), learning_rate=3e-3,
        schedule="linear", warmup=0, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-6,
    ),
    "further": Case(start="further", micro=2, schedule="linear", warmup=5, weight_decay=0.0, max_grad_norm=0.5),
    "stories": Case(start="moved", beta=0.05, learning_rate=1e-3, modules=("q_proj", "v_proj", "down_proj")),
}  # fmt: skip
"""``goals``: messages that state goals, from our relabelled folder. ``moved``: texts without a template, two epochs,
each of which ends with half a batch. ``further``: going on with an adapter, two micro-batches a step. ``stories``: a
pretrained model, and real answers, ten times over."""


@dataclass(frozen=True)
class Given:
    """What both sides read.

    Attributes:
        source: of ours; a file of pairs, or a relabelled folder.
        rows: of theirs; a file of pairs.
    """

    model: Path
    source: Path
    rows: Path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small wait for a second thread longer than it computes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, make_model_dir: Callable[..., Path], request: Any) -> Any:
    """Case → what both sides read; made once."""
    made: dict[str, Given] = {}

    def give(name: str) -> Given:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == "stories":
                assets = request.getfixturevalue("assets")
                pairs = write(folder / "pairs.jsonl", short_answers(assets / "data/ultrafeedback/train.jsonl"))
                model = assets / "models/stories260K"
                made[name] = Given(model, pairs, write(folder / "texts.jsonl", map(as_text, read(pairs))))
            elif name == "moved":
                pairs = write(folder / "pairs.jsonl", map(story, range(58)))
                model = make_model_dir(tokenizer=make_tokenizer(None), seed=1)
                made[name] = Given(model, pairs, write(folder / "texts.jsonl", map(as_text, read(pairs))))
            else:
                model = make_model_dir(tokenizer=make_tokenizer(NOTHING_BEHIND), seed=2)
                pairs = write(folder / "pairs.jsonl", map(story, range(60)))
                source = relabelled(pairs, folder / "relabelled")
                made[name] = Given(model, source, source / "train.jsonl")
        return made[name]

    return give


def story(i: int) -> dict[str, Any]:
    """A scored pair of responses of different lengths."""
    who, other = PEOPLE[i % 5], PEOPLE[(i + 2) % 5]
    begun = f"Once upon a time there was a little {who} named Lily who loved to {DEEDS[i % 4]}."
    return {
        "prompt": f"Write a short story about a {who} and a {other}, number {i}.",
        "chosen": begun + f" The {other} said hello to the {who}." * (i % 3 + 1),
        "rejected": f"The {who} was in the park." + f" It was a {other}." * (i % 4),
        "score_chosen": 6 + i % 5, "score_rejected": 1 + i % 4,
    }  # fmt: skip


def short_answers(file: Path) -> list[dict[str, Any]]:
    """Real pairs that fit the context of 512 tokens with room to spare, and a test that is no long run."""

    def usable(row: dict[str, Any]) -> bool:
        texts = [row[key].strip() for key in PAIR]
        return all(texts) and texts[1] != texts[2] and len("".join(texts)) < 350 and "".join(texts).isascii()

    return list(filter(usable, read(file)))


def as_text(row: dict[str, Any]) -> dict[str, str]:
    """Without a template we write a blank line behind the prompt."""
    return {"prompt": row["prompt"] + "\n\n", "chosen": row["chosen"], "rejected": row["rejected"]}


def relabelled(pairs: Path, folder: Path) -> Path:
    recipe = {"template": "Generate a response of quality {score} out of 10.", "carrier": "system"}
    found = relabel_sources([SourceSpec(str(pairs))], {**recipe, "score_range": (1, 10)})
    write_relabelled(folder, found.splits, found.recipe)
    return folder


def read(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return file


@pytest.fixture(scope="module")
def by_trl(tmp_path_factory: pytest.TempPathFactory, given: Any) -> Any:
    """Case → their run; made once."""
    from datasets import Dataset

    made: dict[str, Ran] = {}

    def run(name: str) -> Ran:
        if name not in made:
            folder = tmp_path_factory.mktemp(f"trl-{name}")
            rows = Dataset.from_list([{key: row[key] for key in PAIR} for row in read(given(name).rows)])
            made[name] = theirs(CASES[name], given(name).model, rows, folder)
        return made[name]

    return run


@pytest.fixture(scope="module")
def by_us(tmp_path_factory: pytest.TempPathFactory, given: Any, by_trl: Any) -> Any:
    """Case, backend and changes → our run; made once."""
    made: dict[Any, Ran] = {}

    def run(*asked: Any) -> Ran:
        if asked not in made:
            name, backend, *changes = asked
            folder, at = tmp_path_factory.mktemp(f"{backend}-{name}"), given(name)
            made[asked] = ours(CASES[name], backend, at.model, at.source, folder, by_trl(name).began, *changes)
        return made[asked]

    return run


BACKENDS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in backends.NAMES]

LARGEST = {
    "loss": 1e-4, "rewards/chosen": 2e-4, "rewards/rejected": 2e-4, "rewards/margins": 2e-4,
    "logps/chosen": 1e-3, "logps/rejected": 1e-3, "grad_norm": 1e-3, "learning_rate": 1e-15,
}  # fmt: skip
"""Of any step; log-probs are sums of some hundred nats, whose last bit in float32 is 3e-5."""
MEAN = {key: largest / 5 for key, largest in LARGEST.items()}
"""Of all steps together, with its sign."""
ADAPTER = {"adapter": 1e-3, "largest in adapter": 1e-2}
"""A factor at the end beside theirs, by norm and by its largest number, relative to the way that it has gone. Numbers
whose gradients are nothing but rounding go as far as others: Adam takes steps of one size."""


@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens(name: str, given: Any, by_trl: Any, tmp_path: Path) -> None:
    """Finds: another boundary, end token or BOS; a cut on one side; another order, or rows of another step."""
    rows = our_rows(CASES[name], given(name).model, given(name).source, tmp_path)
    batches = [rows[at : at + 4] for at in range(0, len(rows), 4)]
    assert by_trl(name).rows == [row for batch in islice(cycle(batches), N_STEPS) for row in batch]
    assert len({len(ids) for row in rows for ids in row}) > 10  # so that masks and padding matter


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_the_same_run(name: str, backend: str, by_trl: Any, by_us: Any, record_property: Any) -> None:
    """Finds: what both backends of ours have wrong, or one: a mask, a reference, a loss, an update, a schedule."""
    them, us = by_trl(name), by_us(name, backend)
    for key, value in differences(us, them).items():
        record_property(key, value)
    assert not apart(us, them)


@pytest.mark.parametrize("name", CASES)
def test_the_runs_are_worth_comparing(name: str, by_trl: Any) -> None:
    """Finds: a comparison of runs in which nothing happens."""
    them = by_trl(name)
    case, steps = CASES[name], them.steps
    assert all(len(values) == N_STEPS for values in steps.values())
    assert (steps["grad_norm"] > case.max_grad_norm).any()
    assert len(set(steps["learning_rate"])) > 20 and steps["learning_rate"].max() == case.learning_rate
    assert np.ptp(steps["loss"]) > 0.1 and np.ptp(steps["rewards/margins"]) > 0.2
    # Where reference and policy are one, TRL's adapter-off or copied reference says so to the last bit.
    assert (steps["loss"][0] == pytest.approx(np.log(2), abs=1e-7)) == (case.start != "moved")
    assert all(np.abs(value - them.began[key]).max() > 1e-3 for key, value in them.adapter.items())


FAULTS: dict[str, tuple[str, Any]] = {
    "smoothing": ("objective.label_smoothing", 0.01),
    "scale": ("adapter.lora_parameters.alpha", 16.2),
    "bias correction": ("optimizer.options.bias_correction", False),
    "decay": ("optimizer.weight_decay", 0.0),
    "schedule": ("optimizer.schedule.warmup_steps", 1),
}
"""Settings that are nearly those of TRL's run."""


@pytest.mark.mlx
@pytest.mark.parametrize("fault", FAULTS)
def test_another_run_is_told_apart(fault: str, by_trl: Any, by_us: Any) -> None:
    """Finds: tolerances through which such a difference of the two trainers would slip."""
    assert apart(by_us("moved", "mlx", FAULTS[fault]), by_trl("moved"))


def apart(us: Ran, them: Ran) -> list[str]:
    """What lies further apart than it may; every name has to be there on both sides."""
    assert us.steps.keys() == them.steps.keys() and us.adapter.keys() == them.adapter.keys()
    found = differences(us, them)
    bounds = {f"largest {key}": bound for key, bound in LARGEST.items()}
    bounds |= {f"mean {key}": bound for key, bound in MEAN.items()} | ADAPTER | {"accuracies": 0.0}
    too_far = [name for name, most in bounds.items() if not abs(found[name]) <= most]
    return [f"{name}: {found[name]:.2e}, at most {bounds[name]:.1e}" for name in too_far]


def differences(us: Ran, them: Ran) -> dict[str, float]:
    """Ours less theirs: of each quantity the largest, and the mean of all steps with its sign."""
    found = {}
    for key in LARGEST:
        difference = us.steps[key] - them.steps[key]
        found |= {f"largest {key}": float(np.abs(difference).max()), f"mean {key}": float(difference.mean())}
    # A policy that is still its reference wins no pair: TRL sees that, another order of sums may not.
    moved = them.steps["rewards/margins"] != 0
    accuracies = np.abs(us.steps["rewards/accuracies"] - them.steps["rewards/accuracies"])
    ways = [(us.adapter[key] - end, them.began[key] - end) for key, end in them.adapter.items()]
    return found | {
        "accuracies": float(accuracies[moved].max()),
        "adapter": float(max(np.linalg.norm(away) / np.linalg.norm(way) for away, way in ways)),
        "largest in adapter": float(max(np.abs(away).max() / np.abs(way).max() for away, way in ways)),
    }


@pytest.mark.mlx
@pytest.mark.parametrize("name", ["goals", "further"])
def test_the_adapters_give_the_same_logits(name: str, given: Any, by_trl: Any, by_us: Any, tmp_path: Path) -> None:
    """What ``save_model`` wrote and what our run left, each in PEFT and, carried over, in MLX.

    Finds: a factor not transposed, another scale, another layer, TRL's copy for the reference in its adapter's place.
    """
    them, us, model = by_trl(name), by_us(name, "mlx"), given(name).model
    rows = our_rows(CASES[name], model, given(name).source, tmp_path)[:3]
    for kind, folder in (("mlx", them.folder), ("peft", us.folder)):
        write_converted(convert(folder, to=kind), tmp_path / kind)
    for prompt, chosen, _ in rows:
        ids = [*prompt, *chosen]
        trl, ours = logits_in_peft(model, them.folder, ids), logits_in_mlx(us.folder, ids)
        np.testing.assert_allclose(logits_in_mlx(tmp_path / "mlx", ids), trl, atol=1e-4)
        np.testing.assert_allclose(logits_in_peft(model, tmp_path / "peft", ids), ours, atol=1e-4)
        np.testing.assert_allclose(ours, trl, atol=1e-3)
        assert np.abs(trl - logits_in_peft(model, None, ids)).max() > 0.1


def logits_in_mlx(folder: Path, ids: Sequence[int]) -> np.ndarray:
    import mlx.core as mx

    return np.array(backends.get("mlx").load_adapter(folder).model(mx.array([ids])))


def logits_in_peft(model: Path, folder: Path | None, ids: Sequence[int]) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    if folder is not None:
        loaded = PeftModel.from_pretrained(loaded, folder)
    with torch.no_grad():
        return loaded.eval()(torch.tensor([ids])).logits.numpy()


def test_trl_scores_what_the_template_writes_behind_the_end_token(
    make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """ChatML's newline, before which generation has stopped. Ours scores up to the end token, and that."""
    from datasets import Dataset

    model = make_model_dir(tokenizer=make_tokenizer(CHATML))
    source = relabelled(write(tmp_path / "pairs.jsonl", map(story, range(3))), tmp_path / "relabelled")
    rows = Dataset.from_list([{key: row[key] for key in PAIR} for row in read(source / "train.jsonl")])
    own = our_rows(Case(), model, source, tmp_path)
    trainer = trainer_of(Case(), model, rows, tmp_path)
    (newline,) = trainer.processing_class("\n")["input_ids"]
    for (prompt, *responses), row in zip(own, trainer.train_dataset, strict=True):
        assert (list(prompt), *([*ids, newline] for ids in responses)) == tuple(row[f"{key}_ids"] for key in PAIR)
