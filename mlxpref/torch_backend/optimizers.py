"""The optimisers of the configuration for PyTorch: the updates that MLX's optimisers of the same names make.

Where ``torch.optim`` computes that very update its function is taken (adam, adamw, sgd). The others are written out:
``torch.optim`` has no Lion; its Muon works in bfloat16, decays the weights and not the gradients, and refuses all but
matrices; its Adafactor scales and caps the learning rate and floors the squared gradients elsewhere.

A rule is a function of one step, which it makes in place; its keyword arguments are the options it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.sgd import sgd as torch_sgd

from mlxpref.errors import RunError, raise_all
from mlxpref.optimizer_options import resolve_optimizer

Held = dict[str, Tensor]
"""What an optimiser remembers of one parameter, by slot."""


class OneStep(NamedTuple):
    """What a rule moves, in place: parameters, and what is held of each. The gradients are only read.

    Attributes:
        number: of this step, from 1.
        rate: the learning rate.
    """

    params: list[Tensor]
    gradients: list[Tensor]
    held: list[Held]
    number: int
    rate: float

    def each(self) -> Iterator[tuple[Tensor, Tensor, Held]]:
        return zip(self.params, self.gradients, self.held, strict=True)


class Optimizer:
    """One rule applied to named parameters, and what it remembers of them.

    Args:
        update: the rule, with its options.
        slots: a parameter → zeros for each thing the rule remembers of it.
    """

    def __init__(self, update: Callable[[OneStep], None], slots: Callable[[Tensor], Held]):
        self._update, self._slots = update, slots
        self._n_steps = 0
        self._held: dict[str, Held] = {}

    def init(self, params: Mapping[str, Tensor]) -> None:
        """Remember nothing of these parameters yet; every slot is on its parameter's device."""
        self._n_steps = 0
        self._held = {name: self._slots(param.detach()) for name, param in params.items()}

    @torch.no_grad()
    def step(self, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """Move the parameters, in place. The gradients stay as they are.

        Args:
            params: float32, those of ``init`` by name.
            gradients: float32, of the same names and shapes; zeros where a parameter took no part.
            learning_rate: of this step.

        Raises:
            ValueError: other names than those of ``init``.
        """
        for what, given in (("parameters", params), ("gradients", gradients)):
            if other := given.keys() ^ self._held.keys():
                raise ValueError(f"{what} and optimizer state differ in {', '.join(sorted(other))}")
        self._n_steps += 1
        columns = ([source[name] for name in self._held] for source in (params, gradients, self._held))
        self._update(OneStep(*columns, number=self._n_steps, rate=float(learning_rate)))

    def names(self) -> list[str]:
        """Names of ``state``: ``step``, then ``<slot>.<parameter>``."""
        return list(self.state())

    def state(self) -> dict[str, Tensor]:
        """All that is remembered, by dotted name; ``step`` is an int64 scalar.

        These are the live tensors, which the next ``step`` writes into: clone what is to be kept.
        """
        slots = {f"{slot}.{name}": value for name, held in self._held.items() for slot, value in held.items()}
        return {"step": torch.tensor(self._n_steps), **slots}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave, bit for bit; ``init`` comes first.

        Raises:
            RunError: names are missing or left over, or a tensor has another shape or type. All of them are listed,
                and nothing is taken up.
        """
        own = self.state()
        problems = [f"no {name}" for name in own if name not in state]
        problems += [f"{name} is of no parameter or slot here" for name in state if name not in own]
        problems += [
            f"{name} is {_kind(state[name])}, not {_kind(value)}"
            for name, value in own.items()
            if name in state and _kind(state[name]) != _kind(value)
        ]
        raise_all(problems, RunError, "optimizer state of another optimizer or of other parameters:")
        self._n_steps = int(state["step"])
        for name, value in own.items():
            value.copy_(state[name])


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


# --- taken from torch.optim ----------------------------------------------------------------------


def adam(
    step: OneStep, *, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8, bias_correction: bool = True
) -> None:
    """Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; the correction may be left out, as MLX's Adam has it."""
    adamw(step, betas=betas, eps=eps, bias_correction=bias_correction)


def adamw(
    step: OneStep,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    bias_correction: bool = True,
    weight_decay: float = 0.0,
) -> None:
    """Adam of weights that first shrink by ``rate * weight_decay`` of themselves.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    # After infinitely many steps nothing is left to correct. PyTorch counts this step itself, in each tensor.
    before = float(step.number - 1) if bias_correction else math.inf
    torch_adam(
        step.params,
        step.gradients,
        exp_avgs=[slots["m"] for slots in step.held],
        exp_avg_sqs=[slots["v"] for slots in step.held],
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(before) for _ in step.params],
        decoupled_weight_decay=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=step.rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def sgd(
    step: OneStep,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """Gradient descent; ``weight_decay`` times the weights is added to the gradient.

    The momentum starts from zeros, so dampening damps the first gradient like the others, as in MLX;
    ``torch.optim.SGD`` starts from the first gradient whole.
    """
    torch_sgd(
        step.params,
        step.gradients,
        [slots.get("v") for slots in step.held],
        foreach=False,  # the other way adds Nesterov's momentum into the caller's gradients
        weight_decay=weight_decay,
        momentum=momentum,
        lr=step.rate,
        dampening=dampening,
        nesterov=nesterov,
        maximize=False,
    )


# --- written out ---------------------------------------------------------------------------------


def lion(
    step: OneStep,
    *,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> None:
    """Every element moves by ``rate``: the sign alone counts. Chen et al. 2023, arXiv:2302.06675, algorithm 2."""
    fast, slow = betas
    for param, gradient, slots in step.each():
        # Rounded in the order MLX rounds in: near 0 the last bit decides the sign.
        direction = fast * slots["m"] + (1 - fast) * gradient
        slots["m"].copy_(slow * slots["m"] + (1 - slow) * gradient)
        param.mul_(1 - step.rate * weight_decay).sub_(step.rate * direction.sign())


def muon(
    step: OneStep,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    weight_decay: float = 0.0,
) -> None:
    """Momentum whose singular values are all brought near 1; a vector moves by the momentum itself.

    ``weight_decay`` times the weights is added to the gradient, as MLX does, where the source has none.
    Source: Jordan 2024, kellerjordan.github.io/posts/muon.
    """
    for param, gradient, slots in step.each():
        if weight_decay:
            gradient = gradient + weight_decay * param
        update = slots["v"].copy_(momentum * slots["v"] + (1 - momentum) * gradient)
        if nesterov:
            update = gradient * (1 - momentum) + update * momentum
        length = step.rate
        if update.ndim >= 2:
            update = orthogonal(update.reshape(len(update), -1), ns_steps).reshape(update.shape)
            length = step.rate * max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
        param.sub_(length * update)


def orthogonal(matrix: Tensor, n_steps: int) -> Tensor:
    """(m, n) → (m, n) of the same singular vectors and singular values near 1, by Newton-Schulz iterations."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T, n_steps).T
    matrix = matrix / (torch.linalg.matrix_norm(matrix) + 1e-7)
    for _ in range(n_steps):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * square + 2.0315 * square @ square) @ matrix
    return matrix


