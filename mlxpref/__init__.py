"""Preference training on your own machine, for models that know the quality they are asked for.

The public names are listed here, by the module they live in, and loaded when first used: importing
``mlxpref`` imports nothing else, and no array framework. Machine rooms are got by name::

    backend = mlxpref.get_backend("mlx")
    policy = backend.load_policy("path/to/model")
"""

import importlib
from typing import Any

_NAMES: dict[str, tuple[str, ...]] = {
    "records": (
        "Batch", "Conditioned", "Counts", "Dropped", "Goal", "Half", "Logps", "Message", "MicroBatch",
        "Prompt", "Scored", "Shelf", "StepReport", "Tokenized",
    ),
    "errors": (
        "AdapterError", "ConfigError", "DataError", "MlxprefError", "ModelError", "ObjectiveError",
        "RunError", "ScoreError", "UsageError",
    ),
    "data.sources": ("SourceSpec", "open_source", "read_source"),
    "data.recipe": ("Recipe", "resolve_carrier"),
    "data.relabel": ("fit_recipe", "relabel", "relabel_all", "split_by_prompt", "unconditioned"),
    "data.relabelled": ("is_relabelled", "read_relabelled", "write_relabelled"),
    "data.tokenization": ("load_tokenizer", "tokenize", "tokenize_all"),
    "data.plan": ("plan_pass", "plan_steps"),
    "data.batching": ("collate", "collate_step"),
    "objectives": ("Objective", "objective", "resolve_objective"),
    "metrics": ("step_metrics",),
    "reference": ("ReferenceStore", "reference_logps"),
    "momentum": ("momentum_logps",),
    "adapters": ("read_adapter", "write_adapter"),
    "merging": ("extrapolate", "interpolate"),
    "backends": ("get_backend",),
}  # fmt: skip
"""Module -> its public names."""

_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """A public name, from the module it lives in; kept, so that it is looked up once."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mlxpref")
    if name not in _HOME:
        raise AttributeError(f"module 'mlxpref' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mlxpref.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
