"""Parity: what the comparison finds and passes over, what travels between machines, and that the two backends agree.

The faults planted on purpose are in ``scripts/plant_faults.py``; here each must be found.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref import backends, sandbox
from mlxpref.cli import main
from mlxpref.errors import DataError, RunError, UsageError
from mlxpref.parity import Row, Settings, Tolerances, compare_traces
from mlxpref.parity.cases import Case, Model, built_in_models, prepare_case, run_cases, with_fitting_scale
from mlxpref.parity.draws import uniform
from mlxpref.parity.files import ARRAYS, JSON, fingerprint, placed, read_export, write_export
from mlxpref.parity.models import BUILT_IN, weights_of, write_model
from mlxpref.parity.trace import without_experts
from mlxpref.records import Tokenized

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import plant_faults

Arrays = dict[str, np.ndarray]

FEW = {"source": str(sandbox.TEST), "limit": 4, "tokenization": {"max_length": 128}}


# --- the comparison, on made arrays ---


def made() -> Arrays:
    """A trace of two parameters, one a thousand times the other, and forty updates."""
    draw = np.random.default_rng(0)
    sizes = {"large.lora_a": 1.0, "small.lora_b": 1e-3}
    start = {name: size * draw.uniform(0.5, 1.0, (8, 4)) for name, size in sizes.items()}
    gradients = {
        name: size * draw.choice([-1, 1], (8, 4)) * draw.uniform(0.1, 1, (8, 4)) for name, size in sizes.items()
    }
    found = {
        "logps.policy": -draw.uniform(0, 9, 300), "logps.reference": -draw.uniform(0, 9, 300),
        "losses": draw.uniform(0, 2, 4),
        "curve.loss": draw.uniform(0, 2, 40), "curve.grad_norm": draw.uniform(1, 2, 40),
        **{f"start.{name}": value for name, value in start.items()},
        **{f"gradients.{name}": value for name, value in gradients.items()},
        **{f"update.{name}": value - 1e-4 * np.sign(gradients[name]) for name, value in start.items()},
        **{f"end.{name}": value - 2e-3 * np.sign(gradients[name]) for name, value in start.items()},
    }  # fmt: skip
    return {name: value.astype(np.float32) for name, value in found.items()}


def beyond(one: Arrays, other: Arrays, tolerances: Tolerances | None = None) -> set[str]:
    return {row.quantity for row in compare_traces(one, other, tolerances) if not row.ok}


def test_equal_traces_differ_nowhere() -> None:
    rows = compare_traces(made(), made())
    assert [(row.largest, row.mean, row.ok) for row in rows] == [(0.0, 0.0, True)] * len(rows)


@pytest.mark.parametrize(
    ("name", "gap", "quantity"),
    [("curve.loss", 5e-4, "loss curve"), ("logps.policy", 5e-5, "policy log-probs (nats)")],
)
def test_a_one_sided_drift_within_tolerance_is_found(name: str, gap: float, quantity: str) -> None:
    """Rounding goes both ways: the same differences with alternating signs are none."""
    one, drifting, rounded = made(), made(), made()
    drifting[name] += np.float32(gap)
    rounded[name] += np.float32(gap) * np.where(np.arange(len(one[name])) % 2, 1, -1).astype(np.float32)
    assert beyond(one, drifting) == {quantity}
    assert beyond(one, rounded) == set()


def test_each_tensor_is_measured_by_its_own_size() -> None:
    """A small tensor that is all wrong is less than the rounding of a large one."""
    other = made()
    other["gradients.small.lora_b"] *= np.float32(1.001)
    (row,) = [row for row in compare_traces(made(), other) if not row.ok]
    assert row.quantity == "gradients, relative" and row.where == "small.lora_b"
    assert row.largest == pytest.approx(1e-3, rel=1e-3)


def test_a_tensor_without_gradient_is_not_measured_by_its_rounding() -> None:
    one, other = made(), made()
    one["gradients.small.lora_b"] *= np.float32(1e-9)
    other["gradients.small.lora_b"] *= np.float32(-1e-9)
    assert beyond(one, other) == set()


def test_an_entry_whose_gradient_is_rounding_may_move_to_either_side() -> None:
    """Adam makes a whole step of a gradient of any size. Half of every step missing is another matter."""
    one, other = made(), made()
    for side, sign in ((one, 1), (other, -1)):
        side["gradients.large.lora_a"][0, 0] = sign * 1e-6
        side["update.large.lora_a"][0, 0] = side["start.large.lora_a"][0, 0] - sign * 1e-4
    assert beyond(one, other) == set()
    for name in ("large.lora_a", "small.lora_b"):
        other[f"update.{name}"] = (other[f"update.{name}"] + other[f"start.{name}"]) / 2
    assert beyond(one, other) == {"first update, relative"}


def test_a_way_that_ends_elsewhere_is_found_though_the_weights_are_large() -> None:
    one, other = made(), made()
    for side, share in ((one, 1.0), (other, 0.95)):
        start = side["start.large.lora_a"]
        side["end.large.lora_a"] = start - np.float32(2e-3 * share)
    assert beyond(one, other) == {"way of the adapter, relative"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_beyond(value: float) -> None:
    """NaN compares false with any tolerance."""
    for name in ("logps.reference", "gradients.small.lora_b", "curve.loss", "end.large.lora_a"):
        other = made()
        other[name].flat[3] = value
        assert beyond(made(), other), name


def test_tolerances_are_those_given() -> None:
    other = made()
    other["logps.policy"][::2] += 2e-4
    other["logps.policy"][1::2] -= 2e-4
    assert beyond(made(), other) == {"policy log-probs (nats)"}
    assert not beyond(made(), other, Tolerances(logps=1e-3))


def test_losses_of_hundreds_of_thousands_may_differ_in_their_last_bits() -> None:
    """Float32 has no number between 250000 and 250000.016; a thousandth of them is another matter."""
    one, other = made(), made()
    for name in ("losses", "curve.loss"):
        one[name] += np.float32(250_000)
        other[name] = one[name] + np.float32(0.0156) * (np.arange(len(one[name])) % 2).astype(np.float32)
    assert beyond(one, other) == set()
    for name in ("losses", "curve.loss"):
        other[name] = one[name] * np.float32(1.001)
    assert beyond(one, other) == {"losses of the first batch", "loss curve"}


def test_what_one_side_alone_shares_is_held_against_the_others_plain() -> None:
    one = made()
    one["logps.policy.shared"] = one["logps.policy"] + np.float32(1e-3)
    one |= {f"gradients.shared.{name}": 2 * made()[f"gradients.{name}"] for name in ("large.lora_a", "small.lora_b")}
    found = {"policy log-probs, prompts shared (nats)", "gradients, prompts shared, relative"}
    assert beyond(one, made()) == beyond(made(), one) == found


def test_other_parameters_are_refused() -> None:
    other = made()
    other["start.more.lora_a"] = other["start.large.lora_a"]
    with pytest.raises(RunError, match=r"cannot be compared, 1 arrays .*start\.more\.lora_a"):
        compare_traces(made(), other)
    other = made()
    other["logps.policy"] = other["logps.policy"][:-1]
    with pytest.raises(RunError, match=r"logps\.policy"):
        compare_traces(made(), other)


# --- what both sides start from ---


def test_draws_are_the_same_bits_everywhere() -> None:
    """Weights made on a Mac and on a CUDA box must have one fingerprint: no logarithm, no sine, no order."""
    drawn = uniform("name", (2, 2), deviation=1.0, seed=3)
    assert [value.hex() for value in drawn.ravel().tolist()] == DRAWN
    assert np.array_equal(uniform("name", (1000, 40), deviation=1.0, seed=3).ravel()[:4], drawn.ravel())
    many = uniform("other", (1000, 40), deviation=0.5, seed=0)
    assert abs(many.mean()) < 0.01 and many.std() == pytest.approx(0.5, rel=0.01)


DRAWN = ["-0x1.f475360000000p-1", "-0x1.6604dc0000000p-1", "0x1.4628920000000p-2", "-0x1.5095ba0000000p-1"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_weights_are_the_same_bits_everywhere(name: str) -> None:
    digest = hashlib.sha256()
    for tensor, value in sorted(weights_of(name).items()):
        digest.update(tensor.encode() + value.astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == WEIGHTS[name]


WEIGHTS = {
    "llama": "177b2aa69c6f288d",
    "qwen2": "fd674c0e1c88fb94",
    "qwen3": "18782680046577e1",
    "gemma2": "8d0a370385680dd5",
    "phi3": "df243572443e0b6c",
    "mixtral": "ad8b499b35668e21",
}


@pytest.mark.torch
@pytest.mark.parametrize("name", BUILT_IN)
def test_transformers_reads_every_weight_of_a_built_in_model(name: str, tmp_path: Path) -> None:
    """A name the hub does not use would leave a layer at its random start, or be passed over."""
    transformers = pytest.importorskip("transformers")
    folder = write_model(name, tmp_path / name)
    _, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_experts_are_left_out_unless_they_are_named() -> None:
    config, settings = {"num_local_experts": 4}, Settings()
    keys = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert without_experts(config, settings).lora_parameters["keys"] == keys
    named = replace(settings, lora_parameters={"rank": 2, "scale": 1.0, "keys": ["self_attn.q_proj"]})
    assert without_experts(config, named) == named
    assert without_experts({"hidden_size": 8}, settings) == settings


# --- between machines ---


def made_case(model: Model, *, objective: str = "kto") -> Case:
    ids = np.arange(5, dtype=np.int32)
    row = Tokenized(
        ids, (ids[:3], ids[1:]), "a", scores=(2.0, 1.0), goal=10.0, half="chosen", weight=0.5,
        extras={"groups": 1, "attributes": ((1.0, 2.0), (3.0, 4.0)), "name": np.float32(0.5)},
        texts={"mismatched": (ids[2:],)}, response_cut=(0, 1), leads=(ids[:0], ids[:1], ids[:0]),
    )  # fmt: skip
    other = replace(row, example_id="b", goal={"content": 1.0}, scores=None, half=None)
    settings = Settings(objective=objective, steps=3).resolved()
    told = {"way": "plain"}
    return Case(model, settings, (row, other), 2, fingerprint=fingerprint(model), told=told)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return built_in_models(tmp_path_factory.mktemp("models"), ["llama"])[0]


@pytest.fixture
def exported(llama: Model, tmp_path: Path) -> Path:
    cases = [(made_case(llama), made()), (made_case(llama, objective="dpo"), made())]
    write_export(tmp_path / "export", cases, {"backend": "mlx_backend"})
    return tmp_path / "export"


def test_an_export_is_read_as_it_was_written(exported: Path, llama: Model) -> None:
    found = read_export(exported)
    assert found.facts == {"backend": "mlx_backend"}
    assert len(json.loads((exported / JSON).read_text())["rows"]) == 1, "rows that both cases have are written once"
    for index, objective in enumerate(("kto", "dpo")):
        written, read = made_case(llama, objective=objective), found.cases[index]
        assert replace(read, rows=()) == replace(written, rows=())
        for ours, theirs in zip(written.rows, read.rows, strict=True):
            assert repr(theirs).replace("'name': 0.5", "'name': np.float32(0.5)") == repr(ours)
        arrays = found.arrays(index)
        assert arrays.keys() == made().keys()
        assert all(np.array_equal(arrays[name], value) for name, value in made().items())


def test_an_occupied_folder_is_left_alone(exported: Path, llama: Model) -> None:
    before = (exported / JSON).read_bytes()
    with pytest.raises(RunError, match="not empty"):
        write_export(exported, [(made_case(llama), made())], {})
    assert (exported / JSON).read_bytes() == before


def test_numbers_that_are_not_finite_are_not_exported(llama: Model, tmp_path: Path) -> None:
    arrays = made()
    arrays["curve.loss"][2] = np.nan
    with pytest.raises(RunError, match=r"llama, kto: curve.loss is not finite"):
        write_export(tmp_path / "export", [(made_case(llama), arrays)], {})
    assert not list(tmp_path.iterdir())


def _cut(folder: Path) -> None:
    content = (folder / ARRAYS).read_bytes()
    (folder / ARRAYS).write_bytes(content[:-4])


def _flip(folder: Path) -> None:
    content = bytearray((folder / ARRAYS).read_bytes())
    content[-1] ^= 1
    (folder / ARRAYS).write_bytes(bytes(content))


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = {**json.loads((folder / JSON).read_text()), **changes}
        (folder / JSON).write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "damaged or cut off"),
        (_flip, "damaged or cut off"),
        (lambda folder: (folder / ARRAYS).unlink(), f"no {ARRAYS}"),
        (lambda folder: (folder / JSON).write_text("{"), "not an export of parity, or damaged"),
        (_edit(version=2), "version 2, and this mlxpref reads mlxpref-parity version 1"),
        (_edit(format="other"), "other version 1"),
        (_edit(rows=[]), "damaged"),
        (_edit(cases=[{"model": {}}]), "damaged"),
    ],
)
def test_what_is_no_whole_export_is_refused(exported: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(exported)
    with pytest.raises(DataError, match=said):
        read_export(exported)


def test_models_are_found_by_their_weights(exported: Path, llama: Model, tmp_path: Path) -> None:
    """A folder of the same name with other weights would be compared, and every figure beyond its tolerance."""
    export = read_export(exported)

    def built_in(name: str) -> Model:
        raise AssertionError("given, so not written anew")

    moved = Model("elsewhere", str(write_model("llama", tmp_path / "moved")))
    assert [case.model.path for case in placed(export, [moved], built_in)] == [moved.path] * 2
    other = Model("other", str(write_model("llama", tmp_path / "other", seed=1)))
    with pytest.raises(RunError, match=f"not the model of the export.*{fingerprint(other)}"):
        list(placed(export, [], lambda name: other))
    with pytest.raises(RunError, match=r"other: none of the export's models has these weights; leave it out"):
        list(placed(export, [llama, other], built_in))
    gone = replace(export, cases=(replace(export.cases[0], model=Model("mine", str(tmp_path / "gone"))),))
    with pytest.raises(RunError, match="gone is not here"):
        list(placed(gone, [other], built_in))


# --- from the command line ---


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["parity", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backends", "mlx"], "two, with a comma"),
        (["--backends", "mlx,torch", "--export", "out"], "one needed"),
        (["--export", "out", "--against", "in"], "give one of them"),
        (["--against", "in", "--steps", "3"], "leave out --steps"),
        (["--against", "in", "--no-relabel"], "leave out --no-relabel"),
        (["--limit", "3"], "need --data"),
        (["--export", "out", "--tolerance", "logps=1e-3"], "are for a comparison"),
        (["--tolerance", "logps=much"], "write NAME=X"),
        (["--tolerance", "speed=1"], "NAME one of adapters"),
        (["--objective", "dbo", "--backends", "mlx,mlx"], "did you mean dpo"),
        (["--backends", "mlx,jax"], "no backend is called 'jax'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], said: str) -> None:
    ran = run(*arguments)
    assert ran.exit_code == 2 and said in ran.output, ran.output


@pytest.mark.mlx
def test_exported_here_and_checked_there(llama: Model, tmp_path: Path) -> None:
    """The same backend again is the same to the last bit; a tolerance below rounding's is exceeded."""
    settings = ["--objective", "kto", "--steps", "2", "--data", sandbox.TEST, "--limit", "3", "--batch-size", "2"]
    ran = run(llama.path, "--backends", "mlx", "--export", tmp_path / "out", *settings)
    assert ran.exit_code == 0, ran.output
    ran = run("--backends", "mlx", "--against", tmp_path / "out", "--json", tmp_path / "figures.json")
    assert ran.exit_code == 0, ran.output
    assert "1 case: the two agree" in ran.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ok"] and {row["largest"] for row in figures["cases"][0]["quantities"]} == {0.0}
    assert [side["backend"] for side in figures["sides"]] == ["mlx_backend"] * 2
    export = read_export(tmp_path / "out")
    arrays = export.arrays(0)
    arrays["logps.policy"][::2] += 0.5
    write_export(tmp_path / "wrong", [(export.cases[0], arrays)], export.facts)
    ran = run("--backends", "mlx", "--against", tmp_path / "wrong")
    assert ran.exit_code == 1 and "BEYOND" in ran.output, ran.output


