"""A chat template that asks for a goal by itself, for programs that know nothing of goals."""

from __future__ import annotations

import json
from typing import Any

from mlxpref.data.recipe import Recipe
from mlxpref.errors import DataError, UsageError
from mlxpref.records import Goal

MARK = "{#- states a goal: mlxpref -#}"
"""Where a template of ours begins."""

BEFORE = "chat_template.jinja.before"
"""The model's own template, beside one of ours."""

_SYSTEM = """\
{%- if messages and messages[0]['role'] in ['system', 'developer'] -%}
{%- set said = messages[0]['content'] -%}
{%- set messages = [dict(messages[0], content=STATED)] + messages[1:] -%}
{%- else -%}
{%- set messages = [{'role': 'system', 'content': GOAL}] + messages -%}
{%- endif -%}
"""

_FIRST_USER = """\
{%- set goal = namespace(stated=false, messages=[]) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' and not goal.stated -%}
{%- set said = message['content'] -%}
{%- set goal.stated = true -%}
{%- set goal.messages = goal.messages + [dict(message, content=STATED)] -%}
{%- else -%}
{%- set goal.messages = goal.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = goal.messages -%}
"""

_STATED = (
    "GOAL if said is none else ([{'type': 'text', 'text': GOAL}] + said) if said is not string "
    "else (GOAL ~ '\\n\\n' ~ said) if said.strip() else GOAL"
)
"""The goal before what was said, which may be text or a list of parts."""

_THINKING = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}\n"
"""As rows are rendered in training."""


def goal_template(template: str, recipe: Recipe, goal: Goal) -> str:
    """The template with the goal written into the messages first, as ``Recipe.write`` does.

    Raises:
        DataError: it states a goal already. UsageError: the goal is off the recipe's scale.
    """
    if template.startswith(MARK):
        raise DataError(f"this chat template states a goal already; put {BEFORE} back as chat_template.jinja first")
    carrier = _SYSTEM if recipe.carrier == "system" else _FIRST_USER
    # Jinja reads the escapes of a literal as JSON writes them; letters beyond ASCII stay as they are.
    literal = json.dumps(recipe.goal_text(goal), ensure_ascii=False)
    text = carrier.replace("STATED", _STATED).replace("GOAL", literal)
    thinking = _THINKING if "enable_thinking" in template else ""
    return f"{MARK}\n{thinking}{text}{template}"


def check_states_none(tokenizer: Any) -> None:
    """UsageError if a model's chat template states a goal by itself, so that another would stand beside it."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and template.startswith(MARK):
        raise UsageError(
            "this model's chat template states a goal by itself (mlxpref chat-template wrote it): ask without one, or "
            f"put {BEFORE} back as chat_template.jinja"
        )
