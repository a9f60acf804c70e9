"""What the documents promise exists.

Finds: a link to a file that is not there, a command line in a document or a help text that the command
would refuse, a library that is imported and not declared, a file to pack that does not exist.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from document_commands import PAGES, ROOT, command_lines, fenced, statements

from mlxpref import cli
from mlxpref.data.recipe import Recipe
from mlxpref.records import Message

LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not dead, f"{page.name} links to {dead}"


def all_command_lines() -> list[tuple[str, list[str]]]:
    found = [(page.name, words) for page in PAGES for words in command_lines(fenced(page))]
    for name in cli.COMMANDS:
        help_text = CliRunner().invoke(cli.main, [name, "--help"], terminal_width=200).output
        found += [(f"{name} --help", words) for words in command_lines(help_text.partition("Example")[2])]
    return found


def refused(words: list[str]) -> str | None:
    """Why the command would not take these words; values are not looked at."""
    name, *rest = words
    if name not in cli.COMMANDS:
        return f"no command {name}"
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    try:
        _, extra, _ = command.make_parser(click.Context(command)).parse_args(rest)
    except click.UsageError as error:
        return f"{name}: {error.format_message()}"
    return f"{name}: what is {' '.join(extra)}?" if extra else None


def test_command_lines_in_documents_and_helps_are_right() -> None:
    lines = all_command_lines()
    assert {words[0] for _, words in lines} >= set(cli.COMMANDS), "every command is shown somewhere"
    wrong = [f"{where}: {problem}" for where, words in lines if (problem := refused(words))]
    assert not wrong, "\n".join(wrong)


def test_the_judge_of_command_lines_can_refuse() -> None:
    """Witness of the test above."""
    assert "--jsn" in str(refused(["env", "--jsn"]))
    assert refused(["env", "stray"]) == "env: what is stray?"
    assert refused(["trian"]) == "no command trian"
    assert refused(["env", "--json"]) is None


def test_commands_are_read_as_a_shell_reads_them() -> None:
    """A comment, a joined line, a quotation over two lines; and one that never ends is not passed over."""
    shell = 'a  --b "c d"   # why\n\n# nothing\ne \\\n  --f "g\nh # i"\nj\n'
    assert list(statements(shell)) == [["a", "--b", "c d"], ["e", "--f", "g\nh # i"], ["j"]]
    with pytest.raises(ValueError, match="no end of the quotation"):
        list(statements('a "b\nc\n'))


def test_the_goal_to_put_in_by_hand_is_the_recipes() -> None:
    """One word off, and a model is asked what it was never trained on."""
    _, goal_text = Recipe().write((Message("user", "Why is the sky blue?"),), 10.0)
    assert f'--system-prompt "{goal_text}"' in fenced(ROOT / "README.md")


def test_the_tree_names_every_room() -> None:
    tree = (ROOT / "README.md").read_text().partition("## Tree")[2]
    rooms = {path.name for path in (ROOT / "mlxpref").glob("*.py") if not path.name.startswith("__")}
    rooms |= {f"{path.parent.name}/" for path in (ROOT / "mlxpref").glob("*/__init__.py")}
    assert not {room for room in rooms if room not in tree}


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]


def test_what_is_imported_is_declared() -> None:
    """What only arrives with something else may leave with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = (extras[name] for name in ("torch", "tensorboard", "wandb", "swanlab"))
    lines = [*project["dependencies"], *(line for lines in optional for line in lines)]
    declared = {re.split(r"[\[<>=;]", line)[0].replace("-", "_").replace("pyyaml", "yaml") for line in lines}
    found = {name for file in (ROOT / "mlxpref").rglob("*.py") for name in imported(file)}
    assert not found - declared - sys.stdlib_module_names - {"mlxpref"}


def test_what_pip_is_told_to_pack_is_there() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["mlxpref"]
    assert not [pattern for pattern in patterns if not list((ROOT / "mlxpref").glob(pattern))]
