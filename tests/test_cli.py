"""The command as a user meets it before any work is done.

Finds: a help that takes seconds because something heavy is imported, a command without an example,
an error that is a traceback, a public name that leads nowhere.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import mlxpref
from mlxpref import cli
from mlxpref.cli import console
from mlxpref.errors import ConfigError, MlxprefError, RunError

HEAVY = ("mlx", "mlx_lm", "torch", "transformers", "datasets", "pyarrow", "pandas", "matplotlib")


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


# --- help --------------------------------------------------------------------------------------


def test_help_answers_at_once() -> None:
    """Best of three, interpreter start included."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        ran = python("-m", "mlxpref", "--help")
        seconds.append(time.perf_counter() - start)
        assert ran.returncode == 0, ran.stderr
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from mlxpref.cli import main
main(["--help"], standalone_mode=False)
loaded = set({HEAVY}) & {{m.split(".")[0] for m in sys.modules}}
sys.exit(f"loaded {{loaded}}" if loaded else 0)
"""
    ran = python("-c", code)
    assert ran.returncode == 0, ran.stderr
    assert "Commands:" in ran.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_helps_with_an_example(name: str) -> None:
    ran = CliRunner().invoke(cli.main, [name, "--help"])
    assert ran.exit_code == 0, ran.output
    _, _, example = ran.output.partition("Example")
    assert f"mlxpref {name}" in example, "the help ends with an example that calls the command"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    bare = [p.name for p in command.params if isinstance(p, click.Option) and not (p.help or p.hidden)]
    assert not bare, f"mlxpref {name}: options without help: {bare}"


def test_an_unknown_command_names_the_nearest() -> None:
    ran = CliRunner().invoke(cli.main, ["trian"])
    assert ran.exit_code == 2
    assert "'train'" in ran.output


def test_version() -> None:
    ran = CliRunner().invoke(cli.main, ["--version"])
    assert re.fullmatch(r"mlxpref \d+\.\d+\.\d+\S*", ran.output.strip())


# --- errors ------------------------------------------------------------------------------------


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "adapters.safetensors")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MlxprefError("row 7: empty response"), 1, "error: row 7: empty response"),
        (ConfigError("unknown key 'lerning_rate'"), 2, "error: unknown key 'lerning_rate'"),
        (RunError("not finite"), 1, "error: not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (full_disk(), 1, "no space left on device: adapters.safetensors"),
    ],
    ids=["ours", "usage", "run", "interrupt", "disk"],
)
def test_errors_are_one_message_and_a_code(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr(cli.main, "get_command", lambda ctx, name: failing)
    ran = CliRunner().invoke(cli.main, ["env"])
    assert ran.exit_code == code
    assert says in ran.stderr
    assert not ran.stdout


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def failing() -> None:
        raise OSError(errno.ENOTDIR, "Not a directory", "x")

    monkeypatch.setattr(cli.main, "get_command", lambda ctx, name: failing)
    ran = CliRunner().invoke(cli.main, ["env"])
    assert isinstance(ran.exception, OSError)


# --- train -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["run", "run/adapters.safetensors"])
def test_the_file_mlx_lm_resumes_from_is_taken_as_its_folder(given: str) -> None:
    base = ["train", "--model", "m", "--data", "d", "--print-config"]
    ran = CliRunner().invoke(cli.main, [*base, "--resume-adapter-file", given])
    assert ran.exit_code == 0, ran.output
    assert yaml.safe_load(ran.stdout)["adapter"]["init_from"] == "run"


def test_another_file_of_weights_is_not_taken_for_the_last_one() -> None:
    """mlx-lm numbers its checkpoints; beside one of them lies a different ``adapters.safetensors``."""
    numbered = "run/0000100_adapters.safetensors"
    ran = CliRunner().invoke(cli.main, ["train", "--model", "m", "--data", "d", "--resume-adapter-file", numbered])
    assert ran.exit_code == 2
    assert numbered in ran.stderr and "adapter_config.json" in ran.stderr


def test_iters_says_what_an_iteration_is() -> None:
    ran = CliRunner().invoke(cli.main, ["train", "--help"], terminal_width=200)
    line = next(line for line in ran.output.splitlines() if "--iters" in line)
    assert "Updates" in line and "mlx-lm" in line


def test_ctrl_c_before_a_run_folder_does_not_promise_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxpref.train.train", stopped)
    base = ["train", "--model", "m", "--data", "d", "--adapter-path", str(tmp_path)]
    ran = CliRunner().invoke(cli.main, base)
    assert ran.exit_code == 130 and "start again" in ran.stderr and "--resume" not in ran.stderr
    (tmp_path / "config.yaml").touch()
    assert "--resume" in CliRunner().invoke(cli.main, base).stderr


def test_ctrl_c_during_the_first_imports_is_quiet() -> None:
    code = """
