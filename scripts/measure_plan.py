"""What ``mlxpref plan`` predicts, against what training then takes: peak memory and time, config by config.

    python scripts/measure_plan.py                  # all cases, a table
    python scripts/measure_plan.py --only lora dora # some
    python scripts/measure_plan.py --no-time        # memory alone, which is quicker
    python scripts/measure_plan.py --out figures.json

For each case a model with random weights is written to a temporary folder and rows of random tokens are planned. One
process predicts the run's memory and time, as `mlxpref plan` does; another then runs it. Measured are the
largest `mx.get_peak_memory()`, weights included, and the seconds of the reference pass and all steps, tracing included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref import backends, sandbox
from mlxpref.assembly import Assembly
from mlxpref.callbacks import TrainCallback
from mlxpref.config import Config
from mlxpref.config_layers import load_config
from mlxpref.data.batching import collate_step
from mlxpref.data.columns import available_columns
from mlxpref.objectives import resolve_objective
from mlxpref.planning.forecast import Job, forecast, make_job
from mlxpref.planning.plans import max_shapes
from mlxpref.planning.timing import expected, measure
from mlxpref.prepare import Prepared
from mlxpref.records import Tokenized
from mlxpref.reference import logps_pass
from mlxpref.runs import RunFolder
from mlxpref.tensors import Tensor, write_tensors

MODEL: Mapping[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "hidden_act": "silu", "vocab_size": 16384, "tie_word_embeddings": False,
    "eos_token_id": 1, "bos_token_id": None, "dtype": "float32", "model_type": "llama",
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A configuration to predict and to run.

    Attributes:
        model: changes of ``MODEL``'s config.json. settings: of the run.
        lengths: of prompts, and of responses: from, to.
        k: responses of each row. rows: how many.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[int, int] = (120, 180)
    responses: tuple[int, int] = (180, 420)
    k: int = 2
    rows: int = 48


QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
SHORT = {"prompts": (96, 160), "responses": (30, 90)}

CASES: Mapping[str, Case] = {
    "lora": Case(QWEN2),
    "lora-short": Case(**SHORT, rows=96),
    "lora-large-budget": Case(QWEN2, {"batching.micro_batch_tokens": 16384, "batching.batch_size": 12}),
    "lora-wide": Case(
        {**QWEN3, "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4, "intermediate_size": 2048},
        {"adapter.lora_parameters.rank": 32, "batching.micro_batch_tokens": 2048},
    ),
    "few-layers": Case(settings={"adapter.num_layers": 2}),
    "some-modules": Case(settings={"adapter.lora_parameters.keys": ["self_attn.q_proj", "self_attn.v_proj"]}),
    "dora": Case(settings={"adapter.fine_tune_type": "dora"}, **SHORT),
    "full": Case({**QWEN2, "num_hidden_layers": 4}, {"adapter.fine_tune_type": "full"}, **SHORT),
    "full-top": Case(settings={"adapter.fine_tune_type": "full", "adapter.num_layers": 3}),
    "4-bit": Case(settings={"model.load_in_4bit": True}, **SHORT, rows=24),
    "bfloat16": Case({"num_hidden_layers": 3}, {"model.dtype": "bfloat16"}, **SHORT, rows=16),
    "checkpoint": Case(QWEN2, {"training.grad_checkpoint": True}),
    "long": Case({"num_hidden_layers": 4}, prompts=(200, 300), responses=(1400, 1800), rows=6),
    "long-checkpoint": Case(
        {"num_hidden_layers": 4}, {"training.grad_checkpoint": True}, (200, 300), (1400, 1800), rows=6
    ),
    "lists-of-4": Case(settings={"objective.name": "list_mle"}, k=4, responses=(60, 200), rows=24),
    "small-vocabulary": Case({"vocab_size": 2048}),
    "large-vocabulary": Case({"vocab_size": 131072, "num_hidden_layers": 4}, rows=16),
    "sgd": Case(settings={"optimizer.name": "sgd", "adapter.num_layers": 4}),
}


def write_model(folder: Path, changes: Mapping[str, Any], *, seed: int = 0) -> None:
    """A random model with the sandbox's tokenizer."""
    config = {**MODEL, **changes}
    draw = np.random.default_rng(seed)
    shapes = list(_shapes(config))
    tensors = {}
    for name, shape in shapes:
        value = draw.standard_normal(shape, np.float32) / np.sqrt(shape[-1]) if len(shape) > 1 else np.ones(shape)
        tensors[name] = Tensor("F32", shape, partial(np.asarray, value, np.float64))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tensors(folder / "model.safetensors", tensors)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sandbox.MODEL / file, folder / file)