# --- the two backends, and faults in one of them ---


def traced(backend: Any, case: Case) -> Arrays:
    ((_, arrays),) = run_cases(backend, [case])
    return arrays


def case_of(name: str, folder: Path, settings: Mapping[str, Any]) -> Case:
    (model,) = built_in_models(folder, [name])
    (case,) = with_fitting_scale(backends.get("mlx"), [prepare_case(model, Settings(**settings), FEW)])
    return case


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma2", {"objective": "kto", "steps": 3}),
        ("mixtral", {"objective": "simpo", "steps": 3, "optimizer": "sgd", "weight_decay": 0.0, "learning_rate": 1e-2}),
    ],
)
def test_the_backends_agree(name: str, settings: Mapping[str, Any], tmp_path: Path) -> None:
    case = case_of(name, tmp_path, settings)
    rows = compare_traces(traced(backends.get("mlx"), case), traced(backends.get("torch"), case))
    assert not [row for row in rows if not row.ok]
    assert any(row.largest for row in rows), "independent implementations do not agree to the last bit"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Arrays]:
    settings = {"objective": plant_faults.OBJECTIVE, "steps": 3}
    case = case_of("llama", tmp_path_factory.mktemp("models"), settings)
    return case, traced(backends.get("mlx"), case)


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize("fault", ["none", *plant_faults.FAULTS])
def test_a_planted_fault_is_found(fault: str, sound: tuple[Case, Arrays]) -> None:
    """A comparison that passes whatever one side computes; and one that fails without a fault."""
    case, arrays = sound
    plant = plant_faults.FAULTS.get(fault, lambda backend: backend)
    rows: list[Row] = plant_faults.found_by(arrays, plant(backends.get("torch")), case)
    assert any(not row.ok for row in rows) == (fault != "none"), rows[0]


def test_full_fine_tuning_is_refused() -> None:
    from mlxpref.parity import open_policy

    with pytest.raises(UsageError, match="lora or dora"):
        open_policy(None, "model", Settings(fine_tune_type="full"))
