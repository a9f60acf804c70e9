"""What is said of a run before it starts.

Finds: a plan that is not the run's, a remedy that does not suffice, a budget that a resumed run would choose anew, a
model that is loaded to say so.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_backend
import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref import cli
from mlxpref.config import Config
from mlxpref.config_layers import load_config, read_yaml
from mlxpref.data.shapes import Shape
from mlxpref.errors import ConfigError, RunError, UsageError
from mlxpref.objectives import resolve_objective
from mlxpref.planning import budget, machine, plans, remedies, timing
from mlxpref.planning.forecast import GRAPHS, Job, forecast, make_job
from mlxpref.prepare import prepare
from mlxpref.train import train

GB = 10**9


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scored pairs of different lengths."""
    draw, words = random.Random(0), ["girl", "park", "story", "cat", "dog", "hello", "Paris"]

    def say(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, most)))

    rows = [
        {"prompt": f"{say(30)} {i}?", "chosen": say(60), "rejected": say(60), "score_chosen": 9, "score_rejected": 2}
        for i in range(40)
    ]
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def configure(tmp_path: Path, pairs: Path, tiny_model_dir: Path) -> Callable[..., Config]:
    base = {
        "model": {"path": str(tiny_model_dir)},
        "data": {"source": str(pairs), "valid_fraction": 0.2},
        "batching": {"batch_size": 8, "micro_batch_tokens": 1024},
        "adapter": {"num_layers": -1, "lora_parameters": {"rank": 4}},
        "reference": {"store": str(tmp_path / "store")},
        "training": {"iters": 6, "save_every": 2, "steps_per_eval": 3},
        "output": {"adapter_path": str(tmp_path / "run")},
    }
    return lambda **settings: load_config(base=base, overrides=list(settings.items()))


def job_of(config: Config, **device: Any) -> Job:
    """As on a CPU, by MLX."""
    objective = resolve_objective(config.objective)
    data = prepare(config, needs=objective.needs)
    return make_job(config, objective, data, device={"kind": "cpu", "backend": "mlx", **device})


# --- plans and peaks ------------------------------------------------------------------------------


def test_what_takes_less_is_predicted_to_take_less(configure: Any) -> None:
    def total(**settings: Any) -> int:
        return forecast(job_of(configure(**settings))).training.total

    plain = total()
    assert total(**{"batching.micro_batch_tokens": 512}) < plain
    assert total(**{"adapter.num_layers": 1}) < plain
    assert total(**{"tokenization.max_length": 64}) < plain
    assert total(**{"optimizer.name": "sgd"}) < plain < total(**{"adapter.fine_tune_type": "dora"})


@pytest.mark.parametrize(("every", "steps", "made"), [(0, 10, 0), (3, 6, 2), (4, 6, 2), (10, 6, 1)])
def test_evaluations_are_counted_as_the_loop_makes_them(every: int, steps: int, made: int) -> None:
    assert plans.n_evaluations(every, steps) == made


def test_the_plan_is_the_runs_own(configure: Any) -> None:
    """Finds a forecast of other micro-batches than those that are made. Witness: the run's facts."""
    config = configure()
    found = forecast(job_of(config))
    facts = json.loads((train(config, backend=fake_backend).folder / "run.json").read_text())
    assert facts["plan"]["steps"] == len(found.train.steps)
    assert (facts["plan"]["tokens"], facts["plan"]["shapes"]) == (found.train.tokens, len(found.train.shapes))


# --- what to change --------------------------------------------------------------------------------


def test_each_remedy_suffices_when_it_is_written_into_the_configuration(configure: Any) -> None:
    """Finds a remedy that predicts another peak than the configuration it stands for. ``max_length`` is applied to
    rows that are tokenized already, so it may differ a little."""
    job = job_of(configure())
    found = forecast(job)
    floor = sum(found.host.values())
    room = machine.Memory(int((floor + 0.9 * (found.total - floor)) / machine.SAFE_SHARE), "given")
    offered = remedies.remedies(job, found, room)
    assert {key for one in offered for key, _ in one.settings} >= {"batching.micro_batch_tokens", "adapter.num_layers"}
    for one in offered:
        again = forecast(job_of(configure(**dict(one.settings))))
        assert again.total <= room.usable
        if dict(one.settings).keys() != {"tokenization.max_length"}:
            assert again.total == one.total, one.settings


