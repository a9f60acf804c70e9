"""The options of every command that has a policy write something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from mlxpref.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

KEYS = ("max_tokens", "temperature", "top_p", "seed", "batch_size")
"""As ``generate`` and ``control_curve`` call them."""


def sampling_options(temperature: float | None, max_tokens: int | None = 256) -> Callable[[F], F]:
    """The options, with these values unless others are given; None leaves one to the command."""
    options = (
        click.option(
            "--temperature",
            "--temp",
            type=click.FloatRange(0),
            default=temperature,
            show_default=temperature is not None,
            metavar="X",
            help="Of the sampling; 0 takes the likeliest token every time.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            show_default=True,
            metavar="X",
            help="Sample within this share of the probability.",
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(1),
            default=max_tokens,
            show_default=max_tokens is not None,
            metavar="N",
            help="Tokens of a response at most.",
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, metavar="N", help="Decides what sampling draws."
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            default=8,
            show_default=True,
            metavar="N",
            help="Prompts computed together.",
        ),
    )

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def check_sampling(options: Mapping[str, Any]) -> None:
    """UsageError for options that would change nothing at temperature 0."""
    if options["temperature"] > 0:
        return
    if options.get("samples", 1) > 1:
        raise UsageError("at temperature 0 all samples of a prompt are the same; give --temperature, or one sample")
    if options["top_p"] < 1:
        raise UsageError("--top-p: at temperature 0 the likeliest token is taken anyway; give --temperature")


def sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's options that are about sampling."""
    return {key: options[key] for key in KEYS}
