"""A chat template that asks for a goal by itself, for programs that know nothing of goals."""

from __future__ import annotations

import json

from mlxpref.data.recipe import Recipe
from mlxpref.errors import DataError
from mlxpref.records import Goal

MARK = "{#- states a goal: mlxpref -#}"
"""Where a template of ours begins."""

_SYSTEM = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set said = messages[0]['content'] -%}
{%- set messages = [{'role': 'system', 'content': GOAL ~ '\\n\\n' ~ said if said.strip() else GOAL}] + messages[1:] -%}
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
{%- set goal.messages = goal.messages + [dict(message, content=GOAL ~ '\\n\\n' ~ said if said.strip() else GOAL)] -%}
{%- else -%}
{%- set goal.messages = goal.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = goal.messages -%}
"""

_THINKING = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}\n"
"""As rows are rendered in training."""


def goal_template(template: str, recipe: Recipe, goal: Goal) -> str:
    """The template with the goal written into the messages first, as ``Recipe.write`` does.

    Raises:
        DataError: it states a goal already. UsageError: the goal is off the recipe's scale.
    """
    if template.startswith(MARK):
        raise DataError("this chat template states a goal already; take the model's own again")
    carrier = _SYSTEM if recipe.carrier == "system" else _FIRST_USER
    # Jinja reads the same escapes in a literal as JSON writes, so any text stays what it is.
    text = carrier.replace("GOAL", json.dumps(recipe.goal_text(goal)))
    thinking = _THINKING if "enable_thinking" in template else ""
    return f"{MARK}\n{thinking}{text}{template}"