def _shapes(config: Mapping[str, Any]):
    hidden, inner, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{at}self_attn.{name}_proj.weight", (outputs, hidden)
            if kind == "qwen2":
                yield f"{at}self_attn.{name}_proj.bias", (outputs,)
        yield f"{at}self_attn.o_proj.weight", (hidden, queries)
        if kind == "qwen3":
            yield from ((f"{at}self_attn.{name}_norm.weight", (config["head_dim"],)) for name in "qk")
        yield from ((f"{at}mlp.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up"))
        yield f"{at}mlp.down_proj.weight", (hidden, inner)
        yield from ((f"{at}{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def rows_of(case: Case, vocabulary: int, *, seed: int = 1) -> tuple[Tokenized, ...]:
    draw = np.random.default_rng(seed)

    def ids(span: tuple[int, int]) -> np.ndarray:
        return draw.integers(2, vocabulary, draw.integers(*span)).astype(np.int32)

    return tuple(
        Tokenized(
            ids(case.prompts), tuple(ids(case.responses) for _ in range(case.k)), str(row),
            scores=tuple(float(case.k - place) for place in range(case.k)),
        )
        for row in range(case.rows)
    )  # fmt: skip


def config_of(case: Case, folder: Path) -> Config:
    base = {
        "model": {"path": str(folder)}, "data": {"source": str(folder)},
        "adapter": {"num_layers": -1}, "batching": {"batch_size": 4, "micro_batch_tokens": 4096},
    }  # fmt: skip
    settings = dict(case.settings)
    if settings.get("adapter.fine_tune_type") == "full":
        settings.setdefault("adapter.num_layers", -1)
    return load_config(base=base, overrides=list(settings.items()))


def predict(name: str, folder: Path, *, timed: bool) -> dict[str, Any]:
    """What ``mlxpref plan`` would say of a case whose model lies in a folder."""
    assembly, job = _assembled(name, folder)
    found = forecast(job)
    facts: dict[str, Any] = {"case": name, "predicted": found.peak.total, "parts": dict(found.peak.parts)}
    if timed:
        policy, step = assembly.policy_and_step(job.data)
        with assembly.machine.set_memory_policy():
            facts["predicted_seconds"] = expected(found, measure(job, found, assembly.machine, policy, step))
    return facts


def make_steps(name: str, folder: Path, *, whole: bool) -> dict[str, Any]:
    """Train a case, reference pass first; if not the whole of it, the steps of the largest shapes."""
    assembly, job = _assembled(name, folder)
    policy, step = assembly.policy_and_step(job.data)
    found, machine, rows, objective = forecast(job), assembly.machine, job.data.train, job.objective
    steps = list(found.train.steps)
    if not whole:
        largest = set(found.train.shapes[:2])
        steps = ([step for step in steps if any(part.shape in largest for part in step)] or steps)[:3]
    columns = objective.reads & (objective.from_data | available_columns(rows))
    with machine.set_memory_policy():
        began = time.perf_counter()
        reference = _reference(assembly, job, policy, steps) if job.has_reference_pass else None
        for parts in steps:
            step(collate_step(rows, parts, reference, columns), 1e-5)
        seconds = time.perf_counter() - began
        return {"measured": int(machine.memory()["peak"] * 1e9), "seconds": seconds, "steps": len(steps)}


def _reference(assembly: Assembly, job: Job, policy: Any, steps: Sequence[Any]) -> list[list[np.ndarray]]:
    """Log-probs of the rows of these steps; of the others none."""
    asked = sorted({row for parts in steps for part in parts for row in part.rows})
    found: list[list[np.ndarray]] = [[] for _ in job.data.train]
    computed = logps_pass(
        [job.data.train[row] for row in asked], assembly.machine, policy,
        reference=policy.fine_tune_type != "full", micro_batch_tokens=job.config.batching.budget,
        max_shapes=max_shapes(job.config, 4, job.data.train),
    )  # fmt: skip
    for row, logps in computed:
        found[asked[row]] = logps
    return found


def _assembled(name: str, folder: Path) -> tuple[Assembly, Job]:
    case = CASES[name]
    config = config_of(case, folder)
    machine, objective = backends.get(config.model.backend), resolve_objective(config.objective)
    data = Prepared(rows_of(case, {**MODEL, **case.model}["vocab_size"]), (), None, {}, (), "")
    assembly = Assembly(config, objective, machine, RunFolder(folder), TrainCallback(), lambda: datetime.now(UTC), data)
    return assembly, make_job(config, objective, data, device=machine.device_info())


def one_case(name: str, *, timed: bool) -> dict[str, Any]:
    """Predict, then run, each in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        write_model(Path(temporary), CASES[name].model)
        facts: dict[str, Any] = {"case": name}
        for phase in ("predict", "run"):
            command = [sys.executable, __file__, "--case", name, "--phase", phase, "--folder", temporary]
            ran = subprocess.run(
                [*command, *([] if timed else ["--no-time"])], capture_output=True, text=True, check=False
            )
            if ran.returncode:
                return {"case": name, "error": ran.stderr.strip().splitlines()[-1:]}
            facts |= json.loads(ran.stdout.splitlines()[-1])
    return facts


def _line(facts: Mapping[str, Any]) -> str:
    if "error" in facts:
        return f"{facts['case']:<18} {facts['error']}"
    ratio = facts["predicted"] / facts["measured"]
    line = f"{facts['case']:<18} {facts['predicted'] / 1e6:9.1f} {facts['measured'] / 1e6:9.1f} {ratio:6.2f}"
    if "predicted_seconds" in facts:
        seconds = facts["predicted_seconds"]["all"]
        line += f" {seconds:9.1f} {facts['seconds']:9.1f} {seconds / facts['seconds']:6.2f}"
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="cases to run; all by default")
    parser.add_argument("--no-time", action="store_true", help="memory alone")
    parser.add_argument("--parts", action="store_true", help="print the predicted parts, too")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    for hidden in ("--case", "--phase", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case:
        folder, timed = Path(given.folder), not given.no_time
        found = (
            predict(given.case, folder, timed=timed)
            if given.phase == "predict"
            else make_steps(given.case, folder, whole=timed)
        )
        print(json.dumps(found))
        return
    print(f"{'case':<18} {'plan MB':>9} {'peak MB':>9} {'ratio':>6} {'plan s':>9} {'run s':>9} {'ratio':>6}")
    everything = []
    for name in given.only or CASES:
        facts = one_case(name, timed=not given.no_time)
        everything.append(facts)
        print(_line(facts), flush=True)
        if given.parts:
            print("   ", {key: round(size / 1e6, 1) for key, size in facts.get("parts", {}).items()})
    if given.out:
        given.out.write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
