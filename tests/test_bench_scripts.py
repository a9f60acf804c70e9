"""What the benchmarks report is what was measured: same ids for all, gradients compared, peers skipped by name."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench_run  # noqa: E402 - found once scripts/ is on the path
import bench_step  # noqa: E402 - found once scripts/ is on the path
from bench import cases, contestants, measuring, model, pairs, tables  # noqa: E402 - found once scripts/ is on the path
from bench.flops import minimum_flops  # noqa: E402 - found once scripts/ is on the path
from bench.pairs import Lengths  # noqa: E402 - found once scripts/ is on the path
from bench.picture import alt_text  # noqa: E402 - found once scripts/ is on the path
from bench.worker import WITNESS_FILE, Task  # noqa: E402 - found once scripts/ is on the path

QUICK = cases.Setting(model.TINY, "tiny", repeats=1, warm_up=1, rest=0.0)
PEERS = {"mlx": ("mlx-lm-lora", "mlx-tune"), "torch": ("mlxpref-torch", "trl", "trl-precomputed")}


# --- what is measured ---


@pytest.fixture(scope="module")
def quick_case(tmp_path_factory: pytest.TempPathFactory) -> cases.Case:
    return cases.run_case(QUICK, ["mlxpref", "plain"], tmp_path_factory.mktemp("case"))


@pytest.mark.mlx
@pytest.mark.slow
def test_ours_and_the_plain_step_have_one_gradient(quick_case: cases.Case) -> None:
    """Other ids, another LoRA start or another loss on either side would show here first."""
    agreement = quick_case.measured["mlxpref"].agreement
    assert agreement is not None and 0 < agreement < 1e-5
    assert quick_case.disagreeing == []


@pytest.mark.mlx
@pytest.mark.slow
def test_a_case_has_times_memory_and_every_derived_figure(quick_case: cases.Case) -> None:
    ours, plain = (quick_case.measured[name] for name in ("mlxpref", "plain"))
    assert len(ours.wall) == len(ours.cpu) == len(ours.other["rate"]) == QUICK.repeats
    assert 0 < ours.above < ours.peak[0]
    assert plain.facts["reference"] > 0 and ours.facts["reference"] == 0  # a second model, and none
    assert {"reference_pass", "padded", "matmul_share", "agreement"} <= quick_case.derived.keys()
    assert json.loads(json.dumps(quick_case.as_json()))["measured"]["mlxpref"]["wall_median"] == ours.wall[0]
    assert "mlxpref" in alt_text([quick_case])


@pytest.mark.mlx
@pytest.mark.slow
@pytest.mark.parametrize("group", PEERS)
def test_peers_make_the_step_that_is_compared(group: str, tmp_path: Path) -> None:
    """A peer that reads other tokens, another reference or another start has another gradient."""
    names, missing = cases.present(PEERS[group])
    if not names:
        pytest.skip("; ".join(missing))
    case = cases.run_case(QUICK, names, tmp_path)
    assert case.skipped == [] and case.disagreeing == []
    for name in names:
        assert case.measured[name].agreement is not None and case.measured[name].above > 0, name


# --- gradients that differ ---


def _planted(scale: float) -> Any:
    """A measurement in which every contestant's gradient is the witness's times a number."""

    def measure(tasks: list[Task], folder: Path, *_: Any, **__: Any) -> dict[str, measuring.Measured]:
        gradient = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
        for task in tasks:
            own = 1.0 if task.contestant == cases.WITNESS else scale
            assert task.gradients is not None
            np.savez(task.gradients, a=gradient * own, b=gradient.T * own)
        np.savez(folder / WITNESS_FILE, a=gradient.astype(float), b=gradient.T.astype(float))
        facts = {"weights": 1e6, "padding": 0.1, "slots": 3, "tokens": 2}
        one = {"wall": [1.0], "cpu": [1.0], "peak": [2e6], "facts": facts}
        other = {"wall_per_pair": [0.1], "rate": [1e9]}
        return {task.contestant: measuring.Measured(task.contestant, **one, other=other) for task in tasks}

    return measure


@pytest.mark.parametrize(("scale", "code"), [(1.01, 1), (1.0, 0)])
def test_a_gradient_one_per_cent_off_is_reported(
    scale: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "measure", _planted(scale))
    monkeypatch.setattr(bench_step, "present", lambda names: (list(names), []))
    arguments = ["--quick", "--peers", "mlxpref,plain", "--out", str(tmp_path)]
    assert bench_step.main(arguments) == code
    (case,) = json.loads((tmp_path / "bench_step.json").read_text())["cases"]
    assert case["disagreeing"] == (["mlxpref"] if code else [])
    assert case["derived"]["agreement"] == pytest.approx(scale - 1, rel=1e-4, abs=1e-7)
    assert ("DISAGREES" in capsys.readouterr().out) == bool(code)
    assert (tmp_path / "bench_step.png").read_bytes().startswith(b"\x89PNG")


def test_gradients_of_other_names_never_agree(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", a=np.ones(3))
    np.savez(tmp_path / "two.npz", a=np.ones(3), b=np.zeros(3))
    assert measuring.disagreement(tmp_path / "one.npz", tmp_path / "two.npz") == float("inf")


# --- who is there ---


def test_a_missing_peer_is_skipped_by_name_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def distribution(name: str) -> None:
        if name in ("mlx-lm-lora", "mlx-tune"):
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(contestants.metadata, "distribution", distribution)
    monkeypatch.setattr(contestants.metadata, "version", lambda name: "1")
    monkeypatch.setattr(cases, "measure", _planted(1.0))
    assert bench_step.main(["--quick", "--peers", "mlx-lm-lora,plain,mlx-tune,mlxpref", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "mlx-lm-lora is skipped: mlx-lm-lora not installed (pip install 'mlxpref[bench]')" in said
    assert "mlx-tune is skipped: mlx-tune not installed (pip install --no-deps 'mlx-tune>=0.6.0'" in said
    (case,) = json.loads((tmp_path / "bench_step.json").read_text())["cases"]
    assert set(case["measured"]) == {"plain", "mlxpref"} and len(case["skipped"]) == 2


def test_an_unknown_peer_ends_with_the_names_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_step.main(["--peers", "mlxpref,trll"])
    assert "unknown: trll; one of mlxpref, plain" in capsys.readouterr().err


def test_a_contestant_that_ends_early_says_why(tmp_path: Path) -> None:
    task = Task("nobody", *(str(tmp_path),) * 3)
    with pytest.raises(measuring.Failed, match=r"(?s)nobody ended early.*KeyError: 'nobody'"):
        measuring.Contender(task, tmp_path, measuring.environment(blas="preloaded", threads=1))


def test_a_peer_that_breaks_is_reported_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a release of theirs that moved what is listened to."""
    broken = contestants.TABLE["sft"]._replace(runs="nowhere:nothing")
    told: list[str] = []
    monkeypatch.setitem(contestants.TABLE, "nobody", broken)
    tasks = [Task("nobody", *(str(tmp_path),) * 3)]
    env = measuring.environment(blas="preloaded", threads=1)
    found = measuring.measure(tasks, tmp_path, env, repeats=1, optional={"nobody": told.append})
    assert found == {} and "nobody ended early" in told[0]
    with pytest.raises(measuring.Failed):
        measuring.measure(tasks, tmp_path, env, repeats=1)


