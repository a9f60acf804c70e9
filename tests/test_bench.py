"""Measuring a step: who runs when, what is counted, and what is said.

Finds: a contestant that is measured while it warms up, or alone; a figure that belongs to another; memory that is the
neighbour's; a padding or a loss that is not mlx-lm's; a witness of gradients that agrees with anything; something
left on the disk.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref import cli
from mlxpref.bench import measuring
from mlxpref.bench.lines import as_dict, lines, table
from mlxpref.bench.measuring import REFERENCE, SFT, STEP, Contestant, Measured
from mlxpref.bench.rows import SHAPES, made_rows
from mlxpref.bench.subject import for_steps_alone
from mlxpref.config_layers import check_config
from mlxpref.parity.models import write_model
from mlxpref.records import Tokenized

SMALL = ["--shape", "hh", "--set", "batching.batch_size=2", "--set", "tokenization.max_length=80", "--repeats", "2"]


# --- rows that are made up ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_made_up_rows_have_the_lengths_they_are_called_by(shape: str) -> None:
    rows, asked = made_rows(shape, 200, vocabulary=50, seed=1), SHAPES[shape]
    prompts = [len(row.prompt_ids) for row in rows]
    responses = [len(ids) for row in rows for ids in row.response_ids]
    assert (min(prompts), max(prompts)) == pytest.approx(asked.prompt, rel=0.05)
    assert (min(responses), max(responses)) == pytest.approx(asked.response, rel=0.1)
    ids = np.concatenate([row.prompt_ids for row in rows])
    assert set(ids.tolist()) == set(range(50))
    assert len({row.example_id for row in rows}) == 200
    again = made_rows(shape, 200, vocabulary=50, seed=1)
    assert all((one.prompt_ids == other.prompt_ids).all() for one, other in zip(rows, again, strict=True))


def test_made_up_rows_fit_the_model() -> None:
    rows = made_rows("uf", 50, vocabulary=9, longest=130)
    whole = [len(row.prompt_ids) + len(ids) for row in rows for ids in row.response_ids]
    assert max(whole) == 130 and min(len(ids) for row in rows for ids in row.response_ids) >= 1


# --- who runs when --------------------------------------------------------------------------------


def raced(broken: str = "", error: Exception | None = None, repeats: int = 3) -> tuple[list[str], dict[str, Any], Any]:
    """Order of calls, the contestants, and what was noted of a race whose calls take 1, 2, 3 … seconds."""
    order: list[str] = []
    notes: list[str] = []

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            if name == broken and error is not None:
                raise error

        return run

    def measured(run: Callable[[], None]) -> tuple[float, int]:
        run()
        return float(len(order)), 10 * len(order)

    def rate() -> float:
        order.append("rate")
        return float(len(order))

    calls = {name: measuring._Call(call(name), state=1000) for name in (STEP, SFT, REFERENCE)}
    rates = measuring._race(calls, SimpleNamespace(measured=measured), rate, repeats, notes, None)
    return order, {"calls": calls, "rates": rates}, notes


def test_all_run_in_turn_and_warm_ups_do_not_count() -> None:
    order, found, _ = raced()
    assert order == ["rate", STEP, SFT, REFERENCE] * (measuring.WARM_UPS + 3)
    first = 4 * measuring.WARM_UPS
    assert found["rates"] == [first + 1, first + 5, first + 9]
    assert found["calls"][SFT].seconds == [first + 3, first + 7, first + 11]


def test_memory_is_the_worst_repeat_and_what_is_kept() -> None:
    _, found, _ = raced()
    last = 4 * measuring.WARM_UPS + 8
    assert found["calls"][STEP].result().above == 1000 + 10 * (last + 2)
    found["calls"][STEP].transient = [None, None]
    assert found["calls"][STEP].result().above is None


def test_an_sft_step_that_does_not_fit_is_left_out_by_name() -> None:
    _, found, notes = raced(broken=SFT, error=RuntimeError("[malloc] out of memory\nat 0x0"))
    assert list(found["calls"]) == [STEP, REFERENCE]
    assert notes == [f"{SFT}: left out: [malloc] out of memory"]
    with pytest.raises(RuntimeError, match="mine"):
        raced(broken=STEP, error=RuntimeError("mine"))


# --- figures --------------------------------------------------------------------------------------


def bench_of(**changes: Any) -> Measured:
    facts = {
        "model": {
            "path": "m", "architecture": "llama", "parameters": 10, "trainable": 2, "fine_tune_type": "lora",
            "layers": 4, "trained_layers": 2, "lora_parameters": {"rank": 8}, "dtype": "float32",
            "load_in_4bit": False, "grad_checkpoint": False, "way": "shared",
        },
        "objective": [{"name": "dpo"}], "optimizer": "adamw",
        "rows": {"said": "made up", "prompts": [5, 7], "responses": [[3, 4], [9, 3]]},
        "plan": {"micro_batches": 1, "micro_batch_tokens": 8192, "steps": 3, "shapes": 1, "padded": 1.25},
        "device": {"backend": "mlx", "kind": "cpu"}, "versions": {"python": "3", "platform": "p", "mlx": "1"},
        "commit": None,
    }  # fmt: skip
    found = Measured(
        contestants={
            STEP: Contestant((3.0, 2.0, 1.0), above=10**9, flops=8e9, padded=1.25),
            SFT: Contestant((4.0, 6.0, 5.0), above=3 * 10**9, padded=1.5),
            REFERENCE: Contestant((0.5, 0.5, 0.7), above=0, flops=2e9),
        },
        rates=(8e9, 9e9, 7e9), weights=2 * 10**9, agreement=2e-6, pairs=4, tokens=1000, notes=("a note",), facts=facts,
    )  # fmt: skip
    return replace(found, **changes)


def test_the_table_counted_by_hand() -> None:
    head, rows = table(bench_of())
    assert head == ["", STEP, SFT, REFERENCE]
    assert {row[0].strip(): row[1:] for row in rows} == {
        "seconds, median of 3": [2.0, 5.0, 0.5],
        "fastest": [1.0, 4.0, 0.5],
        "slowest": [3.0, 6.0, 0.7],
        "seconds per pair": [0.5, 1.25, 0.125],
        "tokens/s": [500, 200, 2000],
        "time, × the step's": [1.0, 2.5, 0.25],
        "peak memory above weights, GB": [1.0, 3.0, 0.0],
        "peak memory in all, GB": [3.0, 5.0, 2.0],
        "padded ÷ real tokens": [1.25, 1.5, None],
        "share of the matmul rate": [0.5, None, 0.5],
    }


def test_what_is_not_measured_has_no_line() -> None:
    alone = {STEP: Contestant((2.0,))}
    found = bench_of(contestants=alone, rates=(), agreement=None)
    names = [row[0] for row in table(found)[1]]
    assert not [name for name in names if "memory" in name or "share" in name or "padded" in name]
    assert not {"matmul rate", "gradient agreement", "commit"} & {name for name, _ in lines(found)}
    assert ("note", "a note") in list(lines(found))
    assert as_dict(found)["matmul_rate"] is None


def test_lines_say_what_was_trained_on_what() -> None:
    said = dict(lines(bench_of()))
    assert "rank 8 in the last 2 of 4 layers" in said["trains"]
    assert "prompts 5–7, responses 3–9" in said["rows"]
    assert "8 GFLOP/s" in said["matmul rate"] and "2.0e-06" in said["gradient agreement"]


def test_json_holds_every_figure() -> None:
    found = json.loads(json.dumps(as_dict(bench_of())))
    assert found["contestants"][SFT]["times_the_step"] == 2.5
    assert found["contestants"][STEP]["matmul_share"] == 0.5
    assert found["matmul_rate"] == 8e9 and found["model"]["path"] == "m"


def test_agreement_is_relative_and_sees_every_parameter() -> None:
    one = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([4.0], np.float32)}
    other = {"a": np.array([3.0, 0.5], np.float32), "b": np.array([4.0], np.float32)}
    assert measuring._apart(other, one) == pytest.approx(0.1)
    assert measuring._apart(one, one) == 0.0
    with pytest.raises(ValueError, match="other parameters"):
        measuring._apart({"a": one["a"]}, one)


def test_padding_is_counted_by_position() -> None:
    """Two rows, prompts 5 and 4, of which 3 are shared: 2 × 3, and rows of 5 - 3 + n - 1 in two shelves."""

    def ids(n: int) -> np.ndarray:
        return np.zeros(n, np.int32)

    rows = (Tokenized(ids(5), (ids(4), ids(2)), "a"), Tokenized(ids(4), (ids(6), ids(1)), "b"))
    shelves = tuple(SimpleNamespace(inputs=np.zeros((2, width))) for width in (8, 8))
    part = SimpleNamespace(prompts=np.zeros((2, 3)), shelves=shelves, place=np.zeros((2, 2, 6)))
    subject: Any = SimpleNamespace(batch=SimpleNamespace(parts=[part]), rows=rows)
    real = 2 * 3 + (2 + 3) + (2 + 1) + (1 + 5) + (1 + 0)
    assert measuring._padded(subject) == (6 + 32) / real


def test_a_configuration_is_left_with_its_steps_alone() -> None:
    config = check_config(
        {
            "model": {"path": "m"}, "data": {"source": "d", "valid_fraction": 0.1},
            "training": {"iters": 5, "steps_per_eval": 10, "best_metric": "eval_loss", "early_stopping": 2},
        }
    )  # fmt: skip
    alone = for_steps_alone(config)
    assert alone.data.valid_fraction is None and alone.training.iters is None and alone.training.epochs == 1.0
    check_config({**alone.as_dict(), "data": {"source": "d"}})


def test_the_batch_is_the_median_of_whole_ones() -> None:
    from mlxpref.bench import subject

    rows = [Tokenized(np.zeros(n, np.int32), (np.zeros(1, np.int32),) * 2, str(n)) for n in (9, 1, 5, 7, 3, 99)]
    steps = tuple((SimpleNamespace(rows=of_step),) for of_step in ((0, 1), (2, 3), (1, 4), (5,)))
    plan: Any = SimpleNamespace(steps=steps)
    assert subject._median(rows, plan) == 0  # 10 of 4, 10, 12 tokens; the last step holds one row


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.main, ["bench", *words])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--shape", "uf"], "--model"),
        (["--model", "m", "--data", "d", "--shape", "uf"], "--data and --shape"),
        (["--model", "./nowhere"], "no such folder"),
        (["--model", "m", "--set", "batching.batch_sice=2"], "batch_size"),
        (["-c", "nowhere.yaml"], "nowhere.yaml"),
        (["--model", "m", "--backend", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_measured_is_one_message(words: list[str], says: str) -> None:
    ran = run(*words)
    assert ran.exit_code in (1, 2) and not ran.stdout, ran.output
    assert says in ran.stderr and ran.stderr.count("error: ") == 1


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("content", "says"),
    [('{"prompt": "Hi", "chosen": "Yes."}\n', "rejected"), ("", "data.jsonl"), (None, "data.jsonl")],
    ids=["no pairs", "empty", "no file"],
)
def test_data_without_pairs_are_refused(content: str | None, says: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_text(content)
    ran = run("--model", str(model), "--data", str(file))
    assert ran.exit_code in (1, 2) and says in ran.stderr, ran.output
    assert ran.stderr.count("error: ") == 1


@pytest.mark.mlx
def test_a_bench_of_a_tiny_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way; what is printed is what the JSON has, and no other file is there afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "cache"))
    ran = run("--model", str(model), *SMALL, "--json", "bench.json")
    assert ran.exit_code == 0, ran.output
    assert [path.name for path in tmp_path.rglob("*")] == ["bench.json"]
    found = json.loads(Path("bench.json").read_text())
    assert list(found["contestants"]) == [STEP, SFT, REFERENCE]
    for name, one in found["contestants"].items():
        assert len(one["seconds"]) == 2 and one["memory_above_weights"] > 0, name
        assert one["median"] == statistics.median(one["seconds"])
    assert found["gradient_agreement"] < 1e-4
    assert 0 < found["contestants"][STEP]["matmul_share"] < 1
    assert found["rows"]["prompts"] and max(found["rows"]["prompts"]) <= 80
    shown = next(line for line in ran.stdout.splitlines() if line.startswith("seconds, median of 2"))
    assert f"{found['contestants'][STEP]['median']:.4g}" in shown


@pytest.mark.mlx
def test_a_configuration_and_its_data(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n} " * n, "rejected": "no " * n} for n in range(1, 9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: {model}}}\ndata: {{source: {tmp_path / 'pairs.jsonl'}, valid_fraction: 0.2}}\n"
        "objective: {name: simpo}\nbatching: {batch_size: 2}\ntraining: {steps_per_eval: 5}\n"
        "adapter: {num_layers: 1, lora_parameters: {rank: 2, dropout: 0.1}}\n"
    )
    ran = run("-c", str(tmp_path / "c.yaml"), "--repeats", "1", "--no-sft", "--markdown")
    assert ran.exit_code == 0, ran.output
    printed = [line for line in ran.stdout.splitlines() if line]
    assert printed[0] == f"|  | {STEP} |", "simpo has no reference"
    assert set(printed[1]) <= set("|-: ") and all(line.startswith("| ") and line.endswith(" |") for line in printed)
    assert "the last 1 of 3 layers" in ran.stdout and "first 8 rows" in ran.stdout
    assert "gradient agreement: not taken" in ran.stdout


@pytest.mark.torch
def test_pytorch_has_the_same_table_without_mlx_lms_step(model: Path, tmp_path: Path) -> None:
    ran = run("--model", str(model), *SMALL, "--backend", "torch", "--json", str(tmp_path / "bench.json"))
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["contestants"]) == [STEP, REFERENCE]
    assert found["gradient_agreement"] < 1e-4
    assert found["contestants"][STEP]["matmul_share"] > 0