import runpy, sys
class Interrupt:
    def find_spec(name, *_):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt)
runpy.run_module("mlxpref", run_name="__main__")
"""
    ran = python("-c", code)
    assert (ran.returncode, ran.stderr) == (130, "")


def test_train_takes_strict() -> None:
    ran = CliRunner().invoke(cli.main, ["train", "--model", "m", "--data", "d", "--strict", "--print-config"])
    assert yaml.safe_load(ran.stdout)["data"]["strict"] is True


def test_train_takes_the_split_of_its_validation_data() -> None:
    flags = ["--valid", "d", "--valid-split", "test", "--print-config"]
    ran = CliRunner().invoke(cli.main, ["train", "--model", "m", "--data", "d", *flags])
    assert yaml.safe_load(ran.stdout)["data"]["valid_split"] == "test"


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--learning-rate", "1e-05"),
        ("--num-layers", "16"),
        ("--epochs", "1"),
        ("--objective", "dpo"),
        ("--grad-checkpoint", "no-grad-checkpoint"),
        ("--report-to", "none"),
        ("--steps-per-eval", "200 where there are validation rows"),
    ],
)
def test_the_help_of_train_shows_what_an_empty_configuration_has(flag: str, default: str) -> None:
    command = cli.main.get_command(click.Context(cli.main), "train")
    assert command is not None
    option = next(p for p in command.params if flag in p.opts)
    assert isinstance(option, click.Option) and str(option.help).endswith(f"  [default: {default}]")


# --- how data are read ---------------------------------------------------------------------------

READERS = ("relabel", "inspect", "evaluate")


def options_of(name: str) -> dict[str, click.Option]:
    """Long flag → option of a command."""
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    return {flag: p for p in command.params if isinstance(p, click.Option) for flag in p.opts}


def test_data_options_have_one_name_and_one_help() -> None:
    """Finds an option that is called otherwise, or explained otherwise, in another command."""
    shared = ("--format", "--columns", "--score", "--strict")
    found = [options_of(name) for name in READERS]
    for flag in (*shared, "--data-config", "--data-revision", "--limit", "--streaming"):
        assert len({(options[flag].help, options[flag].metavar) for options in found}) == 1, flag
    train = options_of("train")
    for flag in shared:
        assert (train[flag].help, train[flag].metavar) == (found[0][flag].help, found[0][flag].metavar)


def test_one_flag_means_one_thing() -> None:
    """Finds a ``--config`` that is a YAML file here and a part of a hub data set there; the same of revisions."""
    for name in cli.COMMANDS:
        options = options_of(name)
        assert "--revision" not in options, name
        assert "--config" not in options or "-c" in options["--config"].opts, name


def test_every_data_option_reaches_the_source() -> None:
    """Finds an option that is parsed and forgotten on the way."""
    from mlxpref.cli.sources import Reading, source_options
    from mlxpref.data.sources import SourceSpec

    given: list[Reading] = []

    @click.command()
    @source_options(split="all")
    @click.option("--other")
    def command(reading: Reading, other: str) -> None:
        given.append(reading)

    words = "--format f --columns prompt=q,chosen=c --score s --split d --data-config c --data-revision r --limit 3"
    ran = CliRunner().invoke(command, [*words.split(), "--streaming", "--strict"])
    assert ran.exit_code == 0, ran.output
    assert given[0].spec("x", weight=2.0) == SourceSpec(
        "x", format="f", columns={"prompt": "q", "chosen": "c"}, config="c", split="d", revision="r", score="s",
        weight=2.0, streaming=True, limit=3,
    )  # fmt: skip
    assert given[0].strict
    CliRunner().invoke(command, [])
    assert given[1].spec("x") == SourceSpec("x") and not given[1].strict


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("flag", ["--data-config", "--data-revision"])
def test_what_is_for_the_hub_is_refused_by_its_flag(name: str, flag: str, tmp_path: Path) -> None:
    """Finds a message that names a flag the command does not have."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}\n')
    more = ["--preview", "1"] if name == "relabel" else ["--model", "m"]
    ran = CliRunner().invoke(cli.main, [name, str(file), flag, "x", *more])
    assert ran.exit_code == 2 and f"{flag} is for data sets of the hub" in ran.stderr, ran.output


