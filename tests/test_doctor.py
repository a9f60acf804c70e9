"""The doctor: healthy and ill machines given as facts, and the command as a user calls it.

Finds: a fault that is not seen, one that is seen where there is none, a line without a remedy, a doctor
that opens a connection nobody asked for, and one that falls over what it should report.
"""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from safetensors.numpy import save_file

from mlxpref import backends
from mlxpref.cli import main
from mlxpref.doctor import check, examine, machine, macos, places, plan
from mlxpref.doctor.check import Check
from mlxpref.errors import RunError, UsageError
from mlxpref.runs import open_run

GB = 10**9
HEALTHY = macos.Mac("15.3.1", "arm64", False, 0, 96 * GB, 128 * GB)


def healthy(checks: list[Check]) -> bool:
    return all(found.status == "ok" for found in checks)


# --- a Mac, from facts -------------------------------------------------------------------------


def mac(**changes: Any) -> dict[str, Check]:
    values = {name: getattr(HEALTHY, name) for name in HEALTHY.__slots__} | changes
    return {found.name: found for found in macos.checks(macos.Mac(**values))}


def test_a_healthy_mac_has_nothing_to_mend() -> None:
    found = mac()
    assert healthy(list(found.values()))
    assert found.keys() == {"processor", "macOS", "wired limit", "long runs"}
    assert "96.0 GB of 128.0" in found["wired limit"].said and "default" in found["wired limit"].said


@pytest.mark.parametrize(
    ("changes", "name", "status", "says"),
    [
        ({"machine": "x86_64", "translated": True}, "processor", "fail", "Rosetta"),
        ({"machine": "x86_64", "translated": None}, "processor", "fail", "x86_64"),
        ({"version": "13.6"}, "macOS", "fail", "14.0"),
        ({"version": "14.7.2"}, "macOS", "warn", "wired"),
        ({"version": "26.1"}, "macOS", "ok", "26.1"),
        ({"version": ""}, "macOS", "warn", "unknown"),
        ({"wired_limit_mb": 122_000}, "wired limit", "warn", "122000 MB"),
        ({"wired_limit_mb": 100_000}, "wired limit", "ok", "100000 MB"),
        ({"wired_limit_mb": None}, "wired limit", "ok", "not known"),
    ],
)
def test_a_mac_with_one_fault(changes: dict[str, Any], name: str, status: str, says: str) -> None:
    found = mac(**changes)
    assert (found[name].status, says in found[name].said) == (status, True), found[name]
    assert status == "ok" or found[name].remedy
    others = [other for key, other in found.items() if key != name]
    assert healthy(others), "one fault, one line"


def test_without_mlx_the_wired_limit_is_left_out() -> None:
    assert "wired limit" not in mac(recommended=None)


def test_the_advice_for_long_runs_does_not_keep_the_display_on() -> None:
    remedy = str(mac()["long runs"].remedy)
    assert "caffeinate -i " in remedy and "not caffeinate -d" in remedy and "--resume" in remedy


# --- any machine, from facts -------------------------------------------------------------------


def test_memory() -> None:
    assert machine.check_memory({"system": 16.0, "active": 0.5, "cache": 0.0}, 12.0).status == "ok"
    little = machine.check_memory({"system": 16.0}, 1.5)
    assert (little.status, "1.5 free" in little.said) == ("warn", True)
    assert machine.check_memory({"system": 2.0}, None).status == "warn"