def adafactor(
    step: OneStep,
    *,
    eps: Sequence[float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    beta_1: float | None = None,
    scale_parameter: bool = False,
    relative_step: bool = False,
    warmup_init: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """Adam's mean squares kept by row and by column; of a vector, all of them.

    ``scale_parameter`` makes the rate relative to a parameter's root mean square, at least ``eps[1]``;
    ``relative_step`` takes the paper's rate, not the schedule's. Source: Shazeer and Stern 2018, arXiv:1804.04235.
    """
    share = step.number**decay_rate  # of the new in a mean; all of it at the first step
    rate = step.rate
    if relative_step:
        rate = min(1e-6 * step.number if warmup_init else 1e-2, step.number**-0.5)
    for param, gradient, slots in step.each():
        scaled = rate * _rms(param).clamp(min=eps[1]) if scale_parameter else rate
        update = gradient * _inverse_roots(gradient.square() + eps[0], slots, share)
        update = scaled * (update / (_rms(update) / clip_threshold).clamp(min=1.0))
        if beta_1 is not None:
            update = slots["m"].copy_(beta_1 * slots["m"] + (1 - beta_1) * update)
        if weight_decay:
            param.sub_(scaled * weight_decay * param)  # finer than a factor near 1, whose last bits are lost
        param.sub_(update)


def _inverse_roots(squares: Tensor, slots: Held, share: float) -> Tensor:
    """1 / √ of the mean squares, which move first."""

    def moved(slot: str, new: Tensor) -> Tensor:
        return slots[slot].copy_((1 - share) * slots[slot] + share * new)

    if squares.ndim < 2:
        return moved("v", squares).rsqrt()
    rows, columns = moved("row", squares.mean(-1)), moved("column", squares.mean(-2))
    return (rows / rows.mean(-1, keepdim=True)).rsqrt()[..., None] * columns.rsqrt()[..., None, :]


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _alike(param: Tensor, *slots: str) -> Held:
    return {slot: torch.zeros_like(param) for slot in slots}


def _adafactor_slots(param: Tensor, *, beta_1: float | None = None, **_: Any) -> Held:
    moment = () if beta_1 is None else ("m",)
    if param.ndim < 2:
        return _alike(param, "v", *moment)
    rows, columns = param.shape[:-1], param.shape[:-2] + param.shape[-1:]
    return {"row": param.new_zeros(rows), "column": param.new_zeros(columns), **_alike(param, *moment)}


# --- by name -------------------------------------------------------------------------------------

_RULES: dict[str, tuple[Callable[..., None], Callable[..., Held]]] = {
    "adam": (adam, lambda param, **_: _alike(param, "m", "v")),
    "adamw": (adamw, lambda param, **_: _alike(param, "m", "v")),
    "sgd": (sgd, lambda param, momentum=0.0, **_: _alike(param, *(("v",) if momentum else ()))),
    "muon": (muon, lambda param, **_: _alike(param, "v")),
    "adafactor": (adafactor, _adafactor_slots),
    "lion": (lion, lambda param, **_: _alike(param, "m")),
}


def make_optimizer(name: str, weight_decay: float, options: Mapping[str, Any] | None) -> Optimizer:
    """An optimiser that is told its learning rate at every step.

    Args:
        name: adam, adamw, sgd, muon, adafactor or lion.
        weight_decay: at least 0.
        options: by the names MLX's optimisers give them.

    Raises:
        ConfigError: see ``resolve_optimizer``.
    """
    arguments = resolve_optimizer(name, weight_decay, options)
    rule, slots = _RULES[name]
    return Optimizer(partial(rule, **arguments), partial(slots, **arguments))
