"""Train every objective for some steps on real pairs, plain and reward-conditioned, and look whether it learns.

    python scripts/try_objectives.py --model MODEL --pairs PAIRS.jsonl --lists LISTS.jsonl --out tried.json

The same few examples make up every batch, so a loss that is convex in the log-probs has to fall. Columns that the
data do not have are made up from those they have (a third response is a cut one, a rationale quotes the
scores, …): what is shown is that the way from a data file to an update is whole, and nothing about quality.
Each run is interrupted by nothing; states are tested elsewhere. Prints a line a run; exit code 1 if any is not
finite, or does not fall where it must.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxpref.config import Config
from mlxpref.config_layers import check_config
from mlxpref.errors import MlxprefError
from mlxpref.objectives import TABLE
from mlxpref.train import train

CONVEX = frozenset(
    {
        "dpo", "robust", "ipo", "ipo_norm", "hinge", "ln_dpo", "r_dpo", "dpop", "rpo", "bco_pair", "sppo", "sppo_hard",
        "minor_dpo", "flex_dpo", "sft", "simpo", "cpo", "slic", "triple_po", "poft", "distilled_dpo", "soft_label_dpo",
        "odpo", "mm_dpo", "modpo", "cream", "ld_dpo", "d2po", "mcts_dpo", "list_mle", "experimental_info_nca",
        "rationale_dpo", "dove", "selm", "xpo", "inpo", "aot", "aot_unpaired",
    }
)  # fmt: skip
"""In the policy's log-probs, or all but: their loss falls on examples that are seen again and again."""

LISTWISE = frozenset(name for name, entry in TABLE.items() if entry.lists and name not in ("sft", "poft"))
CHARACTERS = 100
"""Of a response; the models at hand know 512 tokens, and every batch is read twenty times."""