def test_where_no_single_change_is_enough_several_are_offered_together(configure: Any) -> None:
    job = job_of(configure())
    found = forecast(job)
    floor = sum(found.host.values())
    for share in np.linspace(0.5, 0.05, 19):
        room = machine.Memory(int((floor + share * (found.total - floor)) / machine.SAFE_SHARE) + 1, "given")
        offered = remedies.remedies(job, found, room)
        assert all(one.total <= room.usable for one in offered)
        if len(offered) == 1 and len(offered[0].settings) > 1:
            return
    raise AssertionError("no room in which a combination is needed")


def test_nothing_is_offered_where_nothing_helps(configure: Any) -> None:
    job = job_of(configure())
    assert remedies.remedies(job, forecast(job), machine.Memory(1000, "given")) == []


@pytest.mark.parametrize("limit", [0, 511, 512, 3000, 10**6])
def test_the_largest_budget_is_found(limit: int) -> None:
    """Witness: look at all of them."""
    wanted = max((size for size in budget.SIZES if size <= limit), default=None)
    found = budget.bisected(lambda size: size <= limit, budget.SIZES)
    assert (budget.SIZES[found - 1] if found else None) == wanted


@pytest.mark.parametrize(("kind", "backend", "counted"), [("cpu", "mlx", 1), ("cpu", "torch", 0), ("metal", "mlx", 0)])
def test_graphs_take_memory_where_mlx_computes_on_a_cpu(configure: Any, kind: str, backend: str, counted: int) -> None:
    job = job_of(configure(), kind=kind, backend=backend)
    assert list(forecast(job).host).count("compiled graphs") == counted


