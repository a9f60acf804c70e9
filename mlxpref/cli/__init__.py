"""The command ``mlxpref``. A command's module is imported when that command is asked for, so that
``mlxpref --help`` waits for no array framework."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys

import click

from mlxpref.cli import console
from mlxpref.errors import MlxprefError

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("mlxpref.cli.quickstart", "See the method at work on a small written world."),
    "relabel": ("mlxpref.cli.relabel", "Write each pair's scores into its prompt."),
    "columns": ("mlxpref.cli.columns", "Add columns that objectives need, computed by models."),
    "inspect": ("mlxpref.cli.inspect", "Look at tokenized examples, scored tokens marked."),
    "plan": ("mlxpref.cli.plan", "Say what a run takes, and whether it fits, before it starts."),
    "train": ("mlxpref.cli.train", "Train an adapter on preferences."),
    "ablate": ("mlxpref.cli.ablate", "Compare runs with some settings varied, over several seeds."),
    "evaluate": ("mlxpref.cli.evaluate", "Measure an adapter, or a model without one, on pairs."),
    "control": ("mlxpref.cli.control", "Ask for several qualities, and score what is written."),
    "winrate": ("mlxpref.cli.winrate", "How often one policy's responses are preferred to another's."),
    "diagnose": ("mlxpref.cli.diagnose", "Say what is wrong with a run, and what to change."),
    "report": ("mlxpref.cli.report", "Write a run, or several, as a page to look at."),
    "generate": ("mlxpref.cli.generate", "Answer prompts at one or several goals."),
    "outputs": ("mlxpref.cli.outputs", "Answer a standard benchmark's questions, for its own judge."),
    "chat-template": ("mlxpref.cli.chat_template", "Have a fused model ask itself for a goal."),
    "merge": ("mlxpref.cli.merge", "Combine adapters into one, or carry one further."),
    "convert": ("mlxpref.cli.convert", "Carry an adapter over between mlx-lm and PEFT."),
    "parity": ("mlxpref.cli.parity", "Compare what two backends, or two machines, compute."),
    "objectives": ("mlxpref.cli.objectives", "List objectives, their formulas and options."),
    "bench": ("mlxpref.cli.bench", "Measure a training step on this machine."),
    "probe": ("mlxpref.cli.probe", "Say which way a model's forward pass takes."),
    "doctor": ("mlxpref.cli.doctor", "Check the machine, and a configuration, before a run."),
    "env": ("mlxpref.cli.env", "Report device, versions, memory and BLAS."),
}
"""Name -> (module with a click command ``command``, one line of help), in the order of use."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_DISK = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded"}
_ACCESS = {errno.EACCES: "permission denied", errno.EROFS: "read-only file system"}


class LazyGroup(click.Group):
    """Lists its commands from the table above and imports only the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; what the user can mend becomes one message and an exit code."""
        try:
            return super().invoke(ctx)
        except MlxprefError as error:
            console.fail(str(error))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            console.fail("interrupted")
            ctx.exit(INTERRUPTED)
        except OSError as error:
            what = (_DISK | _ACCESS).get(error.errno or 0)
            if what is None:
                raise
            console.fail(f"{what}: {error.filename or 'while writing'}")
            ctx.exit(1)


EPILOG = """\b
Example:
  mlxpref relabel pairs.jsonl --out relabelled --valid-fraction 0.1
  mlxpref train --model mlx-community/Qwen3-0.6B-4bit --data relabelled --adapter-path adapter
  mlxpref evaluate relabelled --adapter-path adapter
  mlxpref generate "Why is the sky blue?" --adapter-path adapter
"""


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="mlxpref", message="mlxpref %(version)s")
def main() -> None:
    """Preference training on your own machine: scored pairs in, an adapter that knows the quality it
    is asked for out. Nothing leaves the machine unless you ask for it."""
    _keep_libraries_quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that a terminal lacks is no reason to stop
            stream.reconfigure(errors="replace")


def _keep_libraries_quiet() -> None:
    """Settings of libraries a command may load; what the user has set stays."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
