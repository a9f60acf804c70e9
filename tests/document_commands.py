"""The commands that documents show, taken out of their text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def fenced(page: Path, languages: str = "sh|bash|console|") -> str:
    """What stands in the fenced blocks of these languages, in order; the empty one is a block without any."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return "\n".join(text for language, text in blocks if language in languages.split("|"))


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every line that calls ``mlxpref``; a trailing backslash joins lines, a pipe ends one.

    Lines of prose may stand between them, as they do in a command's help.
    """
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"\s*(\$ )?mlxpref +[a-z]", line):
            call = re.split(r" [|>] ", line.strip().removeprefix("$ "))[0]
            yield shlex.split(call, comments=True)[1:]


def statements(shell: str) -> Iterator[list[str]]:
    """The words of every command of a text that holds nothing else; a quoted text may go over several lines.

    ValueError if a quotation is never closed.
    """
    begun = ""
    for line in shell.replace("\\\n", " ").splitlines():
        begun += line + "\n"
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # the quotation goes on in the next line
            continue
        begun = ""
        if words:
            yield words
    if begun:
        raise ValueError(f"no end of the quotation in {begun!r}")
