"""One update: compiled losses and gradients of each micro-batch, then one compiled optimiser step.

What the optimiser sees is the whole batch; how it is split into micro-batches changes rounding only.
Compiled functions take every changing thing as an argument (parameters, optimiser state, random
state, learning rate), so a shape is traced once and never again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxpref.errors import ConfigError
from mlxpref.mlx_backend import reading, step_state
from mlxpref.mlx_backend.arrays import to_mlx
from mlxpref.mlx_backend.frozen import FrozenRows
from mlxpref.mlx_backend.memory import memory, trim_cache
from mlxpref.mlx_backend.moving import MovingReference
from mlxpref.mlx_backend.optimizers import make_optimizer
from mlxpref.mlx_backend.policy import Policy
from mlxpref.objectives import Objective
from mlxpref.objectives.registry import FROM_MODEL
from mlxpref.records import Batch, Logps, MicroBatch, StepReport
from mlxpref.steps import Figures, columns, parts_of, report
from mlxpref.workers import Workers


class _Part(NamedTuple):
    """What one micro-batch contributes, on the device."""

    losses: mx.array
    tokens: mx.array


Values = dict[str, mx.array]
"""``tokens`` (B, S, L), and by name what else a model says of each token."""


class Step:
    """The owner of weights, optimiser, random state and the objective's state of a run.

    Calling it with a batch and a learning rate makes one update. An objective that couples the examples of a
    batch gets the log-probs of all micro-batches before any gradient is taken: two passes.

    Attributes:
        policy: whose trainable parameters move.
        state: of the objective, by formula.
        moving: the reference, where it follows the policy; else None.
        frozen: what the frozen layers make of the examples, where that is kept; else None.
        workers: who share out each batch; the gradients and figures of all are one sum.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        optimizer: Any,
        max_grad_norm: float | None,
        seed: int,
        *,
        n_groups: int = 1,
        moving: MovingReference | None = None,
        frozen: FrozenRows | None = None,
        workers: Workers | None = None,
    ):
        self.policy = policy
        self.objective = objective
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.optimizer.init(policy.masters)
        self.random = mx.random.key(seed)
        self.state = tree_map(_as_float, objective.initial_state(n_groups))
        self.moving = moving
        self.frozen = frozen
        self.workers = Workers() if workers is None else workers
        self._statistics = objective.needs & FROM_MODEL
        self._step_peak = 0.0
        state = mx.random.state
        self._gradients = mx.compile(self._gradients_of, inputs=state, outputs=state)
        self._values = mx.compile(self._values_of, inputs=state, outputs=state)
        self._pull = mx.compile(self._pull_of, inputs=state, outputs=state)
        self._add = mx.compile(lambda one, other: {name: one[name] + other[name] for name in one})
        self._losses = mx.compile(self._losses_of)
        self._update = mx.compile(self._update_of)

    # --- traced functions: pure in their arguments ---

    def _read(self, masters: dict[str, mx.array], batch: MicroBatch, differentiate: bool) -> Values:
        """What the model with these weights says of every scored token."""
        policy, held = self.policy, self.policy.trainable()
        policy.n_traced += 1
        policy.update({name: value.astype(policy.dtypes[name]) for name, value in masters.items()})
        try:
            logps, more = policy.network.token_values(
                batch, differentiate=differentiate, statistics=self._statistics
            )
        finally:
            policy.update(held)
        return {"tokens": logps.tokens, **more}

    def _gradients_of(
        self, masters: dict[str, mx.array], batch: MicroBatch, total: mx.array
    ) -> tuple[dict[str, mx.array], _Part]:
        """Gradients of Σ loss / total."""

        def objective(masters: dict[str, mx.array]) -> tuple[mx.array, _Part]:
            values = self._read(masters, batch, differentiate=True)
            losses = self.objective(columns(values, batch))
            return (losses * batch.weights).sum() / total, _Part(losses, values["tokens"])

        (_, part), gradients = mx.value_and_grad(objective)(masters)
        return gradients, part

    def _values_of(self, masters: dict[str, mx.array], batch: MicroBatch) -> Values:
        # A head that trains draws its dropout apart; otherwise the plain forward draws what the gradient's does.
        return self._read(masters, batch, differentiate=bool(self.policy.network.outer))

    def _pull_of(self, masters: dict[str, mx.array], batch: MicroBatch, slopes: Values) -> dict[str, mx.array]:
        """Gradients of what has these slopes towards the values of each token."""

        def pulled(masters: dict[str, mx.array]) -> mx.array:
            values = self._read(masters, batch, differentiate=True)
            return sum((values[name] * slope).sum() for name, slope in slopes.items())

        return mx.grad(pulled)(masters)

    def _losses_of(self, masters: dict[str, mx.array], batch: MicroBatch) -> Values:
        return self._read(masters, batch, differentiate=False)

    def _update_of(
        self,
        masters: dict[str, mx.array],
        state: Any,
        gradients: dict[str, mx.array],
        rate: mx.array,
        loss: mx.array,
    ) -> tuple[dict[str, mx.array], Any, mx.array, mx.array]:
        """Clip, update, and keep everything as it was if the loss or any gradient is not finite."""
        norm = mx.sqrt(sum(mx.square(gradients[name]).sum() for name in sorted(gradients)))
        if self.max_grad_norm is not None:
            factor = mx.minimum(self.max_grad_norm / mx.maximum(norm, 1e-6), 1.0)
            gradients = {name: g * factor for name, g in gradients.items()}
        finite = mx.isfinite(norm) & mx.isfinite(loss)
        # The optimiser writes into nested dictionaries: give it its own, keep the old ones whole.
        self.optimizer.state = {**tree_map(lambda value: value, state), "learning_rate": rate}
        moved = self.optimizer.apply_gradients(gradients, masters)
        new_state = self.optimizer.state

        def keep(new: mx.array, old: mx.array) -> mx.array:
            return mx.where(finite, new, old)

        return tree_map(keep, moved, masters), tree_map(keep, new_state, state), norm, finite

    # --- the step itself ---

    def __call__(self, batch: Batch, learning_rate: float) -> StepReport:
        """Make one update.

        Args:
            batch: NumPy arrays; all micro-batches that belong to the step.
            learning_rate: of this step.

        Returns:
            What it did; ``skipped`` when a loss or gradient was not finite and nothing was changed.
        """
        policy = self.policy
        batch, gradients, found, state = self._differentiated(batch)
        rate, loss = mx.array(learning_rate, mx.float32), sum(part.losses.sum() for part in found)
        masters, moments, norm, finite = self._update(policy.masters, self.optimizer.state, gradients, rate, loss)
        policy.set_masters(masters)
        self.optimizer.state = moments
        self.state = tree_map(lambda new, old: mx.where(finite, new, old), state, self.state)
        mx.eval(policy.masters, policy.trainable(), moments, self.state, self.random, norm, finite, found)
        done = bool(finite.item())
        if self.moving is not None and done:
            self.moving.follow()
        self._tidy()
        return report(batch, found, np.array, norm=float(norm.item()), skipped=not done)

    def gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        """Gradients of the batch's mean loss by parameter, float32, before clipping; no weight or moment moves."""
        try:
            _, gradients, _, _ = self._differentiated(batch)
            return {name: np.array(value) for name, value in gradients.items()}
        finally:
            self.policy.set_masters(self.policy.masters)  # a trace may have left its own arrays in the model

    def _differentiated(self, batch: Batch) -> tuple[Batch, dict[str, mx.array], list[Figures], Any]:
        """The batch completed, gradients of its mean loss, figures of its parts, and the objective's next state.

        Of several workers each computes its own parts, and all have the same when it returns. Nothing has changed
        when it raises WorkerLost.
        """
        self._train_mode(True)
        random, key = mx.random.split(self.random)
        keys = [mx.random.split(key, index + 2)[-1] for index in range(len(batch.parts))]
        mine = parts_of(self.workers, batch)
        batch = self._completed(batch, mine)
        arrays = [to_mlx(part) for part in batch.parts]
        if self.objective.coupled:
            arrays, gradients, found, state = self._coupled(batch, arrays, keys, mine)
            [gradients] = self._added([gradients])
        else:
            gradients, own = self._one_by_one(batch, arrays, keys, mine)
            blank = [_blank_sums(part, self._compares(arrays)) for part in arrays]
            parts = [_sums(own[i], arrays[i]) if i in own else blank[i] for i in range(len(arrays))]
            gradients, *found = self._added([gradients, *parts])
            state = self.state
        self.random = random
        return batch, gradients, found, state

    def _compares(self, arrays: Sequence[MicroBatch]) -> bool:
        """Whether there is a reference."""
        return self.moving is not None or arrays[0].reference is not None

    def _added(self, trees: list[Any]) -> list[Any]:
        """Trees of float32 arrays added up over all workers, by one sum, which also carries the wish to stop."""
        workers = self.workers
        if workers.size == 1:
            return trees
        leaves = [leaf for _, leaf in tree_flatten(trees) if leaf is not None]
        flag = mx.array([float(workers.wants_stop)], mx.float32)
        total = workers.sum(mx.concatenate([*(leaf.reshape(-1).astype(mx.float32) for leaf in leaves), flag]))
        workers.stopping = workers.stopping or float(total[-1].item()) > 0
        cuts = np.cumsum([leaf.size for leaf in leaves]).tolist()
        shapes = (leaf.shape for leaf in leaves)
        pieces = (piece.reshape(shape) for piece, shape in zip(mx.split(total, cuts), shapes, strict=False))
        return tree_map(lambda leaf: None if leaf is None else next(pieces), trees)

    def _entered(self, batch: Batch, arrays: Sequence[MicroBatch], index: int) -> MicroBatch:
        """A micro-batch with what the frozen layers make of it, where that is kept."""
        if self.frozen is None:
            return arrays[index]
        return arrays[index]._replace(hidden=self.frozen.hidden(batch.parts[index], batch.rows[index]))

    def _one_by_one(
        self, batch: Batch, arrays: Sequence[MicroBatch], keys: Sequence[mx.array], mine: Sequence[int]
    ) -> tuple[dict[str, mx.array], dict[int, _Part]]:
        """Gradients of the mean loss from these micro-batches, each for itself; a part by its index."""
        total = _weight(arrays)
        parts: dict[int, _Part] = {}

        def gradients(index: int) -> dict[str, mx.array]:
            _seed(keys[index])
            found, parts[index] = self._gradients(self.policy.masters, self._entered(batch, arrays, index), total)
            return found

        return self._summed(gradients, mine, parts), parts

    def _summed(
        self, gradients: Callable[[int], dict[str, mx.array]], mine: Sequence[int], beside: Mapping[int, _Part]
    ) -> dict[str, mx.array]:
        """The sum of the micro-batches' gradients, in the parameters' order; zero of a worker that has no part of a
        small batch. Each micro-batch is computed before the next is begun, so its activations are alone, and its
        gradients are held by nothing but the sum. ``beside`` is computed with them.
        """
        masters = self.policy.masters
        if not mine:
            return tree_map(mx.zeros_like, masters)
        total: dict[str, mx.array] | None = None
        for index in mine:
            total = gradients(index) if total is None else self._add(total, gradients(index))
            mx.eval(total, beside.get(index))
        return {name: total[name] for name in masters}

    def _coupled(
        self, batch: Batch, arrays: Sequence[MicroBatch], keys: Sequence[mx.array], mine: Sequence[int]
    ) -> tuple[list[MicroBatch], dict[str, mx.array], list[Figures], Any]:
        """The same of losses that depend on the whole batch, and the objective's next state.

        All log-probs first; then the objective on all of them, whose slopes towards each token go back
        through the model, micro-batch after micro-batch, with the dropout of the first pass.
        """
        own = {}
        for index in mine:
            _seed(keys[index])
            own[index] = self._values(self.policy.masters, self._entered(batch, arrays, index))
            mx.eval(own[index])
        arrays, values = self._gathered(arrays, own)
        total = _weight(arrays)

        def objective(values: list[Values]) -> tuple[mx.array, Any]:
            losses, state = self._apply(values, arrays)
            weighted = [(one * part.weights).sum() for one, part in zip(losses, arrays, strict=True)]
            return sum(weighted) / total, (losses, state)

        (_, (losses, state)), slopes = mx.value_and_grad(objective)(values)

        def pulled(index: int) -> dict[str, mx.array]:
            _seed(keys[index])
            return self._pull(self.policy.masters, self._entered(batch, arrays, index), slopes[index])

        return arrays, self._summed(pulled, mine, {}), _all_sums(losses, values, arrays), state

    def _gathered(
        self, arrays: Sequence[MicroBatch], own: Mapping[int, Values]
    ) -> tuple[list[MicroBatch], list[Values]]:
        """All micro-batches with the values of each token, and a moving reference's, of whichever worker's they are."""
        names = ("tokens", *sorted(self._statistics))
        values = [
            {name: own[index][name] if index in own else mx.zeros(part.mask.shape) for name in names}
            for index, part in enumerate(arrays)
        ]
        if self.moving is None:
            return list(arrays), self._added(values)
        known = [mx.zeros(part.mask.shape) if part.reference is None else part.reference for part in arrays]
        *values, known = self._added([*values, known])
        return [part._replace(reference=one) for part, one in zip(arrays, known, strict=True)], values

    def _apply(self, values: Sequence[Values], arrays: Sequence[MicroBatch]) -> tuple[list[mx.array], Any]:
        given = [columns(value, part) for value, part in zip(values, arrays, strict=True)]
        return self.objective.apply_parts(given, self.state)

    def evaluate(self, batch: Batch) -> StepReport:
        """Losses and log-probs of a batch under the current weights, dropout off; nothing moves."""
        self._train_mode(False)
        mine = parts_of(self.workers, batch)
        batch = self._completed(batch, mine)
        arrays, own = [to_mlx(part) for part in batch.parts], {}
        for index in mine:
            own[index] = self._losses(self.policy.masters, arrays[index])
            mx.eval(own[index])
        arrays, values = self._gathered(arrays, own)
        losses, _ = self._apply(values, arrays)
        return report(batch, _all_sums(losses, values, arrays), np.array, norm=0.0, skipped=False)

    def _completed(self, batch: Batch, mine: Sequence[int]) -> Batch:
        """With what is the reference's and cannot be known beforehand, in this worker's parts: a moving one's
        log-probs, hidden rows."""
        parts = list(batch.parts)
        for index in mine:
            parts[index] = self._with_reference(parts[index])
        return batch._replace(parts=tuple(parts))

    def _with_reference(self, part: MicroBatch) -> MicroBatch:
        if self.moving is not None:
            part = part._replace(reference=reading.token_logps(self.policy, part, reference=True).tokens)
        if "token_kl" in self._statistics:
            hidden = reading.hidden_rows(self.policy, part, reference=True)
            part = part._replace(extras={**part.extras, "reference_hidden": hidden})
        return part

    def _train_mode(self, on: bool) -> None:
        if self.policy.model.training != on:
            self.policy.model.train(on)

    def _tidy(self) -> None:
        self._step_peak = max(self._step_peak, memory()["peak"])
        trim_cache(self._step_peak)

    def save_state(self, folder: Path) -> None:
        """Write what an update depends on besides the model: see ``step_state.save``."""
        step_state.save(self, folder)

    def load_state(self, folder: Path) -> None:
        """Take up what ``save_state`` wrote, bit for bit. RunError when it is damaged or another run's."""
        step_state.load(self, folder)


