"""How long data take before training, and how much memory: relabelled, tokenized, planned; whether both are flat.

    python scripts/bench_data.py --pairs pairs.jsonl --model MODEL --rows 60000
    python scripts/bench_data.py --pairs pairs.jsonl --model MODEL --sizes 10000,30000,60000 --json data.json

Pairs are repeated until they are as many as asked for, each repetition a little different, so that no two rows are the
same. ``mlxpref relabel`` writes both halves; another process reads them with the model's tokenizer, as training does,
and plans one epoch. Seconds are of the wall, starts and imports included; those of the CPU are of all processes. Memory
is that of the whole process tree: of each stage the largest sum of proportional set sizes (PSS), sampled, and the
largest resident size any one process reached (VmHWM); 0 elsewhere than on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

SAMPLED = 0.2
"""Seconds between two looks at the memory."""

TEXTS = ("prompt", "chosen", "rejected")


# --- pairs ---------------------------------------------------------------------------------------


def pairs(source: Path, n: int) -> Iterator[dict[str, Any]]:
    """``n`` pairs made of those in a file: in each repetition every text ends in its number, and so does the id."""
    found = [json.loads(line) for line in source.read_text(encoding="utf8").split("\n") if line.strip()]
    for at in range(n):
        row, again = dict(found[at % len(found)]), at // len(found)
        if again:
            row |= {name: f"{row[name]} ({again})" for name in TEXTS if isinstance(row.get(name), str)}
            row |= {"id": f"{row['id']}-{again}"} if "id" in row else {}
        yield row


def write_pairs(source: Path, n: int, out: Path) -> None:
    with out.open("w", encoding="utf8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs(source, n))


# --- memory --------------------------------------------------------------------------------------


class Memory:
    """Looks at a process and all that it started, until it is stopped."""

    def __init__(self, root: int) -> None:
        self.root, self.pss, self.largest, self.processes = root, 0, 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        if Path("/proc/self/smaps_rollup").exists():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLED):
            tree = family(self.root)
            self.pss = max(self.pss, sum(field(pid, "smaps_rollup", "Pss:") for pid in tree))
            self.largest = max([self.largest, *(field(pid, "status", "VmHWM:") for pid in tree)])
            self.processes = max(self.processes, len(tree))


def family(root: int) -> list[int]:
    """A process and its descendants."""
    found = [root]
    for pid in found:
        with suppress(OSError, ValueError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def field(pid: int, file: str, name: str) -> int:
    """A figure of a process in bytes; 0 if it is gone."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


def measured(call: Callable[[], subprocess.Popen[str]]) -> tuple[dict[str, Any], str]:
    """Seconds and memory of a command, and what it printed. SystemExit if it fails."""
    start, before = time.perf_counter(), os.times()
    process = call()
    with Memory(process.pid) as memory:
        said, _ = process.communicate()
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}\n{said}")
    return {
        "seconds": round(seconds, 2),
        "cpu": round(cpu, 2),
        "peak_pss": memory.pss,
        "largest_process": memory.largest,
        "processes": memory.processes,
    }, said


# --- stages --------------------------------------------------------------------------------------


def started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_and_plan(source: str, model: str, batch_size: int) -> None:
    """What the second process does: prints its seconds and what came out, as JSON."""
    start = time.perf_counter()
    from mlxpref.config_layers import load_config
    from mlxpref.data.plan import plan_steps
    from mlxpref.prepare import prepare

    found = prepare(load_config(base={"model": {"path": model}, "data": {"source": source}}))
    read = time.perf_counter()
    plan = plan_steps(found.train, batch_size=batch_size)
    done = time.perf_counter()
    facts = {
        "tokenize": round(read - start, 2), "plan": round(done - read, 2), "rows": len(found.train),
        "tokens": plan.tokens, "steps": len(plan.steps), "padding": round(plan.padding, 4),
        "fingerprint": found.fingerprint,
    }  # fmt: skip
    print(json.dumps(facts))


def bench(args: argparse.Namespace, n: int, folder: Path) -> dict[str, Any]:
    """One size, from text to plan."""
    source, out = folder / f"pairs-{n}.jsonl", folder / f"relabelled-{n}"
    write_pairs(args.pairs, n, source)
    relabel, _ = measured(lambda: started("-m", "mlxpref", "relabel", str(source), "--out", str(out)))
    second = ("--read", str(out), "--model", args.model, "--batch-size", str(args.batch_size))
    read, said = measured(lambda: started(__file__, *second))
    told = json.loads(said.strip().splitlines()[-1])
    total = relabel["seconds"] + read["seconds"]
    return {
        "pairs": n,
        "seconds": {
            "relabel": relabel["seconds"], "tokenize": told["tokenize"], "plan": told["plan"], "all": round(total, 2),
        },
        "seconds_per_10k": round(total * 10_000 / n, 2),
        "cpu": relabel["cpu"] + read["cpu"],
        "peak_pss": max(relabel["peak_pss"], read["peak_pss"]),
        "stages": {"relabel": relabel, "tokenize and plan": read},
        **{name: told[name] for name in ("rows", "tokens", "steps", "padding", "fingerprint")},
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What the figures are of."""
    import pyarrow
    import tokenizers
    import transformers

    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        names = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        cpu = next(islice(names, 1), f": {cpu}").partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu, "cores": cores, "system": platform.platform(terse=True), "python": platform.python_version(),
        "tokenizers": tokenizers.__version__, "transformers": transformers.__version__,
        "pyarrow": pyarrow.__version__,
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "| pairs | rows | relabel, s | tokenize, s | plan, s | all, s | s per 10k pairs | CPU, s | peak memory, MB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in found:
        s = one["seconds"]
        yield (
            f"| {one['pairs']:,} | {one['rows']:,} | {s['relabel']:.1f} | {s['tokenize']:.1f} | {s['plan']:.1f} | "
            f"{s['all']:.1f} | {one['seconds_per_10k']:.1f} | {one['cpu']:.1f} | {one['peak_pss'] / 1e6:,.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=Path, help="JSONL of pairs that are repeated")
    parser.add_argument("--model", help="model folder whose tokenizer reads them")
    parser.add_argument("--rows", type=int, default=60_000, help="pairs")
    parser.add_argument("--sizes", help="several numbers of pairs, one after the other: 10000,30000,60000")
    parser.add_argument("--batch-size", type=int, default=4, help="examples of a step")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read_and_plan(args.read, args.model, args.batch_size)
        return
    if args.pairs is None or args.model is None:
        parser.error("--pairs and --model say what is measured")
    found = []
    for n in [int(size) for size in args.sizes.split(",")] if args.sizes else [args.rows]:
        with tempfile.TemporaryDirectory(prefix="mlxpref-bench-") as folder:
            found.append(bench(args, n, Path(folder)))
        print(json.dumps(found[-1]), flush=True)
    here = machine()
    print("\n".join(table(found)))
    print(", ".join(f"{name} {value}" for name, value in here.items()))
    if args.json:
        args.json.write_text(json.dumps({"machine": here, "sizes": found}, indent=2) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
