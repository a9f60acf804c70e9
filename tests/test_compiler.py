"""MLX on a CPU where kernels cannot be compiled. Each machine is a process with its own path and temp folder.

Finds: a run that fails at its first compiled function for want of a compiler, one that is slow and does
not say why, and a compiler that is there and not used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled by g++ on Linux"),
]

BARE = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.eval(mx.compile(lambda x: mx.sin(x) * x + 2)(mx.ones((3,))))
"""
"""MLX alone: what would happen without us."""

SETTLED = """
import json
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlxpref.mlx_backend import compiler
found = compiler.prepare()
value = mx.compile(lambda x: mx.sin(x) * x + 2)(mx.ones((3,)))
assert compiler.prepare() is found
print(json.dumps([found.compiled, found.said, found.remedy, value.tolist()]))
"""

Environ = Mapping[str, str]


def python(*args: str, environ: Environ, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "MLX_DISABLE_COMPILE"}
    run = [*before, sys.executable, *args]
    return subprocess.run(run, env={**clean, **environ}, capture_output=True, text=True, check=False)


def without_roots_rights() -> list[str]:
    """What to put before a command so that root, too, may write only where the bits say so."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere")
    return ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]


def fake_compiler(folder: Path, script: str) -> Path:
    """A folder with a ``g++`` that answers to --version and does ``script`` when asked to compile."""
    folder.mkdir()
    (folder / "g++").write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    (folder / "g++").chmod(0o755)
    return folder


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Environment of a machine on which kernels cannot be compiled, for a reason by name."""
    empty, temporary = tmp_path / "empty", tmp_path / "temporary"
    empty.mkdir()
    temporary.mkdir()

    def make(reason: str) -> dict[str, str]:
        if reason == "no g++":
            return {"PATH": str(empty), "TMPDIR": str(temporary)}
        if reason == "broken g++":
            broken = fake_compiler(tmp_path / "broken", "echo 'g++: cannot execute cc1plus' >&2; exit 1")
            return {"PATH": str(broken), "TMPDIR": str(temporary)}
        if reason == "library refused":  # as on a disk that lets no program run
            broken = fake_compiler(tmp_path / "empty library", 'while [ "$1" != -o ]; do shift; done; : > "$2"')
            return {"PATH": str(broken), "TMPDIR": str(temporary)}
        assert reason == "no temporary folder"
        return {"TMPDIR": str(tmp_path / "nowhere")}

    return make


@pytest.mark.parametrize("reason", ["broken g++", "library refused", "no temporary folder"])
def test_mlx_alone_fails_there(reason: str, machine: Callable[[str], dict[str, str]]) -> None:
    """The witness: if MLX copes by itself one day, this says that the module can go."""
    ran = python("-c", BARE, environ=machine(reason))
    assert ran.returncode != 0 and "RuntimeError" in ran.stderr, ran.stderr


@pytest.mark.parametrize(
    ("reason", "says", "remedy"),
    [
        ("no g++", "no g++ on the path", "apt install g++"),
        ("broken g++", "cannot execute cc1plus", "apt install g++"),
        ("library refused", "too short", "TMPDIR"),
        ("no temporary folder", "temp_directory_path", "TMPDIR"),
    ],
)
def test_it_goes_on_without_and_says_why(
    reason: str, says: str, remedy: str, machine: Callable[[str], dict[str, str]]
) -> None:
    ran = python("-c", SETTLED, environ=machine(reason))
    assert ran.returncode == 0, ran.stderr
    compiled, said, mend, value = json.loads(ran.stdout)
    assert not compiled
    assert says in said and remedy in mend
    assert value == pytest.approx([2 + np.sin(1)] * 3, rel=1e-6)


def test_a_compiler_that_works_is_used(tmp_path: Path) -> None:
    """Switched off for nothing, every step would be slower, without a word."""
    if python("-c", BARE, environ={"TMPDIR": str(tmp_path)}).returncode:
        pytest.skip("MLX cannot compile kernels here")
    if not list(tmp_path.rglob("*.so")):
        pytest.skip("there is no g++ here")
    before = set(tmp_path.rglob("*.so"))
    ran = python("-c", SETTLED.replace("sin(x)", "cos(x)"), environ={"TMPDIR": str(tmp_path)})
    compiled, said, remedy, _ = json.loads(ran.stdout)
    assert compiled and remedy is None and str(tmp_path) in said
    assert len(set(tmp_path.rglob("*.so")) - before) == 2, "the trial's kernel and the function's"


