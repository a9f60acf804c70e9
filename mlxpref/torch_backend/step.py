"""One update: losses and gradients of each micro-batch by autograd, added up, then one optimiser step.

What the optimiser sees is the whole batch; how it is split into micro-batches changes rounding only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlxpref.errors import AdapterError, ConfigError, RunError, raise_all
from mlxpref.objectives import Objective
from mlxpref.objectives.registry import FROM_MODEL
from mlxpref.records import Batch, Logps, MicroBatch, StepReport
from mlxpref.steps import Figures, columns, parts_of, report
from mlxpref.torch_backend import reading
from mlxpref.torch_backend.adapter import read_safetensors, write_safetensors
from mlxpref.torch_backend.arrays import to_numpy, to_torch
from mlxpref.torch_backend.moving import MovingReference
from mlxpref.torch_backend.optimizers import Optimizer, make_optimizer
from mlxpref.torch_backend.policy import Policy
from mlxpref.torch_backend.slots import Slot
from mlxpref.workers import Workers

STATE = "step_state.safetensors"

Values = dict[str, Tensor]
"""``tokens`` (B, S, L), and by name what else a model says of each token."""


class Step:
    """The owner of weights, optimiser, random state and the objective's state of a run.

    Calling it with a batch and a learning rate makes one update. An objective that couples the examples of a
    batch gets the log-probs of all micro-batches before any gradient is taken: two passes.

    Attributes:
        policy: whose masters move.
        state: of the objective, by formula.
        moving: the reference, where it follows the policy; else None.
        n_drawn: batches that dropout was drawn for so far, which with the seed is the whole random state.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        optimizer: Optimizer,
        max_grad_norm: float | None,
        seed: int,
        *,
        n_groups: int = 1,
        moving: MovingReference | None = None,
        workers: Workers | None = None,
    ):
        self.policy = policy
        self.objective = objective
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.n_drawn = 0
        self.moving = moving
        self.workers = workers or Workers()
        self._most = 0
        self.optimizer.init(policy.masters)
        self._treedef, self._leaves = _flattened(objective.initial_state(n_groups), policy.device)
        self._statistics = sorted(objective.needs & FROM_MODEL)

    @property
    def state(self) -> Any:
        return _rebuilt(self._treedef, self._leaves)

    def __call__(self, batch: Batch, learning_rate: float) -> StepReport:
        """Make one update.

        Args:
            batch: NumPy arrays; all micro-batches that belong to the step.
            learning_rate: of this step.

        Returns:
            What it did; ``skipped`` when a loss or gradient was not finite and nothing was changed.
        """
        gradients, norm, figures, state = self._differentiated(batch)
        if self.max_grad_norm is not None:
            factor = (self.max_grad_norm / norm.clamp(min=1e-6)).clamp(max=1.0)
            gradients = {name: value * factor for name, value in gradients.items()}
        finite = bool(torch.isfinite(norm)) and all(bool(torch.isfinite(one.losses).all()) for one in figures)
        if finite:
            self.optimizer.step(self.policy.masters, gradients, learning_rate)
            self.policy.place_masters()
            self._leaves = state
            if self.moving is not None:
                self.moving.follow()
        return report(batch, figures, to_numpy, norm=float(norm), skipped=not finite)

    def gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        """Gradients of the batch's mean loss by parameter, float32, before clipping; no weight or moment moves."""
        gradients, _, _, _ = self._differentiated(batch)
        return {name: to_numpy(self.policy.slots[name].gathered(value)) for name, value in gradients.items()}

    def _differentiated(self, batch: Batch) -> tuple[Values, Tensor, list[Figures], list[Tensor]]:
        """Gradients of the batch's mean loss, their norm, figures of its parts, and the objective's next state.

        Of several workers each computes its own parts, and all have the same when it returns. Nothing has changed
        when it raises WorkerLost.
        """
        mine, parts = parts_of(self.workers, batch), self._tensors(batch)
        self.policy.model.zero_grad(set_to_none=True)
        self.policy.model.train()
        try:
            figures, state = (self._coupled if self.objective.coupled else self._one_by_one)(parts, mine)
        finally:
            self.policy.model.eval()
        gradients = {name: slot.gradient for name, slot in self.policy.slots.items()}
        self.policy.model.zero_grad(set_to_none=True)
        own: Values = {"squares": _squares(gradients)} if self.policy.sharded else gradients
        if self.objective.coupled:  # whose figures all workers have already
            (own,) = self._added([own])
        else:
            own, *figures = self._added([own, *figures])
        self.n_drawn += 1
        if self.policy.sharded:
            return gradients, own["squares"].sqrt(), figures, state
        return own, _squares(own).sqrt(), figures, state

    def _one_by_one(self, parts: Sequence[MicroBatch], mine: Collection[int]) -> tuple[list[Figures], list[Tensor]]:
        """Backward through each micro-batch for itself."""
        total = sum(part.weights.sum() for part in parts)
        found = [_blank(part, self._compares(part)) for part in parts]
        for index in mine:
            part = parts[index]
            values = self._read(part, index)
            losses = self.objective(columns(values, part))
            self._backward((losses * part.weights).sum() / total)
            found[index] = _figures(losses, values, part)
        self._idle(parts, mine)
        return found, self._leaves

    def _coupled(self, parts: Sequence[MicroBatch], mine: Collection[int]) -> tuple[list[Figures], list[Tensor]]:
        """The same of losses that depend on the whole batch.

        All log-probs first; then the objective on all of them, whose slopes towards each token go back through the
        model, micro-batch after micro-batch, with the dropout of the first pass.
        """
        with torch.no_grad():
            own = {index: self._read(parts[index], index) for index in mine}
            self._idle(parts, mine)
            parts, values = self._gathered(parts, own)
        for of_part in values:
            for value in of_part.values():
                value.requires_grad_(True)
        total = sum(part.weights.sum() for part in parts)
        losses, state = self._apply(values, parts)
        mean = sum((one * part.weights).sum() for one, part in zip(losses, parts, strict=True)) / total
        mean.backward()
        for index in mine:
            again, slopes = self._read(parts[index], index), values[index]
            reached = [name for name, one in slopes.items() if one.grad is not None and again[name].requires_grad]
            self._backward(torch.stack([(again[name] * slopes[name].grad).sum() for name in reached]).sum())
        self._idle(parts, mine)
        figures = [_figures(*one) for one in zip(losses, values, parts, strict=True)]
        return figures, [leaf.detach() for leaf in _flattened(state, self.policy.device)[1]]

    def _backward(self, loss: Tensor) -> None:
        """Sharded gradients are averaged over the workers, and meant to be added up."""
        (loss * self.workers.size if self.policy.sharded else loss).backward()

    # --- several workers ---

    def _idle(self, parts: Sequence[MicroBatch], mine: Sequence[int]) -> None:
        """Through sharded weights all workers go equally often: pass with those that have more parts."""
        for _ in range(self._most - len(mine) if self.policy.sharded else 0):
            nothing = 0.0 * self._read(parts[0], 0)["tokens"].sum()
            if torch.is_grad_enabled():
                self._backward(nothing)

    def _compares(self, part: MicroBatch) -> bool:
        """Whether there is a reference."""
        return self.moving is not None or part.reference is not None

    def _gathered(
        self, parts: Sequence[MicroBatch], own: Mapping[int, Values]
    ) -> tuple[list[MicroBatch], list[Values]]:
        """All micro-batches with the values of each token, and a moving reference's, of whichever worker's they are."""
        names = ("tokens", *self._statistics)
        values = [
            {name: own[index][name] if index in own else torch.zeros_like(part.mask) for name in names}
            for index, part in enumerate(parts)
        ]
        if self.moving is None:
            return list(parts), self._added(values)
        known = [
            {"reference": part.reference if index in own else torch.zeros_like(part.mask)}
            for index, part in enumerate(parts)
        ]
        found = self._added([*values, *known])
        parts = [part._replace(**one) for part, one in zip(parts, found[len(parts) :], strict=True)]
        return parts, found[: len(parts)]

    def _added(self, groups: list[Any]) -> list[Any]:
        """Mappings and figures added up over all workers, by one sum, which also carries the wish to stop."""
        workers = self.workers
        if workers.size == 1:
            return groups
        listed = [list(group.values()) if isinstance(group, Mapping) else list(group) for group in groups]
        leaves = [leaf for group in listed for leaf in group if leaf is not None]
        flag = torch.tensor([float(workers.wants_stop)], device=self.policy.device)
        total = workers.sum(torch.cat([*(leaf.float().reshape(-1) for leaf in leaves), flag]))
        workers.stopping = workers.stopping or float(total[-1]) > 0
        cut = iter(total[:-1].split([leaf.numel() for leaf in leaves]))
        shaped = [[None if leaf is None else next(cut).view(leaf.shape) for leaf in group] for group in listed]
        return [
            dict(zip(group, new, strict=True)) if isinstance(group, Mapping) else Figures(*new)
            for group, new in zip(groups, shaped, strict=True)
        ]

    def _read(self, part: MicroBatch, index: int) -> Values:
        """What the model says of every scored token of the batch's part of this index, dropout as drawn for it."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, self.n_drawn, index]).generate_state(1)[0]))
        logps, more = self.policy.network.token_values(part, self._statistics)
        return {"tokens": logps.tokens, **more}

    def _apply(self, values: Sequence[Values], tensors: Sequence[MicroBatch]) -> tuple[list[Tensor], Any]:
        given = [columns(value, part) for value, part in zip(values, tensors, strict=True)]
        return self.objective.apply_parts(given, self.state)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepReport:
        """Losses and log-probs of a batch under the current weights, dropout off; nothing moves."""
        mine, parts = parts_of(self.workers, batch), self._tensors(batch)
        own = {index: self._read(parts[index], index) for index in mine}
        self._idle(parts, mine)
        parts, values = self._gathered(parts, own)
        losses, _ = self._apply(values, parts)
        figures = [_figures(*one) for one in zip(losses, values, parts, strict=True)]
        return report(batch, figures, to_numpy, norm=0.0, skipped=False)

    def _tensors(self, batch: Batch) -> list[MicroBatch]:
        """All micro-batches on the device, this worker's own with what is the reference's and cannot be known
        beforehand: a moving one's log-probs, hidden rows."""
        mine, device = parts_of(self.workers, batch), self.policy.device
        self._most = max(Counter(batch.workers).values(), default=len(mine))
        return [
            to_torch(self._with_reference(part) if index in mine else part, device)
            for index, part in enumerate(batch.parts)
        ]

    def _with_reference(self, part: MicroBatch) -> MicroBatch:
        if self.moving is not None:
            part = part._replace(reference=reading.token_logps(self.policy, part, reference=True).tokens)
        if "token_kl" in self._statistics:
            hidden = reading.hidden_rows(self.policy, part, reference=True)
            part = part._replace(extras={**part.extras, "reference_hidden": hidden})
        return part

    # --- what a checkpoint keeps ---

    def save_state(self, folder: Path) -> None:
        """Write ``step_state.safetensors``: float32 masters, random state, what optimiser and objective carry from
        step to step, and a reference that moves."""
        slots = self.policy.slots
        held: dict[str, tuple[Slot | None, Tensor]] = {
            f"masters.{name}": (slots[name], value) for name, value in self.policy.masters.items()
        }
        for name, value in self.optimizer.state().items():
            held[f"optimizer.{name}"] = (self._slot_of(name, value), value)
        state = dict(self.policy.gathered(held))
        state |= {f"objective.{index}": leaf for index, leaf in enumerate(self._leaves)}
        if self.moving is not None:
            state |= {f"reference.{name}": value for name, value in self.moving.save().items()}
        state["random"] = torch.tensor(self.n_drawn)
        if self.workers.rank == 0 or not self.policy.sharded:
            write_safetensors(folder / STATE, state)

    def load_state(self, folder: Path) -> None:
        """Take up what ``save_state`` wrote, bit for bit.

        Raises:
            RunError: the file is missing, damaged, or of a run with other parameters.
        """
        file = folder / STATE
        try:
            state = read_safetensors(file)
        except AdapterError as error:
            raise RunError(str(error)) from error
        self._check(file, state)
        for name, value in self.policy.masters.items():
            value.copy_(self.policy.slots[name].sliced(state[f"masters.{name}"]))
        self.policy.place_masters()
        moments = _under(state, "optimizer.")
        for name, value in self.optimizer.state().items():
            if name in moments and (slot := self._slot_of(name, value)) is not None:
                moments[name] = slot.sliced(moments[name])
        self.optimizer.load(moments)
        device = self.policy.device
        self._leaves = [state[f"objective.{index}"].to(device) for index in range(len(self._leaves))]
        if self.moving is not None:
            self.moving.load(_under(state, "reference."))
        self.n_drawn = int(state["random"])

    def _slot_of(self, name: str, moment: Tensor) -> Slot | None:
        """Whose a moment is that has a number for each of its parameter's, and is sliced as that is."""
        parameter = name.partition(".")[2]
        master = self.policy.masters.get(parameter)
        return self.policy.slots[parameter] if master is not None and master.shape == moment.shape else None

    def _check(self, file: Path, state: Mapping[str, Tensor]) -> None:
        held = {name: value.shape for name, value in _under(state, "masters.").items()}
        if held != {name: self.policy.slots[name].shape for name in self.policy.masters}:
            raise RunError(f"{file}: holds other parameters than this configuration trains, or is another backend's")
        if "random" not in state or state["random"].ndim:
            raise RunError(f"{file}: was written by another backend; go on with the one that the run began with")
        if len(_under(state, "objective.")) != len(self._leaves):
            raise RunError(f"{file}: was written by a run with another objective")