def test_all_have_one_blas_and_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_BLAS", "off")
    stock, preloaded = (measuring.environment(blas=blas, threads=3) for blas in ("stock", "preloaded"))
    assert stock["MLXPREF_BLAS"] == "off" and "MLXPREF_BLAS" not in preloaded
    assert {stock[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"3"}


# --- what they read ---


@pytest.mark.parametrize("shape", ["uf", "hh"])
def test_pairs_fill_the_shape_evenly(shape: str) -> None:
    (low_p, high_p), (low_r, high_r) = pairs.SHAPES[shape]
    lengths = pairs.shape_lengths(shape, 4)
    prompts, responses = [one.prompt for one in lengths], [n for one in lengths for n in one[1:]]
    assert low_p <= min(prompts) and max(prompts) <= high_p and np.mean(prompts) == pytest.approx((low_p + high_p) / 2)
    assert sorted(responses) == pytest.approx(np.linspace(low_r, high_r, 17)[1::2], abs=0.51)


def test_lengths_of_a_file_are_its_own_or_cut_to_the_medians(tmp_path: Path) -> None:
    words = np.random.default_rng(0).integers(5, 90, (40, 3))
    rows = [{key: "word " * n for key, n in zip(Lengths._fields, row, strict=True)} for row in words.tolist()]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    own = pairs.file_lengths(file, 40)
    assert sorted(own) == sorted(Lengths(*row) for row in words.tolist())
    cut = pairs.file_lengths(file, 40, like="hh")
    assert np.median([one.prompt for one in cut]) == pytest.approx(128, abs=1)
    assert np.median([n for one in cut for n in one[1:]]) == pytest.approx(60, abs=1)
    with pytest.raises(ValueError, match="39 of 40 pairs have at most"):
        pairs.file_lengths(file, 40, longest=max(one.prompt + max(one[1:]) for one in own) - 1)


def test_texts_that_some_peers_want_are_the_ids_that_others_get(tmp_path: Path) -> None:
    model.write_model(model.TINY, tmp_path)
    tokenizer = model.read_tokenizer(str(tmp_path))
    (pair,) = pairs.make_pairs([Lengths(7, 5, 9)], model.TINY.vocabulary)
    whole = model.text_of(pair.prompt) + model.text_of(pair.chosen) + model.END_TEXT
    assert tokenizer.encode(whole) == [*pair.prompt.tolist(), *pair.chosen.tolist()]


def test_saved_pairs_come_back_in_order(tmp_path: Path) -> None:
    made = pairs.make_pairs(pairs.shape_lengths("tiny", 12), 64)
    pairs.save_pairs(made, tmp_path / "pairs.npz")
    for one, other in zip(made, pairs.load_pairs(tmp_path / "pairs.npz"), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- what is counted ---


def test_minimum_flops_against_a_count_by_hand(tmp_path: Path) -> None:
    """One layer, one pair of a prompt of 3 and responses of 2 and 4 tokens, rank 8, counted product by product."""
    dims = model.Dims(hidden=4, layers=2, heads=2, kv_heads=1, head=2, intermediate=6, vocabulary=10)
    model.write_model(dims, tmp_path)
    read, outputs = 3 + 1 + 3, 1 + 1 + 3  # no response's last token; of the last layer the prompt's last and theirs
    q, kv, o, mlp = 4 * 4, 2 * 4 * 2, 4 * 4, 3 * 4 * 6
    first = 2 * read * ((q + kv) + 2 * (o + mlp))  # nothing below: q, k, v need no gradient of their input
    last = 2 * 2 * (read * kv + outputs * (q + o + mlp))
    # The keys each token sees: in the prompt 1, 2, 3; in responses all of the prompt and what came before.
    seen = [1, 2, 3, 4, 4, 5, 6]
    attention = 3 * 4 * 2 * 2 * (sum(seen) + sum(seen[2:]))
    head = 2 * 2 * 4 * 10 * (2 + 4)
    wide = {"q": 8, "k": 6, "v": 6, "o": 8, "gate": 10, "up": 10, "down": 10}  # in + out of each module
    once_first = 2 * 8 * read * sum(wide.values())
    lora_first = 3 * once_first - 2 * 8 * read * 3 * 4  # again nothing below
    lora_last = 3 * 2 * 8 * (read * (6 + 6) + outputs * (8 + 8 + 30))
    expected = first + last + attention + head + lora_first + lora_last
    assert minimum_flops(tmp_path, [Lengths(3, 2, 4)]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("key", "at", "value", "said"),
    [
        ("step_vs_mlx_lm_lora", ("uf", "preloaded"), 2.5, "≥ 2.50 ok"),
        ("step_vs_mlx_lm_lora", ("hh", "preloaded"), 4.1, "≥ 4.20 MISSED"),
        ("memory_vs_mlx_lm_lora", ("hh", "preloaded"), 0.29, "≤ 0.28 MISSED"),
        ("matmul_share", ("uf", "stock"), 0.5, "≥ 0.75 MISSED"),
        ("matmul_share", ("uf", "preloaded"), 0.5, "≥ 0.45 ok"),
        ("agreement", ("uf", "stock"), float("nan"), "≤ 1.0e-05 MISSED"),
        ("step_vs_mlx_tune", ("uf", "stock"), 3.0, ""),
    ],
)
def test_a_figure_stands_beside_its_bound(key: str, at: tuple[str, str], value: float, said: str) -> None:
    (line,) = [line for line in tables.LINES if line.key == key]
    assert tables.verdict(line, value, *at) == said
    assert said in tables.lines_table({at: {key: value}})


def test_derived_ratios_are_the_right_way_up() -> None:
    def one(name: str, wall: float, above: float) -> measuring.Measured:
        facts = {"weights": 10.0, "reference": 5.0, "padding": 0.2, "slots": 30, "tokens": 20}
        other = {"wall_per_pair": [0.25], "rate": [8.0]}
        return measuring.Measured(name, [wall], [wall], [above + 15.0], facts, 1e-7, other)

    found = {
        "mlxpref": one("mlxpref", 2.0, 100.0), "mlx-lm-lora": one("mlx-lm-lora", 8.0, 400.0),
        "sft": one("sft", 4.0, 300.0), "mlx-tune": one("mlx-tune", 6.0, 1.0),
        "mlxpref-torch": one("mlxpref-torch", 2.0, 1.0), "trl": one("trl", 3.0, 1.0),
        "trl-precomputed": one("trl-precomputed", 2.5, 1.0),
    }  # fmt: skip
    assert cases.derived(found, batch_size=4, flops=12.0) == pytest.approx({
        "step_vs_mlx_lm_lora": 4.0, "memory_vs_mlx_lm_lora": 0.25, "step_vs_sft": 0.5, "step_vs_mlx_tune": 3.0,
        "reference_pass": 0.5, "padded": 1.25, "computed": 1.5, "matmul_share": 0.75, "agreement": 1e-7,
        "torch_vs_trl": 1.5, "torch_vs_trl_precomputed": 1.25, "torch_agreement": 1e-7,
    })  # fmt: skip


# --- whole runs and sweeps ---


@pytest.mark.mlx
@pytest.mark.slow
def test_a_whole_run_is_timed_and_its_padding_said(tmp_path: Path) -> None:
    arguments = ["--quick", "--repeats", "1", "--peers", "mlxpref", "--out", str(tmp_path)]
    assert bench_run.main(arguments) == bench_run.main([*arguments, "--add"]) == 0
    report = json.loads((tmp_path / "bench_run_tiny.json").read_text())
    run, again = report["runs"]["mlxpref"]
    assert again["wall"] != run["wall"]
    with pytest.raises(SystemExit, match=r"is of other runs \(epochs 3\)"):
        bench_run.main([*arguments, "--add", "--epochs", "2"])
    assert run["steps"] == 3 * 2  # as many as mlx-lm-lora makes of two batches
    assert run["padded"] == report["derived"]["run_padded"] > 1
    assert 0 < run["reference_seconds"] < run["wall"]


def test_a_whole_run_without_data_says_what_is_missing() -> None:
    with pytest.raises(SystemExit, match="--data FILE"):
        bench_run.main(["--peers", "mlxpref"])


@pytest.mark.mlx
@pytest.mark.slow
def test_a_sweep_leaves_the_heads_weights_out(tmp_path: Path) -> None:
    assert bench_step.main(["--sweep", "vocabulary", "--quick", "--out", str(tmp_path)]) == 0
    small, large = json.loads((tmp_path / "bench_vocabulary.json").read_text())["points"]
    assert large["head"] == 2 * small["head"] == 4 * 256 * model.TINY.hidden
    assert 0 < large["above"] < 1.5 * small["above"]