def with_columns(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A scored row with every column an objective can ask for."""
    answers = row.get("responses")
    texts = [a["text"] for a in answers] if answers else [row["chosen"], row["rejected"]]
    texts = [text[:CHARACTERS] for text in texts]
    n = len(texts)
    cut = [{**a, "text": text} for a, text in zip(answers or (), texts, strict=bool(answers))]
    return {
        **row,
        **({"responses": cut} if answers else {"chosen": texts[0], "rejected": texts[1]}),
        "third": texts[0][: CHARACTERS // 2] + " The end.",
        "gold": texts[0],
        "rationale": "It says more, and what it says is true.",
        "group": ("short", "long")[len(texts[0]) > len(texts[1])],
        "previous": [-2.5 * len(text) / 2 for text in texts],
        "aligned_logps": [-2.0 - 0.1 * k for k in range(n)],
        "margin_rewards": [0.5 - 0.1 * k for k in range(n)],
        "confidence": 0.6 + 0.05 * (index % 8),
        "token_weights": [
            [{"text": text[:40], "weight": 0.5}, {"text": text[40:], "weight": 1.5}] if len(text) > 40
            else [{"text": text, "weight": 1.0}]
            for text in texts
        ],
    }  # fmt: skip


def written(source: Path, out: Path, n: int) -> Path:
    """The first ``n`` usable rows of a file, with all columns."""
    rows: list[str] = []
    for line in source.open(encoding="utf-8"):
        row = json.loads(line)
        answers = row.get("responses")
        scores = [a["score"] for a in answers] if answers else [row["score_chosen"], row["score_rejected"]]
        texts = [a["text"] for a in answers] if answers else [row["chosen"], row["rejected"]]
        if len({str(s) for s in scores}) > 1 and all(len(t.strip()) > 60 for t in texts) and len(row["prompt"]) < 300:
            rows.append(json.dumps(with_columns(row, len(rows))))
        if len(rows) == n:
            break
    out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return out


def joint(pairs: Path, out: Path) -> Path:
    """Pairs as joints of instruction and response; the other side has the next row's instruction."""
    rows = [json.loads(line) for line in pairs.open(encoding="utf-8")]
    found = [
        {
            "i_chosen": row["prompt"], "r_chosen": row["chosen"],
            "i_rejected": other["prompt"], "r_rejected": other["rejected"],
        }
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]  # fmt: skip
    out.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return out


def attributed(pairs: Path, out: Path) -> Path:
    """Pairs as lists of two, each response scored by two more models."""
    rows = []
    for line in pairs.open(encoding="utf-8"):
        row = json.loads(line)
        scores = {side: row[f"score_{side}"] for side in ("chosen", "rejected")}
        answers = [
            {"text": row[side], "score": score, "attributes": {"help": score, "truth": 11 - score / 2}}
            for side, score in scores.items()
        ]
        rows.append(json.dumps({"prompt": row["prompt"], "responses": answers}))
    out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return out


def configuration(name: str, conditioned: bool, args: argparse.Namespace, data: Path, folder: Path) -> Config:
    relabel: dict[str, Any] = {"template": "Give an answer of score {score}."}
    relabel |= {"mapping": "affine", "score_range": [1, 5] if name in LISTWISE else [1, 10]}
    if name == "experimental_e_dpo":  # reads attributes, so goals are of attributes, too
        relabel = {"attributes": ["help", "truth"], "score_range": [1, 10], "mapping": "identity"}
        relabel["template"] = "Give an answer of help {help} and truth {truth}."
    return check_config(
        {
            "model": {"path": str(args.model)},
            "data": {"source": str(data)},
            "relabel": relabel if conditioned else None,
            "tokenization": {"max_length": 480},
            "batching": {"batch_size": args.rows * (2 if conditioned else 1), "shuffle": False},
            "adapter": {"num_layers": 2, "lora_parameters": {"rank": 8, "scale": 2.0}},
            "objective": {"name": name},
            "optimizer": {"learning_rate": args.rate},
            "training": {"epochs": args.steps, "save_every": 10_000, "seed": 0},
            "reference": {"store": str(folder.parent / "reference")},
            "output": {"adapter_path": str(folder)},
        }
    )


def tried(name: str, conditioned: bool, args: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """One run: its losses, first and last, and what is wrong with them."""
    started = time.perf_counter()
    train(configuration(name, conditioned, args, data, folder))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    skipped = json.loads(lines[-1])["skipped_steps"]
    last = sum(losses[-3:]) / 3
    problem = ""
    if skipped or not all(math.isfinite(loss) for loss in losses):
        problem = f"{skipped} steps were not finite"
    elif name in CONVEX and not last < losses[0]:
        problem = "does not fall"
    elif len(set(losses)) == 1:
        problem = "does not move"
    return {
        "objective": name, "conditioned": conditioned, "steps": len(losses), "first": losses[0], "last": last,
        "convex": name in CONVEX, "seconds": round(time.perf_counter() - started, 1), "problem": problem,
    }  # fmt: skip


def runs(names: list[str]) -> Iterator[tuple[str, bool]]:
    for name in names:
        yield name, False
        if name != "dove":  # its prompts differ between the sides: no goal can be written into both
            yield name, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--pairs", type=Path, required=True, help="JSONL of scored pairs")
    parser.add_argument("--lists", type=Path, required=True, help="JSONL of scored lists")
    parser.add_argument("--objective", action="append", help="only this one; may be given again  [default: all]")
    parser.add_argument("--steps", type=int, default=20, help="updates of each run  [default: 20]")
    parser.add_argument("--rows", type=int, default=2, help="examples, all in every batch  [default: 2]")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate  [default: 1e-3]")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pairs = written(args.pairs, folder / "pairs.jsonl", args.rows)
        lists = written(args.lists, folder / "lists.jsonl", args.rows)
        files = {"dove": joint(pairs, folder / "joint.jsonl")} | dict.fromkeys(LISTWISE, lists)
        files["experimental_e_dpo"] = attributed(pairs, folder / "attributed.jsonl")
        for name, conditioned in runs(args.objective or list(TABLE)):
            run = folder / f"{name}-{'conditioned' if conditioned else 'plain'}"
            try:
                line = tried(name, conditioned, args, files.get(name, pairs), run)
            except MlxprefError as error:
                line = {"objective": name, "conditioned": conditioned, "problem": str(error)}
            found.append(line)
            print(json.dumps(line, ensure_ascii=False), flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    bad = [line for line in found if line["problem"]]
    print(f"{len(found)} runs, {len(bad)} with a problem")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
