"""``mlxpref columns``: what objectives need beside responses and scores, computed by models."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import click

from mlxpref.cli import console
from mlxpref.cli.policies import machine_options
from mlxpref.cli.sources import Reading, source_options
from mlxpref.columns import COLUMNS, SCORES, Added, Wanted, add_columns
from mlxpref.data.relabelled import is_relabelled
from mlxpref.errors import UsageError
from mlxpref.reference import default_store_folder

WHAT = "\n".join(f"  {name:<16} {text}" for name, text in COLUMNS.items())

EPILOG = f"""\b
Columns:
{WHAT}

\b
Example:
  mlxpref columns relabelled --add previous --adapter-path round1 --out round2
  mlxpref columns relabelled --add margin_rewards --adapter-path helpful --adapter-path harmless --out both
  mlxpref columns pairs.jsonl --add third --model mlx-community/Qwen3-0.6B-4bit --max-tokens 512 --out with-third
  mlxpref columns lists.jsonl --add confidence --adapter-path round2 --previous-adapter round1 --out sure
  mlxpref columns pairs.jsonl --add implicit_reward --adapter-path dpo --out scored
  mlxpref relabel scored --score implicit_reward --mapping quantile --out relabelled

\b
{", ".join(SCORES)} speak before goals are written: of data that
are not relabelled. All others are of the rows as they are trained on, goals included. Log-probs are
sums of nats over a response's tokens, its end token included, cut as --max-length says.
"""


@click.command(epilog=EPILOG)
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Folder to write.")
@click.option(
    "--add",
    multiple=True,
    metavar="WHAT",
    help="Column to add, of those below; may be given several times.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="FOLDER|ID",
    help="Model folder or hub id; for aligned_logps several times. With an adapter: its base, where that has moved.",
)
@click.option(
    "--adapter-path",
    "adapters",
    multiple=True,
    metavar="FOLDER",
    help="Adapter or run folder; for aligned_logps and margin_rewards several times.",
)
@click.option(
    "--previous-adapter",
    metavar="FOLDER",
    help="The adapter of the round before, for confidence; implicit_reward is measured against it instead of the base.",
)
@click.option("--strong", metavar="FOLDER|ID", help="Better aligned model or adapter, for density_ratio.")
@click.option("--weak", metavar="FOLDER|ID", help="Its less aligned sibling, of the same tokenizer.")
@click.option("--beta", type=float, metavar="X", help="Factor of margin_rewards and implicit_reward.  [default: 0.1]")
@click.option(
    "--length-penalty",
    type=float,
    metavar="ALPHA",
    help="Taken off implicit_reward for each character of the response.  [default: 0]",
)
@click.option("--max-tokens", type=int, metavar="N", help="Tokens of third at most.  [default: 256]")
@click.option("--normalised", is_flag=True, help="Divide the sums of ches by the numbers of tokens.")
@source_options(split="each of train, valid and test there is")
@click.option(
    "--max-length",
    type=click.IntRange(8),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens of prompt and response at most, as in the training to come.",
)
@click.option(
    "--max-prompt-length",
    type=click.IntRange(4),
    metavar="N",
    show_default="half of --max-length",
    help="Tokens a prompt is cut down to first.",
)
@click.option(
    "--truncation",
    type=click.Choice(["cut", "drop"]),
    default="cut",
    show_default=True,
    help="What happens to rows that are too long.",
)
@click.option(
    "--micro-batch-tokens",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    metavar="N",
    help="Padded tokens of one forward pass.",
)
@click.option(
    "--file-format",
    type=click.Choice(["jsonl", "parquet"]),
    help="Format of the files written.  [default: that of relabelled data, else jsonl]",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Folder that keeps reference log-probs.  [default: the user's cache]",
)
@click.option("--no-store", is_flag=True, help="Keep no reference log-probs, and use none.")
@click.option(
    "--model-revision",
    "revision",
    metavar="REV",
    help="Branch, tag or commit of a --model on the hub; an adapter names its own.",
)
@machine_options
def command(data: str, out: Path, reading: Reading, store: Path | None, no_store: bool, **options: Any) -> None:
    """Compute columns that objectives need, and write DATA again with them.

    DATA is a file, a folder, a hub id, or what `mlxpref relabel` wrote. Relabelled data stay relabelled data; others
    become a folder that train, relabel and evaluate read like any data. The models load one after the other.
    """
    if store is not None and no_store:
        raise UsageError("--store and --no-store contradict each other")
    if is_relabelled(data):
        reading.check_relabelled(data)
    names = Wanted.__dataclass_fields__
    wanted = Wanted(**{name: options.pop(name) for name in names if name in options})
    with closing(console.Stages()) as report:
        added = add_columns(
            reading.spec(data), out, wanted,
            store=None if no_store else store or default_store_folder(),
            strict=reading.strict, say=_say, report=report, **options,
        )  # fmt: skip
    _show(added, out)


def _say(line: str) -> None:
    """A note, or a warning where it begins with that word."""
    before, sign, text = line.partition("warning: ")
    if sign and not before:
        console.warn(text)
    else:
        console.note(line)


def _show(added: Added, out: Path) -> None:
    for stage, counts in added.counts.items():
        for line in counts.lines():
            console.note(f"{stage}: {line}")
    for name in added.replaced:
        console.warn(f"the data had a column {name}; it is replaced")
    console.table(("split", "rows"), list(added.rows.items()))
    console.say(f"written to {out}")