# --- words ---------------------------------------------------------------------------------------


def test_one_of_a_thing_is_not_plural() -> None:
    from mlxpref.data.words import counted

    assert [counted(n, "shape") for n in (0, 1, 2)] == ["0 shapes", "1 shape", "2 shapes"]
    assert [counted(n, "half", "halves") for n in (1, 2)] == ["1 half", "2 halves"]


# --- env ---------------------------------------------------------------------------------------


@pytest.mark.mlx
def test_env_reports_the_machine() -> None:
    """In a process of its own, as a user calls it."""
    ran = python("-m", "mlxpref", "env", "--json", "--no-speed")
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout)
    assert facts["device"]["backend"] == "mlx"
    assert facts["packages"]["mlxpref"]
    assert facts["memory_gb"]["system"] > 0.5
    assert facts["blas"]["said"]
    assert facts["blas"]["matmul_gflops"] is None


def test_env_and_a_runs_facts_name_the_same_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that changes bits and stands in one list only makes two runs look alike that are not."""
    from mlxpref import facts
    from mlxpref.cli import env

    def no_backend(name: str) -> None:
        raise RunError("none")

    monkeypatch.setattr(env.backends, "get", no_backend)  # it would ask for versions, too
    monkeypatch.setattr(importlib.metadata, "version", lambda package: f"{package} 1")
    shown = env.gather(speed=False)["packages"]
    assert {"mkl", "mlx-cuda-13", "torch"} < shown.keys()
    assert shown.items() <= facts.versions().items()


@pytest.mark.mlx
def test_env_warns_of_a_slow_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxpref.cli import env

    facts = env.gather(speed=False)
    facts["device"]["kind"] = "cpu"
    facts["blas"]["matmul_gflops"] = 3.0
    monkeypatch.setattr(env, "gather", lambda **_: facts)
    ran = CliRunner().invoke(env.command, [])
    assert "3.0, float32" in ran.stdout
    assert "pip install mkl" in ran.stderr


# --- console -----------------------------------------------------------------------------------


def test_a_table_in_a_pipe_is_plain_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("name", "loss"), [("dpo", 0.693147), ("a [b] c", None), ("simpo", 10.5)], title="losses")
    assert capsys.readouterr().out.splitlines() == [
        "losses",
        "name       loss",
        "dpo      0.6931",
        "a [b] c       –",
        "simpo      10.5",
    ]


def test_a_table_on_a_terminal_keeps_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich reads ``[bold]`` in a text as an instruction unless told otherwise."""
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    console.table(("text", "[x]"), [("say [bold]it[/bold]", 3)])
    out = capsys.readouterr().out
    assert "say [bold]it[/bold]" in out
    assert "[x]" in out


def test_progress_in_a_pipe_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("reference", 1000) as at:
        for done in range(1000):
            at(done + 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == console.PLAIN_PROGRESS_LINES
    assert lines[-1] == "reference: 1000/1000"


# --- public names ------------------------------------------------------------------------------


def test_every_public_name_leads_somewhere() -> None:
    for name in mlxpref.__all__:
        assert getattr(mlxpref, name) is not None
    assert set(mlxpref.__all__) <= set(dir(mlxpref))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'relable'"):
        _ = mlxpref.relable


def test_importing_the_package_loads_nothing_heavy() -> None:
    ran = python("-c", f"import sys, mlxpref; print(*(set({HEAVY}) & set(sys.modules)))")
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr
