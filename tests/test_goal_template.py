"""A chat template that states a goal: token for token what asking by the recipe gives, for any conversation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fakes
import pytest
from click.testing import CliRunner

from mlxpref.data.goal_template import goal_template
from mlxpref.data.recipe import Recipe
from mlxpref.data.render import render_prompt
from mlxpref.data.tokenization import encode_prompt, load_tokenizer
from mlxpref.errors import DataError, UsageError
from mlxpref.evaluate import evaluate
from mlxpref.generate import ask, text_question
from mlxpref.records import Message, Scored

CONVERSATIONS = [
    [("user", "Why?")],
    [("system", "Be brief."), ("user", "Why?")],
    [("system", " "), ("user", "Why?")],
    [("developer", "Be brief."), ("user", "Why?")],
    [("user", "Why?"), ("assistant", "So."), ("user", "Why 'so' {{ 1 }}\n?")],
]

TEMPLATE = (
    "{% macro turn(m) %}<{{ m['role'] }}>{{ m['content'] }}\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["one", "system", "empty-system", "developer", "three"])
@pytest.mark.parametrize("carrier", ["system", "first_user"])
@pytest.mark.parametrize("words", ["Score {score}:\n\"top\" \\n é 🎯 'it'.", "Overall score: {score}."])
def test_it_asks_as_the_recipe_does(
    chat_tokenizer: Any, conversation: list[tuple[str, str]], carrier: Any, words: str
) -> None:
    """Finds a goal stated twice or in another turn, an escape that is read, white space before or after."""
    recipe = Recipe(template=words, carrier=carrier)
    prompt = tuple(Message(*turn) for turn in conversation)
    before = chat_tokenizer.chat_template
    try:
        for template in (before, TEMPLATE):
            chat_tokenizer.chat_template = template
            wanted = render_prompt(recipe.write(prompt, 8.0)[0], chat_tokenizer)
            chat_tokenizer.chat_template = goal_template(template, recipe, 8.0)
            turns = [turn.as_dict() for turn in prompt]
            found = chat_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            assert found == wanted
    finally:
        chat_tokenizer.chat_template = before


def test_what_was_said_may_be_in_parts() -> None:
    """As callers of servers send it, and many templates take it."""
    from jinja2 import Environment

    template = "{% for m in messages %}{% for part in m['content'] %}<{{ part['text'] }}>{% endfor %}{% endfor %}"
    turns = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    written = goal_template(template, Recipe(carrier="first_user", template="Score {score}."), 8)
    assert Environment().from_string(written).render(messages=turns).strip() == "<Score 8.><Why?>"


def test_no_template_states_two_goals(chat_tokenizer: Any) -> None:
    before = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = goal_template(before, Recipe(), 8)
    try:
        with pytest.raises(UsageError, match="states a goal by itself"):
            ask(text_question("Why?"), 2.0, Recipe(), chat_tokenizer)
        assert ask(text_question("Why?"), None, None, chat_tokenizer).goal is None
        pair = Scored((Message("user", "Why?"),), ("So.", "Perhaps."), None, "0")
        policy = fakes.FakePolicy(fakes.table(1), fakes.table(2))
        assert evaluate([pair], fakes.backend(), policy, chat_tokenizer).metrics["examples"] == 1
    finally:
        chat_tokenizer.chat_template = before
    with pytest.raises(DataError, match="states a goal already"):
        goal_template(goal_template(TEMPLATE, Recipe(), 8), Recipe(), 9)


@pytest.mark.parametrize("in_config", [False, True])
def test_the_command_writes_where_libraries_look(tmp_path: Path, tiny_model_dir: Path, in_config: bool) -> None:
    """Finds a template that another program does not read, and a folder half written."""
    from mlxpref.cli import main

    folder = tmp_path / "fused"
    shutil.copytree(tiny_model_dir, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if in_config:
        settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "recipe.json").write_text(json.dumps(Recipe().as_dict()))
    asked = ["chat-template", str(folder), "--recipe", str(tmp_path / "recipe.json"), "--goal", "7"]
    shown = CliRunner().invoke(main, [*asked, "--show"])
    assert shown.exit_code == 0 and "score: 7." in shown.stdout and "score: 7." not in (
        folder / "chat_template.jinja").read_text()  # fmt: skip
    before = load_tokenizer(str(folder))
    prompt = (Message("user", "Why?"),)
    wanted = encode_prompt(Recipe().write(prompt, 7)[0], before)
    ran = CliRunner().invoke(main, asked)
    assert ran.exit_code == 0, ran.output
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert theirs.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True,
                                      return_dict=False) == wanted  # fmt: skip
    assert json.loads((folder / "tokenizer_config.json").read_text()).keys() == settings.keys()
    assert (folder / "chat_template.jinja.before").read_text() == TEMPLATE
    assert CliRunner().invoke(main, asked).exit_code == 1  # once is enough
    assert CliRunner().invoke(main, [*asked[:-1], "none"]).exit_code == 2