def _under(state: Mapping[str, Tensor], prefix: str) -> Values:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _flattened(tree: Any, device: torch.device) -> tuple[Any, list[Tensor]]:
    """A tree of dicts and tuples, and its numbers in order as float32 tensors."""
    leaves: list[Tensor] = []

    def walk(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {name: walk(value) for name, value in node.items()}
        if isinstance(node, tuple):
            found = [walk(value) for value in node]
            return type(node)(*found) if hasattr(node, "_fields") else tuple(found)
        leaf = node if isinstance(node, Tensor) else torch.from_numpy(np.array(node, np.float32))
        leaves.append(leaf.to(device, torch.float32))
        return len(leaves) - 1

    return walk(tree), leaves


def _rebuilt(tree: Any, leaves: Sequence[Tensor]) -> Any:
    if isinstance(tree, Mapping):
        return {name: _rebuilt(value, leaves) for name, value in tree.items()}
    if isinstance(tree, tuple):
        found = [_rebuilt(value, leaves) for value in tree]
        return type(tree)(*found) if hasattr(tree, "_fields") else tuple(found)
    return leaves[tree]


def _figures(losses: Tensor, values: Values, part: MicroBatch) -> Figures:
    """Policy and reference are summed in one way, so that equal tokens give equal sums."""
    known = None if part.reference is None else Logps(part.reference, part.mask).sums
    return Figures(losses.detach(), Logps(values["tokens"].detach(), part.mask).sums, known)


def _blank(part: MicroBatch, compares: bool) -> Figures:
    """Another worker's part, before the sum."""
    sums = torch.zeros_like(part.mask[:, :, 0])
    return Figures(torch.zeros_like(part.weights), sums, sums if compares else None)


def make_step(
    policy: Policy,
    objective: Any,
    *,
    optimizer: str = "adamw",
    optimizer_options: dict[str, Any] | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    seed: int = 0,
    n_groups: int = 1,
    reference_update: Mapping[str, Any] | None = None,
    frozen_tokens: int | None = None,
    workers: Workers | None = None,
) -> Step:
    """The update of a policy under an objective.

    Args:
        policy: with trainable parameters.
        objective: a resolved objective; called with the columns of each micro-batch.
        optimizer, optimizer_options, weight_decay: see ``make_optimizer``.
        max_grad_norm: global norm to clip to; None for no clipping.
        seed: of dropout.
        n_groups: different values of the column ``groups``.
        reference_update: ``kind`` "soft" or "hard", ``alpha`` and ``every``: the reference follows the policy
            (see ``MovingReference``); its log-probs are computed in every step then. None: it stays.
        frozen_tokens: not on PyTorch.
        workers: the processes that share out each batch; every one of them makes the same step.

    Raises:
        ConfigError: of ``make_optimizer``; an objective that compares whole distributions, with a head that
            trains; or, of sharded weights, what needs them whole.
    """
    if "token_kl" in objective.needs and policy.network.outer:
        raise ConfigError(
            f"{objective.name} compares the policy's and the reference's whole distributions, which share one "
            f"head here; {', '.join(policy.network.outer[:3])} would train: adapt layers only"
        )
    if frozen_tokens is not None:
        raise ConfigError("training.cache_frozen is there for model.backend: mlx alone; leave one of the two out")
    if policy.sharded:
        _check_sharded(objective, optimizer, reference_update)
    chosen = make_optimizer(optimizer, weight_decay, optimizer_options)
    moving = None if reference_update is None else MovingReference(policy, **reference_update)
    return Step(policy, objective, chosen, max_grad_norm, seed, n_groups=n_groups, moving=moving, workers=workers)


def _check_sharded(objective: Any, optimizer: str, reference_update: Any) -> None:
    """ConfigError for what cannot be done slice by slice."""
    problems = []
    if optimizer not in ("adam", "adamw", "sgd", "lion"):
        problems.append(f"optimizer {optimizer} looks at whole matrices: adam, adamw, sgd or lion")
    if reference_update is not None:
        problems.append("reference.update needs a second set of passes: leave it out")
    if "token_kl" in objective.needs:
        problems.append(f"{objective.name} compares whole distributions: take another objective")
    raise_all(problems, ConfigError, "training.fsdp:")


def _squares(gradients: Values) -> Tensor:
    """Sum of all squares, always in the same order."""
    return torch.stack([gradients[name].square().sum() for name in sorted(gradients)]).sum()
