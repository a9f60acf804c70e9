r"""Finished adapters combined into one, exact in the merged weights and without loading a model.

With adapters ``k``, their weights ``λ_k`` and the base model ``θ_0``:

.. math:: \theta = \theta_0 + \sum_k \lambda_k \, (\theta_k - \theta_0)

A LoRA module adds ``θ_k − θ_0 = scale_k · (A_k B_k)ᵀ`` to its weight (``lora_a`` (inputs, rank), ``lora_b`` (rank,
outputs)). That is linear in the product and not in the factors: averages of ``A`` and ``B`` are another model. So
factors are stacked, ``[A_1, A_2, …]`` and ``[B_1; B_2; …]``, and the rank of the result is the sum of the ranks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.adapters import WEIGHTS, Adapter, base_shapes, rank_axes, read_adapter
from mlxpref.conversion import as_mlx_folder
from mlxpref.errors import AdapterError, ModelError, UsageError, raise_all
from mlxpref.facts import check_fits, versions
from mlxpref.files import file_digest, safetensors_header
from mlxpref.hub import model_folder
from mlxpref.tensors import FLOATS, Tensor, tensors_of

NOTHING = 1e-9
"""Of weights that sum to 1 up to rounding, no share of the base is left."""

Parts = Sequence[tuple[Adapter, float]]
"""Adapters and how much of each."""


def interpolate(
    folders: Sequence[str | Path], weights: Sequence[float], *, recipe_from: str | Path | None = None
) -> Adapter:
    r"""``θ_0 + Σ λ_k (θ_k − θ_0)``, which for weights that sum to 1 is ``Σ λ_k θ_k``.

    Args:
        folders: adapter folders of one base model and one fine-tune type.
        weights: a finite number ``λ_k`` for each.
        recipe_from: which of the folders the words for goals come from, where they differ.

    Returns:
        the adapter, for :func:`mlxpref.adapters.write_adapter`. A part of weight 0 adds nothing, not even rank.

    Raises:
        UsageError: no adapter, weights that are not a finite number for each, a ``recipe_from`` not among the folders.
        AdapterError: damaged; of different base models or types; DoRA; recipes that differ.
        ModelError: a base is needed and not there.

    Source: Ramé et al. 2023, arXiv:2306.04488.
    """
    if not folders or len(folders) != len(weights):
        raise UsageError(f"{len(folders)} adapters and {len(weights)} weights: give a weight for each of at least one")
    parts = _parts(folders, weights)
    if recipe_from is None:
        return _combined(parts, _shared_recipe(parts))
    if Path(recipe_from).resolve() not in [Path(folder).resolve() for folder in folders]:
        raise UsageError(f"the recipe of {recipe_from}: name one of {', '.join(map(str, folders))}")
    return _combined(parts, read_adapter(as_mlx_folder(recipe_from)).facts.get("recipe"))


def extrapolate(folder: str | Path, alpha: float, start: str | Path | None = None) -> Adapter:
    r"""Carry on in the direction in which training went (ExPO): ``θ + α (θ − θ_start)``.

    Args:
        folder: adapter folder of the trained model ``θ``; the words for goals are its own.
        alpha: 0 is the adapter itself, −1 what it started from; 0.3 or 0.5 in use, chosen on development data.
        start: adapter folder of ``θ_start``; None is the base model, and the result is the adapter scaled by 1 + α.

    Returns:
        the adapter, for :func:`mlxpref.adapters.write_adapter`.

    Raises:
        UsageError: ``alpha`` is not finite.
        AdapterError, ModelError: as :func:`interpolate` does.

    Source: Zheng et al. 2024, arXiv:2404.16792.
    """
    if not math.isfinite(alpha):
        raise UsageError(f"an extrapolation goes a finite way on, not {alpha}")
    parts = _parts([folder], [1 + alpha]) if start is None else _parts([folder, start], [1 + alpha, -alpha])
    return _combined(parts, parts[0][0].facts.get("recipe"))


# --- what can be combined ---


def _parts(folders: Sequence[str | Path], weights: Sequence[float]) -> Parts:
    """Adapters that can be combined, those of weight 0 left out (unless there is no other)."""
    wrong = [str(weight) for weight in weights if not math.isfinite(weight)]
    if wrong:
        raise UsageError(f"weights must be finite numbers, not {', '.join(wrong)}")
    adapters = [read_adapter(as_mlx_folder(folder)) for folder in folders]
    problems = [text for pair in combinations(adapters, 2) for text in _differences(*pair)]
    raise_all(problems, AdapterError, "these adapters cannot be merged:")
    for adapter in adapters:
        if Path(adapter.model).is_dir():
            shapes = {name: tensor.shape for name, tensor in adapter.tensors.items()}
            said = f"{adapter.folder}: this adapter was made for another model than {adapter.model}:"
            check_fits(shapes, Path(adapter.model), said)
    return [part for part in zip(adapters, weights, strict=True) if part[1] != 0] or [(adapters[0], 0.0)]


def _differences(one: Adapter, other: Adapter) -> Iterator[str]:
    """Why two adapters cannot be combined, in words."""
    both = f"{one.folder} and {other.folder}"
    if one.kind != other.kind:
        yield f"{both}: fine_tune_type {one.kind} and {other.kind}; train both with the same one to merge them"
        return
    first, second = (adapter.facts.get("base_fingerprint") for adapter in (one, other))
    if first and second and first != second:
        yield f"{both}: trained on other base weights ({one.model} and {other.model}); merge adapters of one base"
    elif not (first and second) and one.model != other.model:
        yield f"{both}: different base models ({one.model} and {other.model}); merge adapters of one base"
    shapes = [base_shapes(adapter) for adapter in (one, other)]
    for name in sorted(shapes[0].keys() & shapes[1].keys()):
        if shapes[0][name] != shapes[1][name]:
            yield f"{both}: {name} is {shapes[0][name]} and {shapes[1][name]}; they belong to different models"


# --- combining ---


def _combined(parts: Parts, recipe: Any) -> Adapter:
    """``θ_0 + Σ λ_k (θ_k − θ_0)`` as one adapter, with these words for goals."""
    first, share = parts[0]
    if first.kind == "dora":
        if len(parts) > 1 or share != 1:
            raise AdapterError(
                "DoRA adapters cannot be merged: they set the length of each row of a weight, so what they add to the "
                "base depends on the whole of it, and no adapter is their sum. Train with fine_tune_type lora to merge"
            )
        factors, weights, lora = dict(first.factors), dict(first.weights), dict(first.lora)
    else:
        factors, lora = _stacked(parts) if first.factors else ({}, dict(first.lora))
        weights = _summed(parts)
    num_layers, keys = _placed(parts, {*factors, *weights})
    if first.kind != "full":
        lora = {**lora, "keys": keys} if keys is not None else lora
    config = {
        "fine_tune_type": first.kind,
        "model": first.model,
        "num_layers": num_layers,
        "lora_parameters": lora or None,
        "mlxpref": _facts(parts, recipe),
    }
    return Adapter(first.folder, config, factors, weights)


def _stacked(parts: Parts) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """Factors side by side, and mlx-lm's parameters for them.

    One scale serves all: the largest ``|λ_k · scale_k|``. What is left of each part's own is in its ``lora_b``, so that
    the factors of a single adapter stay as they are. Modules of a smaller rank are filled up with zeros.
    """
    folded = [weight * float(adapter.lora["scale"]) for adapter, weight in parts]
    scale = max(map(abs, folded)) or abs(float(parts[0][0].lora["scale"])) or 1.0
    if not math.isfinite(scale):
        raise UsageError(f"the weights are too large: the scale would be {scale}")
    modules = sorted({module for adapter, _ in parts for module in adapter.factors})
    shares = [(adapter.factors, by / scale) for (adapter, _), by in zip(parts, folded, strict=True)]
    stacks = {module: [(factors[module], by) for factors, by in shares if module in factors] for module in modules}
    rank = max(sum(a.shape[1] for (a, _), _ in stack) for stack in stacks.values())
    dropout = max(float(adapter.lora.get("dropout", 0.0)) for adapter, _ in parts)
    factors = {module: _stack(stack, rank) for module, stack in stacks.items()}
    return factors, {"rank": rank, "scale": scale, "dropout": dropout}


def _stack(stack: Sequence[tuple[tuple[Tensor, Tensor], float]], rank: int) -> tuple[Tensor, Tensor]:
    """``[A_1, A_2, …, 0]`` and ``[c_1 B_1; c_2 B_2; …; 0]``, float32."""
    at_a, at_b = rank_axes(stack[0][0][0].shape)
    a_terms = [(a, 1.0) for (a, _), _ in stack]
    b_terms = [(b, by) for (_, b), by in stack]
    return _joined(a_terms, at_a, rank), _joined(b_terms, at_b, rank)


def _joined(terms: Sequence[tuple[Tensor, float]], axis: int, rank: int) -> Tensor:
    def read() -> np.ndarray:
        joined = np.concatenate([tensor.read() * by for tensor, by in terms], axis)
        fill = [(0, rank - joined.shape[axis]) if at == axis else (0, 0) for at in range(joined.ndim)]
        return np.pad(joined, fill)

    shape = terms[0][0].shape
    return Tensor("F32", (*shape[:axis], rank, *shape[axis + 1 :]), read)


def _summed(parts: Parts) -> dict[str, Tensor]:
    """Weights of full fine-tunes; one that an adapter does not hold is the base's there.

    The base is read where the weights of those that hold a tensor do not sum to 1.

    Raises:
        AdapterError: the base's files have no such tensor.
    """
    terms = {
        name: [(adapter.weights[name], share) for adapter, share in parts if name in adapter.weights]
        for name in sorted({name for adapter, _ in parts for name in adapter.weights})
    }
    left = {name: 1 - math.fsum(share for _, share in some) for name, some in terms.items()}
    needed = [name for name, share in left.items() if abs(share) > NOTHING]
    base = _base(parts[0][0], needed) if needed else {}
    lacking = [name for name in needed if name not in base or base[name].shape != terms[name][0][0].shape]
    raise_all(
        lacking,
        AdapterError,
        f"{parts[0][0].model}: the base is needed (weights that do not sum to 1, or tensors that only some adapters "
        "hold), and its files lack these tensors, or have them in another shape. Give weights that sum to 1 for "
        "adapters of the same layers, or train from a base that mlx_lm.convert has written:",
    )
    return {name: _sum([*some, (base[name], left[name])] if name in base else some) for name, some in terms.items()}


def _sum(terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """``Σ c_k T_k`` in the type that the first has."""
    first = terms[0][0]
    return Tensor(first.dtype, first.shape, lambda: reduce(operator.add, (one.read() * by for one, by in terms)))


def _base(adapter: Adapter, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of these names in the base model's files, those that are there."""
    revision = (adapter.facts.get("model") or {}).get("revision")
    found: dict[str, Tensor] = {}
    for file in sorted(model_folder(adapter.model, revision=revision).glob("model*.safetensors")):
        try:
            found |= tensors_of(file, safetensors_header(file))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: damaged or cut off ({error}); fetch the model again") from error
    return {name: found[name] for name in names if name in found and found[name].dtype in FLOATS}


