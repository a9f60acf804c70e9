"""``mlxpref merge`` from the command line: what is written, what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mlxpref.cli import main

AT = "model.layers.0.self_attn.q_proj"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["merge", *map(str, arguments)], catch_exceptions=False)


def write(folder: Path, seed: int, recipe: dict[str, Any] | None = None) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    shapes = {"lora_a": (6, 2), "lora_b": (2, 4)}
    arrays = {f"{AT}.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(arrays, folder / "adapters.safetensors")
    lora = {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "model": "owner/name", "num_layers": 1, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"mlxpref": {"recipe": recipe}}))
    return folder


def delta(folder: Path) -> np.ndarray:
    """What an adapter adds to its one weight, float64."""
    arrays = load_file(folder / "adapters.safetensors")
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    a, b = (arrays[f"{AT}.{name}"].astype(np.float64) for name in ("lora_a", "lora_b"))
    return scale * (a @ b).T


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "a", 1), write(tmp_path / "b=2", 2)


def test_as_much_of_each_as_its_weight_says(two: tuple[Path, Path], tmp_path: Path) -> None:
    """The folder of the second has an equals sign in its name."""
    ran = run(f"{two[0]}=0.7", f"{two[1]}=3e-1", "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    assert "lora of rank 4, scale 7, 1 module" in ran.stdout and not ran.stderr
    np.testing.assert_allclose(delta(tmp_path / "out"), 0.7 * delta(two[0]) + 0.3 * delta(two[1]), atol=1e-5)


def test_a_part_of_the_base_is_said(two: tuple[Path, Path], tmp_path: Path) -> None:
    ran = run(f"{two[0]}=0.5", f"{two[1]}=0.2", "--out", tmp_path / "out")
    assert ran.exit_code == 0 and "sum to 0.7: the base model has a weight of 0.3" in ran.stderr


@pytest.mark.parametrize("start", [False, True])
def test_one_is_carried_further(start: bool, two: tuple[Path, Path], tmp_path: Path) -> None:
    more = ["--start", two[1]] if start else []
    ran = run(two[0], "--extrapolate", 0.5, *more, "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    expected = 1.5 * delta(two[0]) - (0.5 * delta(two[1]) if start else 0)
    np.testing.assert_allclose(delta(tmp_path / "out"), expected, atol=1e-5)


def test_a_backward_step_is_read_as_a_number(two: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(two[0], "--extrapolate", "-1", "--out", tmp_path / "out").exit_code == 0
    assert not delta(tmp_path / "out").any()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["A"], "write FOLDER=WEIGHT"),
        (["A=much"], "write FOLDER=WEIGHT"),
        (["=0.5"], "write FOLDER=WEIGHT"),
        (["A=nan"], "finite"),
        (["A=0.5", "--start", "B"], "--start is for --extrapolate"),
        (["A", "B", "--extrapolate", "0.5"], "takes one adapter"),
        (["A", "--extrapolate", "0.5", "--recipe", "B"], "keeps its words"),
        (["A", "--extrapolate", "inf"], "finite"),
        (["A=0.5", "B=0.5", "--recipe", "C"], "name one of"),
        ([], "Missing argument"),
    ],
)
def test_what_is_not_a_merge_is_refused(
    arguments: list[str], says: str, two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two[0].rename(tmp_path / "A")
    two[1].rename(tmp_path / "B")
    monkeypatch.chdir(tmp_path)
    ran = run(*arguments, "--out", "out")
    assert ran.exit_code == 2 and says in ran.stderr, ran.output
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_is_refused_before_anything_is_read(two: tuple[Path, Path], tmp_path: Path) -> None:
    before = (two[1] / "adapters.safetensors").read_bytes()
    ran = run("nowhere=1", "--out", two[1])
    assert ran.exit_code == 1 and "is there already" in ran.stderr
    assert (two[1] / "adapters.safetensors").read_bytes() == before


def test_a_failure_leaves_nothing_behind(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Found while the file is being written: values that are not finite."""
    arrays = load_file(two[0] / "adapters.safetensors")
    arrays[f"{AT}.lora_a"][0, 0] = np.inf
    save_file(arrays, two[0] / "adapters.safetensors")
    before = sorted(tmp_path.iterdir())
    ran = run(f"{two[0]}=0.5", "--out", tmp_path / "out")
    assert ran.exit_code == 1 and f"{AT}.lora_a: not finite" in ran.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_whose_words_for_goals(tmp_path: Path) -> None:
    recipes = [{"carrier": "system"}, {"carrier": "first_user"}]
    a, b = (write(tmp_path / name, seed, recipe) for seed, (name, recipe) in enumerate(zip("ab", recipes, strict=True)))
    ran = run(f"{a}=0.5", f"{b}=0.5", "--out", tmp_path / "out")
    assert ran.exit_code == 1 and "--recipe FOLDER" in ran.stderr and "first_user" in ran.stderr
    assert run(f"{a}=0.5", f"{b}=0.5", "--recipe", b, "--out", tmp_path / "out").exit_code == 0
    facts = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["mlxpref"]
    assert facts["recipe"] == recipes[1]
