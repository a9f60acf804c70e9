"""The policy: a transformers model from a folder or hub, its trainable part, and its reference.

There is no second model. The reference is the same weights with the adapter switched off, or with the values it
started from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlxpref import names
from mlxpref.data.tokenization import load_tokenizer
from mlxpref.errors import ConfigError, ModelError
from mlxpref.folders import (
    base_hash,
    check_base,
    model_config,
    n_trained,
    read_settings,
    reference_hash,
    resolve_lora,
    trained_on,
    vocabulary_size,
)
from mlxpref.hub import model_folder
from mlxpref.torch_backend.adapting import adapt, layer_prefix
from mlxpref.torch_backend.arrays import to_numpy
from mlxpref.torch_backend.layers import Adapted, check_reached
from mlxpref.torch_backend.loading import dtype_name, load_model
from mlxpref.torch_backend.logps import Network
from mlxpref.torch_backend.prefix import recomputing
from mlxpref.torch_backend.sharding import shard
from mlxpref.torch_backend.slots import Slot, is_quantised, weight_slots


@dataclass(slots=True)
class Policy:
    """A loaded model with its trainable parameters chosen.

    Attributes:
        model: the transformers model, on its device; trainable parameters of an adapter are float32.
        network: the model split for log-probs.
        path: folder the weights came from.
        name: what to call it in an adapter: the hub id it was asked for by, or the folder's absolute path.
        config: the model's ``config.json``.
        fine_tune_type, num_layers, lora_parameters: mlx-lm's adapter keys, resolved.
        base_fingerprint: hash of the base weights on disk, the same in every backend.
        fingerprint: names the reference: base weights, dtype, this library, and the adapter it started from.
        slots: what trains, by mlx-lm's names.
        adapted: the modules with a low-rank term.
        masters: float32 values of the slots in mlx-lm's layout, which the optimiser moves. They share memory with
            the model's parameters where those are float32. Empty when nothing trains.
        initial: values the reference has, where it is not the adapter switched off.
        shifts: what a moving reference's weights differ by from the base's, by module; None where it stays.
        notes: what a person should know about how it was put together.
        way, share_prompts: how a forward pass treats prompts, as the probe chose: "shared" or "plain", whole rows.
    """

    model: Any
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
    slots: dict[str, Slot] = field(default_factory=dict)
    adapted: list[Adapted] = field(default_factory=list)
    masters: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] | None = None
    shifts: dict[str, Tensor] | None = None
    notes: list[str] = field(default_factory=list)
    way: str = "plain"

    @property
    def share_prompts(self) -> bool:
        return self.way == "shared"

    @property
    def sharded(self) -> bool:
        """Whether every worker holds a slice of the weights; then ``masters`` and ``initial`` are slices, too."""
        return self.network.root is not None

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def n_trainable(self) -> int:
        return sum(int(np.prod(slot.shape)) for slot in self.slots.values())

    @property
    def n_parameters(self) -> int:
        """Parameters of the base model, quantised ones counted as the numbers they stand for."""
        own = {id(slot.parameter) for slot in self.slots.values()} if self.fine_tune_type != "full" else set()
        return sum(_count(parameter) for parameter in self.model.parameters() if id(parameter) not in own)

    def values(self) -> dict[str, np.ndarray]:
        """The float32 masters by name."""
        return {name: to_numpy(self.slots[name].gathered(value)) for name, value in self.masters.items()}

    def set_values(self, values: Mapping[str, np.ndarray]) -> None:
        """Put float32 values, one for every master, in their place.

        Raises:
            ModelError: other names or shapes than those of the masters.
        """
        theirs = {name: tuple(value.shape) for name, value in values.items()}
        ours = {name: self.slots[name].shape for name in self.masters}
        if theirs != ours:
            odd = sorted(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
            raise ModelError(f"{self.path}: other trainable parameters: {', '.join(odd[:5])}")
        for name, value in values.items():
            self.masters[name].copy_(self.slots[name].sliced(torch.from_numpy(np.array(value, np.float32))))
        self.place_masters()

    def place_masters(self) -> None:
        """Put the masters into the model, where they are not the model's own memory."""
        for name, value in self.masters.items():
            slot = self.slots[name]
            if slot.parameter.dtype != torch.float32:
                slot.value.copy_(value)

    def to_save(self) -> dict[str, Tensor]:
        """What an adapter folder holds: float32 factors, or full weights in the model's dtype.

        Of sharded weights all workers call this; it is empty on all but the first.
        """
        return dict(self.gathered({name: (slot, slot.value) for name, slot in self.slots.items()}))

    def gathered(self, values: Mapping[str, tuple[Slot | None, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors in main memory, brought together one at a time; sharded ones on the first worker alone."""
        first = not self.sharded or dist.get_rank() == 0
        for name, (slot, value) in values.items():
            whole = value if slot is None else slot.gathered(value)
            if first:
                yield name, whole.detach().contiguous().cpu()

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within this context the model is the reference, dropout off."""
        with ExitStack() as stack:
            if self.shifts is not None:
                stack.enter_context(self._shifted(self.shifts))
            elif self.fine_tune_type == "full" or self.initial is not None:
                stack.enter_context(self._with_initial())
            else:
                stack.enter_context(self._switched_off())
            yield

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        for one in self.adapted:
            one.switch(False)
        try:
            yield
        finally:
            for one in self.adapted:
                one.switch(True)

    @contextmanager
    def _with_initial(self) -> Iterator[None]:
        if self.initial is None:
            raise ModelError(
                "the reference of a full fine-tune is its starting weights, which are no longer in memory; "
                "compute reference log-probs before training, or load the folder to evaluate it"
            )
        current = {name: slot.value.clone() for name, slot in self.slots.items()}
        self._put(self.initial)
        try:
            yield
        finally:
            self._put(current)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.slots[name].value.copy_(value)

    @contextmanager
    def _shifted(self, shifts: Mapping[str, Tensor]) -> Iterator[None]:
        """The adapter off and each adapted weight moved by its shift."""
        with self._switched_off(), ExitStack() as stack:
            for one in self.adapted:
                stack.enter_context(one.shifted(shifts[one.name]))
            yield


def _count(parameter: nn.Parameter) -> int:
    shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
    return int(np.prod(shape))


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
    """Load a model, choose what trains, and find out by a probe whether prompts can be shared; on the first CUDA
    device, or the CPU without one.

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
        load_in_4bit: quantise linear layers to NF4 by bitsandbytes (CUDA only).
        fsdp: every worker keeps a slice of the weights (full fine-tuning only).
        seed: of the adapter's first weights.
        trainable: False loads the base alone, everything frozen.

    Raises:
        ModelError: no such model, missing weights, an architecture unknown to transformers.
        ConfigError: contradictory or unknown adapter settings, 4 bits without CUDA and bitsandbytes, or ``fsdp`` of
            an adapter or of a single process.
        AdapterError: ``init_from`` does not fit the model.
    """
    from mlxpref.torch_backend import adapter, probe  # both build on policies

    folder = model_folder(path, revision=revision)
    config = model_config(folder)
    kind = dtype_name(dtype, config)
    model = load_model(folder, kind, config, load_in_4bit, place=not fsdp)
    model.requires_grad_(False)
    tokenizer = load_tokenizer(str(folder))
    if init_from is not None:
        fine_tune_type, num_layers, lora = read_settings(Path(init_from))
    else:
        lora = resolve_lora(lora_parameters)
    base = base_hash(folder, config)
    said = f"{kind} torch" + (" 4bit" if load_in_4bit else "")
    policy = Policy(
        model, tokenizer, Network(model, vocabulary=vocabulary_size(config)), folder,
        str(folder.resolve()) if Path(path).exists() else path,
        config, fine_tune_type, num_layers, lora,
        base_fingerprint=base, fingerprint=reference_hash(base, said, init_from),
    )  # fmt: skip
    if fsdp:
        _shard(policy)
    if trainable:
        _choose_trainable(policy, seed)
        if init_from is not None:
            adapter.load_weights(policy, Path(init_from))
            check_base(Path(init_from), policy, trained_on(Path(init_from)), chosen=True)
        policy.masters = {
            name: slot.value if slot.parameter.dtype == torch.float32 else slot.value.float()
            for name, slot in policy.slots.items()
        }
        if init_from is not None or fine_tune_type == "full":
            policy.initial = {name: slot.value.clone() for name, slot in policy.slots.items()}
    model.eval()  # peft's new modules are not; with dropout the check would compare two draws
    if not fsdp:
        policy.network.check()
    if grad_checkpoint:
        _checkpoint(model)
    if not fsdp:
        probe.choose_way(policy)
    return policy


def _checkpoint(model: Any) -> None:
    """Recompute each layer in the backward pass; the method has two names in the versions of transformers."""
    how = {"use_reentrant": False, "context_fn": recomputing}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _shard(policy: Policy) -> None:
    """Give every worker its slice of the model, which is whole and in main memory until then."""
    if policy.fine_tune_type != "full":
        raise ConfigError("training.fsdp is for adapter.fine_tune_type: full; an adapter's base fits without it")
    policy.network.check()
    n_layers = int(policy.model.config.get_text_config().num_hidden_layers)
    layers = policy.model.get_submodule(layer_prefix(policy.model, n_layers).removesuffix("."))
    policy.network.root = shard(policy.model, layers)


def _choose_trainable(policy: Policy, seed: int) -> None:
    """Add the adapter, or unfreeze the last layers (all of the model for -1)."""
    model, model_type = policy.model, str(policy.config.get("model_type"))
    text = model.config.get_text_config()
    n_layers = int(text.num_hidden_layers)
    prefix = layer_prefix(model, n_layers)
    count = n_trained(policy.fine_tune_type, policy.num_layers, n_layers)
    layers = range(n_layers - count, n_layers)
    if policy.fine_tune_type == "full":
        slots = _unfreeze(policy, prefix, layers, n_layers)
    else:
        slots, policy.adapted = adapt(
            model, model_type, prefix, layers, policy.lora_parameters, dora=policy.fine_tune_type == "dora", seed=seed
        )
        check_reached(model, policy.adapted)
    policy.slots = {slot.name: slot for slot in slots}
    for slot in slots:
        slot.parameter.requires_grad_(True)
    ours = names.to_mlx(prefix, model_type)
    policy.network.outer = tuple(name for name in policy.slots if not name.startswith(ours))


def _unfreeze(policy: Policy, prefix: str, layers: range, n_layers: int) -> list[Slot]:
    model = policy.model
    if any(isinstance(m, nn.Linear) and is_quantised(m) for m in model.modules()):
        raise ConfigError("a quantised model cannot be fully fine-tuned; use fine_tune_type: lora or dora")

    def chosen(name: str) -> bool:
        if len(layers) == n_layers:
            return True
        return name.startswith(prefix) and int(name[len(prefix) :].split(".")[0]) in layers

    return weight_slots(model, chosen, str(policy.config.get("model_type")))