def _placed(parts: Parts, names: set[str]) -> tuple[int, list[str] | None]:
    """``num_layers`` and LoRA ``keys`` that stand for these modules (tensors of a full fine-tune), no others.

    Those of an adapter that has them all; if none has, the modules' full names, which mlx-lm takes as keys.
    """
    for adapter, _ in parts:
        if {*adapter.factors, *adapter.weights} == names:
            keys = adapter.lora.get("keys")
            return int(adapter.config["num_layers"]), None if keys is None else list(keys)
    layers = [int(adapter.config["num_layers"]) for adapter, _ in parts]
    return -1 if min(layers) < 0 else max(layers), sorted(names)


# --- what the result says of itself ---


def _shared_recipe(parts: Parts) -> Any:
    """The recipe of all parts, None if they were trained without goals. AdapterError if they differ."""
    recipes = [adapter.facts.get("recipe") for adapter, _ in parts]
    if all(recipe == recipes[0] for recipe in recipes):
        return recipes[0]
    lines = [f"{one.folder}: {_goals(recipe, recipes)}" for (one, _), recipe in zip(parts, recipes, strict=True)]
    headline = "these adapters were asked for goals in different words; say whose to keep with --recipe FOLDER:"
    raise AdapterError("\n  ".join([headline, *lines]))