def _as_float(value: Any) -> mx.array:
    return mx.array(np.asarray(value, np.float32))


def _weight(arrays: Sequence[MicroBatch]) -> mx.array:
    """Σ of the examples' weights."""
    return mx.array(float(sum(part.weights.sum().item() for part in arrays)), mx.float32)


def _seed(key: mx.array) -> None:
    """Make ``key`` the state that dropout draws from; the compiled function takes it as an input."""
    mx.random.state[0][:] = key


def _sums(part: _Part, batch: MicroBatch) -> Figures:
    """Sums (B, S) of policy and reference, by one kernel, so that equal tokens give equal sums.

    Summed here and not in the compiled step: a sum that the objective forms as well, returned beside
    the losses, breaks the fused graph ("_Map_base::at", MLX 0.32.4).
    """
    known = None if batch.reference is None else Logps(batch.reference, batch.mask).sums
    return Figures(part.losses, Logps(part.tokens, batch.mask).sums, known)


def _all_sums(losses: Sequence[mx.array], values: Sequence[Values], arrays: Sequence[MicroBatch]) -> list[Figures]:
    given = zip(losses, values, arrays, strict=True)
    return [_sums(_Part(one, value["tokens"]), part) for one, value, part in given]


def _blank_sums(batch: MicroBatch, compares: bool) -> Figures:
    """Another worker's part, before the sum."""
    n, slots, _ = batch.mask.shape
    return Figures(mx.zeros(n), mx.zeros((n, slots)), mx.zeros((n, slots)) if compares else None)


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
    """The compiled update of a policy under an objective.

    Args:
        policy: with trainable parameters.
        objective: a resolved objective; called with the columns of each micro-batch.
        optimizer, optimizer_options, weight_decay: see ``make_optimizer``.
        max_grad_norm: global norm to clip to; None for no clipping.
        seed: of dropout.
        n_groups: different values of the column ``groups``.
        reference_update: ``kind`` "soft" or "hard", ``alpha`` and ``every``: the reference follows the policy
            (see ``MovingReference``); its log-probs are computed in every step then. None: it stays.
        frozen_tokens: what the frozen layers make of each example is kept, of so many token positions at most (see
            ``FrozenRows``). None: it is computed in every step.
        workers: the processes that share out each batch; every one of them makes the same step.

    Raises:
        ConfigError: of ``make_optimizer`` and of ``FrozenRows``; or an objective that compares whole
            distributions, with a head that trains.
    """
    if "token_kl" in objective.needs and policy.network.outer:
        raise ConfigError(
            f"{objective.name} compares the policy's and the reference's whole distributions, which share one "
            f"head here; {', '.join(policy.network.outer[:3])} would train: adapt layers only"
        )
    chosen = make_optimizer(optimizer, weight_decay, optimizer_options)
    moving = None if reference_update is None else MovingReference(policy, **reference_update)
    if frozen_tokens is not None and workers is not None and workers.size > 1:
        raise ConfigError("training.cache_frozen keeps rows for one worker, which meets all examples: leave it out")
    frozen = None if frozen_tokens is None else FrozenRows(policy, frozen_tokens)
    return Step(
        policy, objective, chosen, max_grad_norm, seed,
        n_groups=n_groups, moving=moving, frozen=frozen, workers=workers,
    )  # fmt: skip