def test_free_memory_is_read_from_the_system(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemFree: 100 kB\nMemAvailable:  2000000 kB\n")
    assert machine.free_memory(tmp_path / "meminfo") == pytest.approx(2.048)
    assert machine.free_memory(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("kind", "speed", "remedy", "status"),
    [
        ("cpu", 120.0, None, "ok"),
        ("cpu", None, None, "ok"),
        ("cpu", 3.0, None, "warn"),
        ("cpu", None, "unset MLXPREF_BLAS", "warn"),
        ("metal", 3.0, None, None),
    ],
)
def test_blas(kind: str, speed: float | None, remedy: str | None, status: str | None) -> None:
    found = machine.check_blas(kind, {"said": "MKL", "matmul_gflops": speed}, remedy)
    assert (found and found.status) == status
    if found is not None and status == "warn":
        assert found.remedy == remedy or "libopenblas0" in str(found.remedy)


def test_compiler_says_the_backends_own_remedy() -> None:
    remarks = ["blas: slow; get another", "kernels: not compiled, no g++; apt install g++"]
    ill = machine.check_kernels({"kernels": "not compiled, no g++", "remarks": remarks})
    assert ill is not None and (ill.status, ill.remedy) == ("warn", "apt install g++")
    well = machine.check_kernels({"kernels": "compiled by g++", "remarks": remarks[:1]})
    assert well is not None and (well.status, well.remedy) == ("ok", None)
    assert machine.check_kernels({"kind": "metal"}) is None


def installed(**versions: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    return version


NEEDS = ["mlx>=0.32.4", "numpy>=2.0", 'torch>=2.9; extra == "torch"', 'pywin>=1; sys_platform == "win32"']


def test_versions_that_fit_are_one_line() -> None:
    found = list(machine.check_versions(NEEDS, ">=3.11", installed(mlx="0.33.0", numpy="2.0")))
    assert [c.status for c in found] == ["ok"]
    assert "mlx 0.33.0, numpy 2.0" in found[0].said


@pytest.mark.parametrize(
    ("have", "status", "says"),
    [
        ({"mlx": "0.32.3", "numpy": "2.0"}, "fail", "mlx 0.32.3, needed >=0.32.4"),
        ({"mlx": "0.32.10"}, "fail", "numpy is not installed"),
        ({"mlx": "0.32.4", "numpy": "2.1", "torch": "2.4"}, "warn", "torch 2.4"),
    ],
)
def test_versions_that_do_not(have: dict[str, str], status: str, says: str) -> None:
    found = [c for c in machine.check_versions(NEEDS, None, installed(**have)) if c.status != "ok"]
    assert [c.status for c in found] == [status]
    assert says in found[0].said and found[0].remedy


def test_this_installation_meets_its_own_minimums() -> None:
    """Every package it depends on is named with its version, none left out."""
    found = list(machine.look_at_versions())
    assert not [c for c in found if c.status == "fail"], found
    wanted = [line for line in importlib.metadata.requires("mlxpref") or [] if ";" not in line]
    assert len(wanted) > 5
    for line in wanted:
        name = line.partition(">=")[0]
        assert f"{name} {importlib.metadata.version(name)}" in found[-1].said


# --- places ------------------------------------------------------------------------------------


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that is yet to be made, too."""
    for free, status in ((3.0, "ok"), (1.5, "warn"), (1.0, "warn"), (0.1, "fail")):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free * GB))
        assert places.check_disk("disk", tmp_path / "a" / "b", enough=2.0).status == status


class Hub(http.server.BaseHTTPRequestHandler):
    status = 200
    seen: list[tuple[str, str, str | None]]

    def do_HEAD(self) -> None:
        self.seen.append((self.command, self.path, self.headers.get("Content-Length")))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Hub]]]:
    """A hub on this machine that writes down what it was asked."""
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Handler", (Hub,), {"seen": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "reach"), [(200, "reachable"), (403, "reachable"), (407, "unreachable"), (503, "unreachable")]
)
def test_the_hub_is_asked_once_and_told_nothing(
    status: int, reach: str, hub: tuple[str, type[Hub]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal is the hub's answer, but 407 is a proxy's: the hub was not asked at all."""
    address, handler = hub
    monkeypatch.setattr(handler, "status", status)
    found, known = places.check_hub(address, offline=False, network=True)
    assert known == reach and address in found.said
    assert found.status == ("ok" if reach == "reachable" else "warn")
    assert reach == "reachable" or (str(status) in found.said and "proxy" in str(found.remedy))
    assert handler.seen == [("HEAD", "", None)] or handler.seen == [("HEAD", "/", None)]


def test_a_hub_that_is_not_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    found, known = places.check_hub("http://127.0.0.1:9", offline=False, network=True)
    assert (found.status, known) == ("warn", "unreachable")
    assert "hf download" in str(found.remedy)


@pytest.mark.parametrize(
    ("given", "reach"),
    [
        ({"offline": True, "network": True}, "offline"),
        ({"offline": False, "network": False}, "not looked"),
        ({"offline": True, "network": False}, "offline"),
    ],
)
def test_nothing_is_opened_unless_asked(given: dict[str, bool], reach: str, no_sockets: list[str]) -> None:
    found, known = places.check_hub("https://huggingface.co", **given)
    assert (found.status, known) == ("ok", reach)


def test_an_endpoint_that_is_no_address_is_said(no_sockets: list[str]) -> None:
    found, _ = places.check_hub("file:///etc/passwd", offline=False, network=True)
    assert found.status == "fail" and "HF_ENDPOINT" in found.said


# --- a configuration ---------------------------------------------------------------------------


def copy(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


def test_a_whole_model_is_ok(tiny_model_dir: Path) -> None:
    found = plan.check_model(str(tiny_model_dir), None, "offline", 8.0)
    assert found.status == "ok" and "tokenizer" in found.said


@pytest.mark.parametrize(
    ("gone", "says"),
    [("config.json", "config.json"), ("model*.safetensors", "no weights"), ("tokenizer*", "no tokenizer")],
)
def test_a_model_that_lacks_a_part(gone: str, says: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = copy(tiny_model_dir, tmp_path / "model")
    for file in model.glob(gone):
        file.unlink()
    found = plan.check_model(str(model), None, "offline", 8.0)
    assert found.status == "fail" and says in found.said and found.remedy


@pytest.mark.parametrize("kept", [0, 1000])
def test_a_download_that_broke_off_is_named(tmp_path: Path, tiny_model_dir: Path, kept: int) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    assert plan.lacking(model) == []
    weights = next(model.glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:kept])
    assert plan.lacking(model) == [f"{weights.name} is empty or cut off"]


def test_a_model_with_a_shard_missing(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = copy(tiny_model_dir, tmp_path / "model")
    weights = next(model.glob("model*.safetensors"))
    names = {"a": weights.name, "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = plan.check_model(str(model), None, "offline", 8.0)
    assert found.status == "fail" and "1 of 2" in found.said and names["b"] in found.said


@pytest.mark.parametrize(("share", "status"), [(0.75, "warn"), (1.25, "ok")])
def test_weights_beyond_the_memory_are_a_warning(share: float, status: str, tiny_model_dir: Path) -> None:
    """Finds: a factor in the comparison, or another unit on one side."""
    size = (tiny_model_dir / "model.safetensors").stat().st_size / GB
    assert plan.check_model(str(tiny_model_dir), None, "offline", share * size).status == status


@pytest.mark.parametrize(("model", "status"), [({}, "ok"), ({"revision": "main"}, "fail")])
def test_a_revision_of_a_local_model_is_said(
    model: dict[str, str], status: str, tiny_model_dir: Path, config: Callable[..., Path]
) -> None:
    """The whole configuration is looked at: a key that is dropped on the way would pass here and stop a run."""
    _, read = plan.check_config(config(model={"path": str(tiny_model_dir), **model}))
    assert read is not None
    found = {c.name: c for c in plan.check_plan(read, "offline", 8.0)}["model"]
    assert found.status == status and ("model.revision" in found.said) == (status == "fail")


@pytest.mark.parametrize(
    ("reach", "status"),
    [("offline", "fail"), ("unreachable", "fail"), ("reachable", "ok"), ("not looked", "ok")],
)
def test_a_hub_id_that_is_not_here_depends_on_the_hub(reach: places.Reach, status: str, no_sockets: list[str]) -> None:
    for found in (
        plan.check_model("nobody-here/no-model", None, reach, 8.0),
        plan.check_data("data", "nobody-here/no-data", reach),
    ):
        assert found.status == status, found
        assert status == "ok" or "hf download" in str(found.remedy)


@pytest.mark.parametrize("path", ["./none", "none/at/all", "pairs.jsonl"])
def test_a_local_path_is_never_taken_for_a_hub_id(path: str) -> None:
    found = (plan.check_model(path, None, "reachable", 8.0), plan.check_data("data", path, "reachable"))
    assert [c.status for c in found] == ["fail", "fail"]


def test_data(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.touch()
    assert plan.check_data("data", str(file), "offline").status == "fail", "empty"
    file.write_text("{}\n")
    assert plan.check_data("data", str(file), "offline").status == "ok"


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ([], "ok"),
        ([".DS_Store"], "ok"),
        (["config.yaml", "run.json"], "ok"),  # what a run leaves that failed before its first step
        (["config.yaml", "adapters.safetensors"], "warn"),
        (["adapters.safetensors"], "fail"),
        (["thesis.pdf"], "fail"),
    ],
)
def test_output(files: list[str], status: str, tmp_path: Path) -> None:
    """The witness is what opens the folder for training: it refuses just where this is not ok."""
    for name in files:
        (tmp_path / name).touch()
    assert {c.name: c.status for c in plan.check_output(tmp_path)}["output"] == status
    with nullcontext() if status == "ok" else pytest.raises(RunError), open_run(tmp_path, resume=False):
        pass


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = list(plan.check_output(tmp_path / "file" / "run"))
    assert [c.status for c in found] == ["fail"] and "is a file" in found[0].said


def test_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = list(plan.check_output(tmp_path / "run"))
    assert [c.status for c in found] == ["fail"] and "not writable" in found[0].said


# --- the whole ---------------------------------------------------------------------------------


def test_a_check_that_breaks_off_leaves_the_others() -> None:
    def look() -> Iterator[Check]:
        yield Check("a", "ok", "fine")
        raise RuntimeError("no such device\nand more")

    found = list(check.settled("b", look))
    assert [c.status for c in found] == ["ok", "fail"]
    assert found[1].said == "could not be checked: RuntimeError: no such device"


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        (tmp_path / "pairs.jsonl").write_text("{}\n")
        values = {
            "model": {"path": str(tiny_model_dir)},
            "data": {"source": str(tmp_path / "pairs.jsonl")},
            "output": {"adapter_path": str(tmp_path / "run")},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | changes))
        return tmp_path / "config.yaml"

    return write


def ask(*args: str) -> tuple[int, dict[str, Any]]:
    ran = CliRunner().invoke(main, ["doctor", "--json", "--no-speed", "--no-network", *args])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran.exit_code, json.loads(ran.stdout)


@pytest.mark.mlx
def test_a_run_that_will_go(config: Callable[..., Path], no_sockets: list[str], tmp_path: Path) -> None:
    code, said = ask("-c", str(config()))
    names = [c["name"] for c in said["checks"]]
    assert (code, said["ok"]) == (0, True), said
    assert {"versions", "config", "device", "memory", "hub", "model", "data", "output"} <= set(names)
    assert not (tmp_path / "run").exists(), "looking makes nothing"


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        ({"trainning": {}}, "config", "trainning"),
        ({"objective": "dop"}, "config", "dop"),
        ({"model": {"path": "./nowhere"}}, "model", "nowhere"),
        ({"data": {"source": "nowhere.jsonl"}}, "data", "nowhere.jsonl"),
        ({"adapter": {"init_from": "nowhere"}}, "adapter", "nowhere"),
    ],
)
def test_a_run_that_will_not(changes: dict[str, Any], name: str, says: str, config: Callable[..., Path]) -> None:
    code, said = ask("-c", str(config(**changes)))
    failed = [c for c in said["checks"] if c["status"] == "fail"]
    assert (code, said["ok"]) == (1, False)
    assert [c["name"] for c in failed] == [name], failed
    assert says in failed[0]["said"] and failed[0]["remedy"]


def test_an_adapter_is_looked_at_without_the_hub(
    config: Callable[..., Path], no_sockets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that is still to be downloaded nothing can be compared; the shell leaves ``~`` in a file alone."""
    monkeypatch.setattr(places, "is_offline", lambda: False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "first").mkdir()
    (tmp_path / "first/adapter_config.json").write_text("{}")
    layer = {"model.layers.77.self_attn.q_proj.lora_a": np.zeros((4, 2), np.float32)}
    save_file(layer, tmp_path / "first/adapters.safetensors")
    asked = {"adapter": {"init_from": "~/first"}}

    def look(**changes: Any) -> Check:
        file = config(**asked, **changes)
        return {c.name: c for c in examine(file, network=False, speed=False)}["adapter"]

    assert look(model={"path": "nobody-here/no-model"}).status == "ok" and not no_sockets
    here = look()
    assert here.status == "fail" and "another model" in here.said and "~/first" in here.said


@pytest.mark.parametrize("error", [UsageError("no mlx: pip install it"), OSError("libcuda.so.1"), RuntimeError()])
def test_a_broken_backend_is_a_line(
    error: Exception, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(name: str) -> None:
        raise error

    monkeypatch.setattr(backends, "get", get)
    found = {c.name: c for c in examine(config(), network=False, speed=False)}
    assert found["backend"].status == "fail" and "pip install" in str(found["backend"].remedy)
    assert str(error) in found["backend"].said
    assert found["memory"].status in ("ok", "warn") and found["output"].status == "ok", "the rest is still looked at"


@pytest.mark.parametrize(("offline", "says"), [(True, "switched off"), (False, "not looked at")])
def test_a_hub_that_is_switched_off_stays_so(
    offline: bool, says: str, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, no_sockets: list[str]
) -> None:
    """``HF_HUB_OFFLINE`` goes before the permission to ask, and the model's line knows of it."""
    monkeypatch.setattr(places, "is_offline", lambda: offline)
    file = config(model={"path": "nobody-here/no-model"})
    found = {c.name: c for c in examine(file, network=offline, speed=False)}
    assert found["hub"].status == "ok" and says in found["hub"].said
    assert found["model"].status == ("fail" if offline else "ok")
    assert ("HF_HUB_OFFLINE" in found["model"].said) == offline


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_users_own_word_is_read(value: str) -> None:
    """As the hub's client takes it from the environment, once and for all: in a process of its own."""
    code = "from mlxpref.doctor import places; print(places.is_offline())"
    environ = {**os.environ, "HF_HUB_OFFLINE": value}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(value == "1")


@pytest.mark.mlx
def test_lines_for_people(config: Callable[..., Path]) -> None:
    ran = CliRunner().invoke(main, ["doctor", "--no-network", "--no-speed", "-c", str(config(objective="dop"))])
    lines = ran.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("fail  config: "))
    assert any(line.startswith("      → ") for line in lines[at + 1 :])
    assert ran.exit_code == 1 and lines[-1].endswith("1 failed")