def test_kernels_of_another_user_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    """The trial finds its kernel there already, and the next kernel cannot be written."""
    python("-c", SETTLED, environ={"TMPDIR": str(tmp_path)})
    folder = next(tmp_path.rglob("cpu"), None)
    if folder is None:
        pytest.skip("there is no g++ here")
    folder.chmod(0o555)
    try:
        code = SETTLED.replace("sin(x)", "tanh(x)")
        ran = python("-c", code, environ={"TMPDIR": str(tmp_path)}, before=without_roots_rights())
    finally:
        folder.chmod(0o755)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)[0] is False


TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")


@pytest.mark.parametrize("name", TEMPORARY)
def test_the_folder_named_is_where_kernels_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds: a variable that C++ reads left out, or another order. A wrong folder would be said to the user,
    and it, not the one MLX writes to, would be tried for the right to write."""
    environ = {}
    for other in TEMPORARY:
        monkeypatch.delenv(other, raising=False)
        (tmp_path / other).mkdir()
        if TEMPORARY.index(other) >= TEMPORARY.index(name):
            environ[other] = str(tmp_path / other)
    ran = python("-c", SETTLED + "print(compiler.kernel_folder())\n", environ=environ)
    assert ran.returncode == 0, ran.stderr
    made = {file.parent for file in tmp_path.rglob("*.so")}
    if not made:
        pytest.skip("there is no g++ here")
    assert [str(folder) for folder in made] == ran.stdout.splitlines()[-1:]
    assert tmp_path / name in next(iter(made)).parents


def test_the_users_own_switch_is_said_and_left_alone(tmp_path: Path) -> None:
    ran = python("-c", SETTLED, environ={"TMPDIR": str(tmp_path), "MLX_DISABLE_COMPILE": "1"})
    compiled, said, remedy, _ = json.loads(ran.stdout)
    assert not compiled and "MLX_DISABLE_COMPILE" in said and remedy is None


# --- the whole way -----------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Write story {i}.", "chosen": "The cat said hello. " * (1 + i % 3), "rejected": "A dog.",
            "score_chosen": 9, "score_rejected": 2 + i % 3,
        }
        for i in range(8)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train(run: Path, model: Path, pairs: Path, environ: Environ) -> subprocess.CompletedProcess[str]:
    command = ["-m", "mlxpref", "train", "--model", str(model), "--data", str(pairs), "--relabel"]
    command += ["--adapter-path", str(run), "--iters", "3", "--num-layers", "2", "--learning-rate", "1e-3"]
    command += ["--set", f"reference.store={run.parent / 'store'}"]
    ran = python(*command, environ=environ)
    assert ran.returncode == 0, ran.stderr
    return ran


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["no g++", "broken g++"])
def test_train_evaluate_and_generate_without_a_compiler(
    reason: str, machine: Callable[[str], dict[str, str]], tiny_model_dir: Path, pairs: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    without, run = machine(reason), tmp_path / "run"
    said = train(run, tiny_model_dir, pairs, without).stderr
    assert "kernels: not compiled" in said and "apt install g++" in said
    for command in (["evaluate", str(pairs)], ["generate", "Write a story.", "--max-tokens", "4"]):
        ran = python("-m", "mlxpref", *command, "--adapter-path", str(run), environ=without)
        assert ran.returncode == 0, ran.stderr
    other = tmp_path / "with"
    assert "not compiled" not in train(other, tiny_model_dir, pairs, {}).stderr
    one, two = (load_file(folder / "adapters.safetensors") for folder in (run, other))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-5, err_msg=name)
    facts = json.loads((run / "run.json").read_text())["starts"][-1]["device"]
    assert facts["kernels"].startswith("not compiled")


@pytest.mark.slow
def test_train_says_that_its_blas_is_slow(tiny_model_dir: Path, pairs: Path, tmp_path: Path) -> None:
    ran = train(tmp_path / "run", tiny_model_dir, pairs, {"MLXPREF_BLAS": "off"})
    assert "BLAS MLX's reference BLAS" in ran.stdout
    assert "unset MLXPREF_BLAS" in ran.stderr
