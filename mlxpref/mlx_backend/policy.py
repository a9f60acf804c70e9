"""The policy: a model from a folder or hub, its trainable part, and its reference.

There is no second model. The reference is the same weights with the adapter taken out, or with the
adapter it started from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, load_tokenizer

from mlxpref.errors import ConfigError, ModelError
from mlxpref.folders import (
    base_hash,
    check_base,
    n_trained,
    read_settings,
    reference_hash,
    resolve_lora,
    trained_on,
    vocabulary_size,
)
from mlxpref.hub import model_folder
from mlxpref.mlx_backend import compiler
from mlxpref.mlx_backend.kernels import sites_of
from mlxpref.mlx_backend.logps import Network, find_body

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(slots=True)
class Policy:
    """A loaded model with its trainable parameters chosen.

    Attributes:
        model: the mlx-lm model; its trainable parameters are what trains, in the compute dtype.
        tokenizer: mlx-lm's wrapper around the model's tokenizer.
        network: the model split for log-probs.
        path: folder the weights came from.
        name: what to call it in an adapter: the hub id it was asked for by, or the folder's absolute path.
        config: the model's own config.
        fine_tune_type, num_layers, lora_parameters: mlx-lm's adapter keys, resolved.
        base_fingerprint: hash of the base weights on disk.
        fingerprint: hash that names the reference: base weights, dtype, and the adapter it started from.
        notes: what a person should know about how it was put together.
        way, share_prompts: how a forward pass treats prompts, as the probe chose: "shared" or "plain".
        initial: trainable parameters the adapter started from; None when it started from nothing.
        plain_layers: adapted modules and what they wrap, to take the adapter out.
        masters: float32 copies of the trainable parameters, which the optimiser moves; the model holds
            them in its compute dtype (``dtypes``). Empty when nothing trains.
        moving: adapted modules by name as a reference that follows the policy has them; None where it stays.
        n_traced: how many times a forward pass was traced: once for each shape and use.
    """

    model: nn.Module
    tokenizer: Any
    network: Network
    path: Path
    name: str
    config: dict[str, Any]
    fine_tune_type: str
    num_layers: int
    lora_parameters: dict[str, Any]
    base_fingerprint: str
    fingerprint: str
    way: str = "plain"
    initial: dict[str, mx.array] | None = None
    plain_layers: list[tuple[str, nn.Module, nn.Module]] = field(default_factory=list)
    masters: dict[str, mx.array] = field(default_factory=dict)
    dtypes: dict[str, Any] = field(default_factory=dict)
    compiled: dict[tuple[str, bool], Any] = field(default_factory=dict)
    moving: dict[str, nn.Module] | None = None
    n_traced: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def share_prompts(self) -> bool:
        return self.way == "shared"

    @property
    def sharded(self) -> bool:
        """Whether every worker holds a slice of the weights: never here."""
        return False

    @property
    def n_trainable(self) -> int:
        return sum(value.size for value in self.trainable().values())

    @property
    def n_parameters(self) -> int:
        """Parameters of the base model, quantised ones counted as the numbers they stand for."""
        return _count(self.model)

    def trainable(self) -> dict[str, mx.array]:
        """Trainable parameters by dotted name."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def update(self, parameters: Mapping[str, mx.array]) -> None:
        """Put parameters of these names in place."""
        self.model.update(tree_unflatten(list(parameters.items())))

    def to_save(self) -> dict[str, mx.array]:
        """What an adapter folder holds: float32 factors, or full weights in the model's dtype."""
        if self.fine_tune_type == "full" or not self.masters:
            return self.trainable()
        return dict(self.masters)

    def values(self) -> dict[str, np.ndarray]:
        """The float32 masters by name."""
        return {name: np.array(value) for name, value in self.masters.items()}

    def set_values(self, values: Mapping[str, np.ndarray]) -> None:
        """Put float32 values, one for every master, in their place.

        Raises:
            ModelError: other names or shapes than those of the masters.
        """
        theirs = {name: tuple(value.shape) for name, value in values.items()}
        ours = {name: tuple(value.shape) for name, value in self.masters.items()}
        if theirs != ours:
            odd = sorted(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
            raise ModelError(f"{self.path}: other trainable parameters: {', '.join(odd[:5])}")
        self.set_masters({name: mx.array(np.asarray(values[name], np.float32)) for name in self.masters})

    def set_masters(self, masters: Mapping[str, mx.array]) -> None:
        """New trainable values: kept in float32, put into the model in its compute dtype."""
        self.masters = dict(masters)
        self.update({name: value.astype(self.dtypes[name]) for name, value in masters.items()})

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within this context the model is the reference, dropout off."""
        if self.moving is not None:
            with self._swapped(self.moving):
                yield
        elif self.fine_tune_type == "full" or self.initial is not None:
            with self._with_initial():
                yield
        else:
            with self._swapped({name: plain for name, _, plain in self.plain_layers}):
                yield

    @contextmanager
    def _with_initial(self) -> Iterator[None]:
        if self.initial is None:
            raise ModelError(
                "the reference of a full fine-tune is its starting weights, which are no longer in memory; "
                "compute reference log-probs before training, or load the folder to evaluate it"
            )
        current = self.trainable()
        self.update(self.initial)
        try:
            yield
        finally:
            self.update(current)

    @contextmanager
    def _swapped(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        self._swap(modules)
        try:
            yield
        finally:
            self._swap({name: adapted for name, adapted, _ in self.plain_layers})

    def _swap(self, modules: dict[str, nn.Module]) -> None:
        if modules:
            self.model.update_modules(tree_unflatten(list(modules.items())))


def load_policy(
    path: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    fine_tune_type: str = "lora",
    num_layers: int = 16,
    lora_parameters: Mapping[str, Any] | None = None,
    init_from: str | None = None,
    grad_checkpoint: bool = False,
    load_in_4bit: bool = False,
    fsdp: bool = False,
    seed: int = 0,
    trainable: bool = True,
) -> Policy:
    """Load a model, choose what trains, and find out by a probe how its prompts can be shared.

    Args:
        path: folder with config.json, safetensors and tokenizer, or a hub id.
        revision: of the hub id.
        dtype: "float32", "float16" or "bfloat16" for unquantised weights; None keeps the checkpoint's
            (float32 on CPU, where the half-width types are slow).
        fine_tune_type: "lora", "dora" or "full".
        num_layers: how many layers train, counted from the last; -1 for all.
        lora_parameters: ``rank``, ``scale`` or ``alpha`` (scale = alpha / rank), ``dropout``, ``keys``.
        init_from: adapter folder to start from; the reference is then that adapter.
        grad_checkpoint: recompute layers in the backward pass.
        load_in_4bit: quantise the weights while loading, as `mlx_lm.convert -q` does.
        fsdp: not on MLX.
        seed: of the adapter's first weights.
        trainable: False loads the base alone, everything frozen.

    Raises:
        ModelError: no such model, missing or unexpected weights, an architecture unknown to mlx-lm.
        ConfigError: contradictory or unknown adapter settings.
        AdapterError: ``init_from`` does not fit the model.
    """
    from mlxpref.mlx_backend import adapter, probe  # both build on policies

    if fsdp:
        raise ConfigError("training.fsdp shards a model by PyTorch: take model.backend: torch, or leave it out")
    compiler.prepare()
    folder = model_folder(path, revision=revision)
    model, config = _load(folder)
    _cast(model, dtype)
    notes = _quantise(model, folder) if load_in_4bit else []
    tokenizer = _tokenizer(folder, config)
    mx.random.seed(seed)
    model.freeze()
    if init_from is not None:
        fine_tune_type, num_layers, lora = read_settings(Path(init_from))
    else:
        lora = resolve_lora(lora_parameters)
    base = base_hash(folder, config)
    said = dtype_name(model) + (" 4bit" if load_in_4bit else "")
    network = Network(model, vocabulary=vocabulary_size(config))
    policy = Policy(
        model, tokenizer, network, folder, str(folder.resolve()) if Path(path).exists() else path,
        config, fine_tune_type, num_layers, lora,
        base_fingerprint=base, fingerprint=reference_hash(base, said, init_from),
    )  # fmt: skip
    policy.notes += notes
    if trainable:
        _choose_trainable(policy)
        if init_from is not None:
            adapter.load_weights(policy, Path(init_from))
            check_base(Path(init_from), policy, trained_on(Path(init_from)), chosen=True)
        _set_precision(policy)
        if init_from is not None or fine_tune_type == "full":
            policy.initial = policy.trainable()
    _prepare_network(policy, grad_checkpoint)
    probe.choose_way(policy)
    return policy


def _load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    try:
        return load_model(folder, lazy=False)
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder}: no weights (model*.safetensors). Download the whole model folder again, or convert "
            "another format with `mlx_lm.convert --hf-path FOLDER --mlx-path OUT`."
        ) from error
    except RuntimeError as error:
        raise ModelError(
            f"{folder}: the weights cannot be read ({str(error).splitlines()[0]}); the download is incomplete or "
            "damaged: fetch the folder again"
        ) from error
    except ValueError as error:
        raise ModelError(_explain(folder, str(error))) from error


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    try:
        return load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{folder}: its tokenizer does not load ({first[:200]}); a model folder holds tokenizer.json (or "
            "tokenizer.model) and tokenizer_config.json beside the weights"
        ) from error


def _explain(folder: Path, message: str) -> str:
    first = " ".join(message.split())[:300]
    if "Missing" in message and "embed_tokens" in message:
        return (
            f"{folder}: the checkpoint lacks the embedding matrix ({first}). It probably stores a tied matrix "
            "only as lm_head.weight. Load it once with transformers and save it again "
            "(AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)), which writes "
            "model.embed_tokens.weight, and copy the tokenizer files beside it."
        )
    if "not supported" in message:
        return f"{folder}: {first} The installed mlx-lm does not know this architecture; try a newer one."
    return f"{folder}: the weights do not fit the model's config.json: {first}"


def _cast(model: nn.Module, dtype: str | None) -> None:
    if dtype is None and mx.default_device() == mx.Device(mx.cpu) and dtype_name(model) != "float32":
        dtype = "float32"
    if dtype is None:
        return
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
    keep = getattr(model, "cast_predicate", lambda _: True)  # some models keep parts in float32
    target = DTYPES[dtype]
    model.update(
        tree_map_with_path(
            lambda name, w: w.astype(target) if mx.issubdtype(w.dtype, mx.floating) and keep(name) else w,
            model.parameters(),
        )
    )
    mx.eval(model.parameters())


def _quantise(model: nn.Module, folder: Path) -> list[str]:
    """4 bits a weight in groups of 64, every module whose width allows it; what could not be done.

    Raises:
        ModelError: it is quantised already, or nothing of it can be.
    """
    if any("scales" in module for _, module in model.named_modules()):
        raise ModelError(f"{folder}: is quantised already; leave model.load_in_4bit out")
    keep = getattr(model, "quant_predicate", None)

    def chosen(name: str, module: nn.Module) -> Any:
        asked = hasattr(module, "to_quantized") and (keep is None or keep(name, module))
        if not asked:
            return False
        fits = module.weight.shape[-1] % 64 == 0
        (done if fits else left).append(name)
        return asked if fits else False

    done: list[str] = []
    left: list[str] = []
    nn.quantize(model, group_size=64, bits=4, class_predicate=chosen)
    if not done:
        raise ModelError(f"{folder}: no width is a multiple of 64, as 4 bits need; leave model.load_in_4bit out")
    mx.eval(model.parameters())
    if not left:
        return []
    n = len(done) + len(left)
    return [f"{len(left)} of {n} modules are not quantised, their width is no multiple of 64: {left[0]} for one"]


def dtype_name(model: nn.Module) -> str:
    """Name of the model's compute dtype: that of its floating-point parameters."""
    kinds = {value.dtype for _, value in tree_flatten(model.parameters())}
    for name, kind in reversed(DTYPES.items()):
        if kind in kinds:
            return name
    return "float32"


def _choose_trainable(policy: Policy) -> None:
    """Add the adapter, or unfreeze the last layers (all of the model for -1)."""
    model, layers = policy.model, policy.model.layers
    count = n_trained(policy.fine_tune_type, policy.num_layers, len(layers))
    if policy.fine_tune_type == "full":
        _unfreeze(policy, count)
        return
    keys = policy.lora_parameters.get("keys")
    try:
        linear_to_lora_layers(model, count, policy.lora_parameters, policy.fine_tune_type == "dora")
    except ValueError as error:
        raise ConfigError(f"{policy.fine_tune_type}: {error}") from error
    for name, module in model.named_modules():
        plain = module.get("linear", module.get("embedding")) if "lora_a" in module else None
        if plain is not None:
            policy.plain_layers.append((name, module, plain))
    if not policy.plain_layers:
        known = sorted({name for layer in layers for name, m in layer.named_modules() if "weight" in m})
        raise ConfigError(f"lora keys {keys} match no module of a layer; known: {', '.join(known)}")


def _set_precision(policy: Policy) -> None:
    """Float32 masters beside the model, the compute dtype inside it."""
    name = dtype_name(policy.model)
    full = policy.fine_tune_type == "full"
    values = policy.trainable()
    # DoRA's magnitudes stay in float32, as mlx-lm has them: rounded, the policy would not start as its reference.
    kept = {key for key in values if full or key.endswith(".m")}
    policy.dtypes = {key: value.dtype if key in kept else DTYPES[name] for key, value in values.items()}
    policy.set_masters({key: value.astype(mx.float32) for key, value in values.items()})
    mx.eval(policy.model.parameters(), policy.masters)


def _unfreeze(policy: Policy, count: int) -> None:
    model = policy.model
    if any(isinstance(m, nn.QuantizedLinear) for _, m in model.named_modules()):
        raise ConfigError("a quantised model cannot be fully fine-tuned; use fine_tune_type: lora or dora")
    if policy.num_layers < 0 or count == len(model.layers):
        model.unfreeze()
    else:
        for layer in model.layers[len(model.layers) - count :]:
            layer.unfreeze()


def _prepare_network(policy: Policy, grad_checkpoint: bool) -> None:
    network = policy.network
    network.grad_checkpoint = grad_checkpoint
    network.sites = sites_of(policy.model)
    prefix = layer_prefix(policy.model)
    names = list(policy.trainable())
    network.outer = tuple(name for name in names if not name.startswith(prefix))
    indices = [int(name[len(prefix) :].split(".")[0]) for name in names if name.startswith(prefix)]
    network.first_adapted = 0 if network.outer else min(indices, default=0)


def layer_prefix(model: nn.Module) -> str:
    """Dotted name under which the layers stand, for example ``model.layers.``."""
    first = id(model.layers[0])
    for name, module in model.named_modules():
        if id(module) == first:
            return name[: -len(name.rsplit(".", 1)[-1])]
    _, body = find_body(model)
    raise ModelError(f"cannot find the layers of {type(model).__module__} under {body!r}")


def _count(model: nn.Module) -> int:
    total = 0
    for name, module in model.named_modules():
        if "lora_a" in module:
            continue
        for key, value in module.items():
            if not isinstance(value, mx.array) or (name and key in ("lora_a", "lora_b", "m")):
                continue
            if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
                total += value.size * 32 // module.bits if key == "weight" else 0
            else:
                total += math.prod(value.shape)
    return total
