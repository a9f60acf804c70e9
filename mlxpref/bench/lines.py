"""A bench's figures as the lines of a table, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlxpref.bench.measuring import STEP, Measured
from mlxpref.data.words import counted
from mlxpref.facts import said_device

SHOWN = ("mlxpref", "mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "torch", "transformers")
"""Packages whose versions stand below the table; the JSON has all of them."""


def table(found: Measured) -> tuple[list[str], list[list[Any]]]:
    """Head and rows; a dash stands for None."""
    names = list(found.contestants)
    step = found.contestants[STEP].median
    all_ = [found.contestants[name] for name in names]
    rows: list[list[Any]] = [
        [f"seconds, median of {len(all_[0].seconds)}", *(one.median for one in all_)],
        ["  fastest", *(min(one.seconds) for one in all_)],
        ["  slowest", *(max(one.seconds) for one in all_)],
        ["seconds per pair", *(one.median / found.pairs for one in all_)],
        ["tokens/s", *(round(found.tokens / one.median) for one in all_)],
        ["time, × the step's", *(one.median / step for one in all_)],
        ["peak memory above weights, GB", *(_gb(one.above) for one in all_)],
        ["peak memory in all, GB", *(_gb(one.above, found.weights) for one in all_)],
        ["padded ÷ real tokens", *(one.padded for one in all_)],
        ["share of the matmul rate", *(found.share(name) for name in names)],
    ]
    return ["", *names], [row for row in rows if any(value is not None for value in row[1:])]


def _gb(count: int | None, more: int = 0) -> float | None:
    return None if count is None else (count + more) / 1e9


def lines(found: Measured) -> Iterator[tuple[str, str]]:
    """What a reader has to know to compare them, name and value."""
    facts = found.facts
    model, plan, rows = facts["model"], facts["plan"], facts["rows"]
    bits = ", 4 bits" if model["load_in_4bit"] else ""
    yield "model", (
        f"{model['path']} ({model['architecture']}, {model['parameters']:,} parameters, {model['dtype']}{bits}, "
        f"{found.weights / 1e9:.3g} GB)"
    )
    yield "trains", _trains(model) + f", {model['trainable']:,} parameters, {facts['optimizer']}"
    yield "objective", f"{', '.join(one['name'] for one in facts['objective'])}, prompts {model['way']}"
    responses = [n for of_row in rows["responses"] for n in of_row]
    yield "rows", (
        f"{counted(found.pairs, 'pair')}, {found.tokens:,} tokens: prompts {_range(rows['prompts'])}, responses "
        f"{_range(responses)}; {rows['said']}"
    )
    yield "batch", (
        f"{counted(plan['micro_batches'], 'micro-batch', 'micro-batches')} of at most {plan['micro_batch_tokens']:,} "
        f"tokens; over an epoch {plan['padded']:.3f} padded ÷ real tokens"
    )
    if found.rates:
        least = found.contestants[STEP].flops or 0.0
        said = f"{found.rate / 1e9:,.4g} GFLOP/s at the model's shapes"
        yield "matmul rate", f"{said}; the step needs {least / 1e9:,.4g} GFLOP at least"
    if found.agreement is not None:
        said = f"{found.agreement:.1e} relative to a plain four-forward step's gradients, smallest row"
        yield "gradient agreement", said
    device = facts["device"]
    yield "machine", said_device(device) + (f", {device['blas']}" if "blas" in device else "")
    known = facts["versions"]
    shown = ", ".join(f"{name} {known[name]}" for name in SHOWN if name in known)
    yield "versions", f"{shown}, Python {known['python']}, {known['platform']}"
    if facts["commit"]:
        yield "commit", facts["commit"][:12]
    yield from (("note", text) for text in (*found.notes, *device.get("remarks", ())))


def _trains(model: dict[str, Any]) -> str:
    trained, layers = model["trained_layers"], model["layers"]
    where = "all layers" if trained == layers else f"the last {trained} of {layers} layers"
    again = ", checkpointed" if model["grad_checkpoint"] else ""
    if model["fine_tune_type"] == "full":
        return f"the weights of {where}{again}"
    return f"{model['fine_tune_type']} of rank {model['lora_parameters']['rank']} in {where}{again}"


def _range(lengths: list[int]) -> str:
    least, most = min(lengths), max(lengths)
    return str(least) if least == most else f"{least}–{most}"


def as_dict(found: Measured) -> dict[str, Any]:
    """All figures, JSON-safe; times in seconds, memory in bytes, rates in FLOP/s."""
    return {
        "contestants": {
            name: {
                "seconds": list(one.seconds),
                "median": one.median,
                "seconds_per_pair": one.median / found.pairs,
                "tokens_per_second": found.tokens / one.median,
                "times_the_step": one.median / found.contestants[STEP].median,
                "memory_above_weights": one.above,
                "least_flops": one.flops,
                "padded": one.padded,
                "matmul_share": found.share(name),
            }
            for name, one in found.contestants.items()
        },
        "matmul_rate": found.rate if found.rates else None,
        "matmul_rates": list(found.rates),
        "weights": found.weights,
        "gradient_agreement": found.agreement,
        "pairs": found.pairs,
        "tokens": found.tokens,
        "notes": list(found.notes),
        **found.facts,
    }