def test_smaller_budgets_may_need_more(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a search that takes memory to grow with the budget, and so finds none that fits, though large ones do."""
    job = job_of(configure())
    monkeypatch.setattr("mlxpref.planning.forecast._graphs", lambda job, train, passes: {GRAPHS: GB * len(train)})
    fits = {size: forecast(job, tokens=size).total for size in budget.SIZES}
    room = machine.Memory(int(min(fits.values()) / machine.SAFE_SHARE) + 1, "given")
    wanted = max(size for size, total in fits.items() if total <= room.usable)
    found = budget.largest_that_fits(job, room)
    assert found is not None and found.tokens == wanted and fits[512] > room.usable


def test_fewer_shapes_are_offered_where_graphs_are_what_does_not_fit(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxpref.planning.forecast.graph_bytes", lambda *a, **b: GB)
    job = job_of(configure())
    found = forecast(job)
    room = machine.Memory(int((found.total - 1) / machine.SAFE_SHARE), "given")
    settings = {key: value for one in remedies.remedies(job, found, room) for key, value in one.settings}
    assert forecast(job_of(configure(**{"batching.max_shapes": settings["batching.max_shapes"]}))).total <= room.usable
    on_gpu = job_of(configure(), kind="metal")
    offered = remedies.remedies(on_gpu, forecast(on_gpu), machine.Memory(6 * 10**8, "given"))
    assert "batching.max_shapes" not in {key for one in offered for key, _ in one.settings}


# --- what is timed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_timed_starts_from_margins_of_zero(configure: Any, kind: str) -> None:
    """With other log-probs of the reference margins are so wide that slopes are denormal, and slow on a CPU."""
    job, asked, seen = job_of(configure()), [], []

    def token_logps(policy: Any, micro_batch: Any, *, reference: bool) -> Any:
        asked.append(reference)
        return SimpleNamespace(tokens=-1.5 * micro_batch.mask)

    backend = SimpleNamespace(token_logps=token_logps, memory=lambda: {"peak": 0.0})
    policy = SimpleNamespace(fine_tune_type=kind, share_prompts=True)
    timing.measure(job, forecast(job), backend, policy, lambda batch, rate: seen.append((batch, rate)))
    assert {rate for _, rate in seen} == {0.0} and set(asked) == {kind == "lora"}
    for part in (part for batch, _ in seen for part in batch.parts):
        np.testing.assert_array_equal(part.reference, -1.5 * part.mask)


# --- sizes that people write -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16 * GB), ("16", 16 * GB), ("1.5 gib", int(1.5 * 2**30)), ("800MB", 8 * 10**8)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert machine.parse_size(text).size == size


@pytest.mark.parametrize(("said", "size"), [("1000000", 1_000_000), ("max", None), (None, None)])
def test_a_container_is_as_large_as_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, size: int | None
) -> None:
    """A plan for the host's memory, in a container that is killed at its own."""
    monkeypatch.setattr(machine, "_LIMITS", ())
    host = machine.system_memory()
    if said is not None:
        (tmp_path / "memory.max").write_text(said + "\n")
    monkeypatch.setattr(machine, "_LIMITS", (str(tmp_path / "memory.max"),))
    assert machine.system_memory() == (size or host)


@pytest.mark.parametrize("text", ["", "much", "-3GB", "16 bananas", "0GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="16GB"):
        machine.parse_size(text)


# --- time ------------------------------------------------------------------------------------------


def shape(n: int, prompt: int, *rows: int) -> Shape:
    return Shape(n=n, prompt=prompt, rows=rows, scored=n * sum(rows), responses=len(rows))


def test_known_rates_are_found_again() -> None:
    """Positions and their squares, with a constant; scored positions follow from the others in most shapes."""
    shapes = [shape(1, 64, 64, 64), shape(4, 128, 64, 32), shape(2, 0, 512, 512), shape(1, 512, 1024, 512)]
    shapes.append(Shape(n=8, prompt=8, rows=(64, 64), scored=64, responses=2))
    true = timing.Rates(0.02, 3e-5, 5e-5, 2e-8)
    seconds = [
        true.each + true.position * s.slots + true.scored * s.scored + true.pair * timing.pairs(s) for s in shapes
    ]
    found = timing.fit(shapes, seconds)
    for name in ("each", "position", "scored", "pair"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-3)


def test_noise_makes_no_rate_negative() -> None:
    """Finds a fit that promises less time for longer rows."""
    draw = np.random.default_rng(0)
    shapes = [shape(n, p, t, t) for n, p, t in ((1, 64, 64), (2, 64, 128), (4, 64, 64), (2, 128, 256))]
    for _ in range(50):
        found = timing.fit(shapes, [s.slots * 1e-5 * draw.uniform(0.5, 1.5) for s in shapes])
        assert min(found.each, found.position, found.scored, found.pair) >= 0


def test_pairs_of_query_and_key_are_counted() -> None:
    """Witness: one by one."""
    own = sum(1 for q in range(3) for k in range(3) if k <= q)
    rows = sum(1 for length in (4, 2) for q in range(length) for k in range(3 + length) if k <= 3 + q)
    assert timing.pairs(shape(2, 3, 4, 2)) == 2 * (own + rows)


# --- micro_batch_tokens: auto ----------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the memory of the machine, in GB."""

    def put(size: float) -> None:
        monkeypatch.setattr("mlxpref.assembly.memory_of", lambda device: machine.Memory(int(size * GB), "cpu"))

    return put


def recorded(config: Config) -> Any:
    return read_yaml(Path(config.output.adapter_path) / "config.yaml")["batching"]["micro_batch_tokens"]


def test_auto_is_the_most_that_fits_and_is_written_down_as_a_number(configure: Any, room: Any) -> None:
    config = configure(**{"batching.micro_batch_tokens": "auto"})
    job = job_of(config, **fake_backend.device_info())
    middle = forecast(job, tokens=832).total / machine.SAFE_SHARE / GB
    room(middle + 1e-6)
    train(config, backend=fake_backend)
    chosen = recorded(config)
    above = budget.SIZES[budget.SIZES.index(chosen) + 1]
    assert forecast(job, tokens=chosen).total <= int((middle + 1e-6) * GB * machine.SAFE_SHARE)
    assert forecast(job, tokens=above).total > forecast(job, tokens=832).total


def test_a_resumed_run_keeps_its_number_on_a_machine_with_other_memory(configure: Any, room: Any) -> None:
    """Finds a run that goes on in other micro-batches than it began with."""
    config = configure(**{"batching.micro_batch_tokens": "auto"})
    small = forecast(job_of(config, **fake_backend.device_info()), tokens=512).total / machine.SAFE_SHARE / GB
    room(small + 1e-4)
    train(config, backend=fake_backend)
    number, before = recorded(config), (Path(config.output.adapter_path) / "adapters.safetensors").read_bytes()
    room(1000)
    train(config, backend=fake_backend, resume=True)
    assert recorded(config) == number
    assert (Path(config.output.adapter_path) / "adapters.safetensors").read_bytes() == before
    with pytest.raises(RunError, match="micro_batch_tokens"):
        train(configure(**{"batching.micro_batch_tokens": 64}), backend=fake_backend, resume=True)


def test_a_memory_too_small_for_any_budget_stops_the_run(configure: Any, room: Any) -> None:
    room(0.01)
    config = configure(**{"batching.micro_batch_tokens": "auto"})
    with pytest.raises(ConfigError, match="mlxpref plan"):
        train(config, backend=fake_backend)
    assert not Path(config.output.adapter_path, "config.yaml").exists()


@pytest.mark.parametrize("value", ["automatic", 0, 1.5, True])
def test_what_is_neither_a_number_nor_auto_is_refused(configure: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"batching\.micro_batch_tokens"):
        configure(**{"batching.micro_batch_tokens": value})


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture
def config_file(configure: Any, tmp_path: Path) -> str:
    from mlxpref.config_layers import dump_config

    file = tmp_path / "config.yaml"
    file.write_text(dump_config(configure()))
    return str(file)


def plan(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr("mlxpref.backends.get", lambda name="auto": fake_backend)
    return CliRunner().invoke(cli.main, ["plan", *words])


def test_no_model_is_loaded_unless_something_is_measured(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    before = fake_backend.calls["load_policy"]
    for words in (["--no-measure"], ["--memory", "16GB"], ["--tokens-per-second", "100"]):
        ran = plan(monkeypatch, "-c", config_file, *words)
        assert ran.exit_code == 0, ran.output
        assert "fits:" in ran.stdout and "6 steps" in ran.stdout
    assert fake_backend.calls["load_policy"] == before


def test_json_holds_what_the_tables_say(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    ran = plan(monkeypatch, "-c", config_file, "--tokens-per-second", "50", "--json")
    facts = json.loads(ran.stdout)
    assert facts["time"]["seconds"]["training"] == pytest.approx(facts["tokens"] / 50)
    device, host = facts["memory"]["device"], facts["memory"]["host"]
    assert facts["memory"]["total"] == sum(device.values()) + sum(host.values())
    assert facts["fits"] and facts["remedies"] == []


def test_what_does_not_fit_exits_with_1_and_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, config_file: str
) -> None:
    whole = json.loads(plan(monkeypatch, "-c", config_file, "--memory", "1000GB", "--json").stdout)["memory"]
    floor = sum(whole["host"].values())
    some = (floor + 0.8 * (whole["total"] - floor)) / machine.SAFE_SHARE
    ran = plan(monkeypatch, "-c", config_file, "--memory", f"{some / 1e6:.3f}MB")
    assert ran.exit_code == 1
    assert "does not fit" in ran.stdout and "--set batching.micro_batch_tokens=" in ran.stdout
    none = plan(monkeypatch, "-c", config_file, "--memory", "1MB")
    assert none.exit_code == 1 and "smaller model" in none.stdout


def test_two_speeds_are_one_too_many(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    ran = plan(monkeypatch, "-c", config_file, "--measure", "--tokens-per-second", "50")
    assert ran.exit_code == 2 and "--tokens-per-second" in ran.stderr


def test_another_machine_is_not_timed_here(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    ran = plan(monkeypatch, "-c", config_file, "--measure", "--memory", "16GB")
    assert ran.exit_code == 2 and "--memory" in ran.stderr


@pytest.mark.mlx
def test_a_measured_plan_gives_every_stage_its_time(config_file: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "mlxpref", "plan", "-c", config_file, "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    seconds = json.loads(ran.stdout)["time"]["seconds"]
    assert set(seconds) == {"training", "evaluations", "reference pass", "tracing", "all"}
    assert all(value > 0 for name, value in seconds.items() if name != "tracing")
    assert seconds["all"] == pytest.approx(sum(value for name, value in seconds.items() if name != "all"))