def _goals(recipe: Any, recipes: Sequence[Any]) -> str:
    """What is special about a recipe among others."""
    if not isinstance(recipe, Mapping):
        return "without goals"
    others = [other for other in recipes if isinstance(other, Mapping)]
    own = [key for key, value in recipe.items() if any(other.get(key) != value for other in others)]
    return ", ".join(f"{key} {recipe[key]!r}" for key in own) or "with goals"


def _facts(parts: Parts, recipe: Any) -> dict[str, Any]:
    """What stands under ``mlxpref`` in the config; what the parts do not share is null."""
    all_facts = [adapter.facts for adapter, _ in parts]
    shared = {
        key: all_facts[0].get(key) if all(facts.get(key) == all_facts[0].get(key) for facts in all_facts) else None
        for key in ("objective", "tokenization", "init_from")
    }
    prints = [facts["base_fingerprint"] for facts in all_facts if facts.get("base_fingerprint")]
    model = all_facts[0].get("model") or {}
    return {
        **shared,
        "model": {key: model.get(key) for key in ("path", "revision")},
        "recipe": recipe,
        "merged_from": [_origin(adapter, share) for adapter, share in parts],
        "versions": versions(),
        "base_fingerprint": prints[0] if prints else None,
    }


def _origin(adapter: Adapter, share: float) -> dict[str, Any]:
    digest = file_digest(adapter.folder / WEIGHTS)
    facts = {key: adapter.facts.get(key) for key in ("objective", "step")}
    return {"adapter": str(adapter.folder.resolve()), "weight": share, "sha256": digest, **facts}
