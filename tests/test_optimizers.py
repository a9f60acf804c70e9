"""One update given one gradient: MLX's optimisers, PyTorch's, and each paper's algorithm in float64 NumPy.

Finds: an epsilon, decay, dampening or bias correction that one library puts elsewhere than the other; an option that
does nothing; a state that is not all of it. Two measures: how far apart the parameters are (relative to the largest),
and how far apart they moved (relative to the longest move), which sees a wrong term behind large weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlxpref.errors import ConfigError, RunError
from mlxpref.schedules import make_schedule

Arrays = dict[str, np.ndarray]

SHAPES = {"wide.lora_b": (4, 24), "tall.lora_a": (24, 4), "bias": (33,), "experts.weight": (3, 7, 5)}
N_STEPS = 20
RATE = 1e-2

SCALED = {"scale_parameter": True, "eps": [1e-6, 1e3]}
"""A warm-up of 1e-6 a step moves too little to be measured: as if of large weights."""

CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "adam": ("adam", 0.0, {}),
    "adam-uncorrected": ("adam", 0.0, {"bias_correction": False}),
    "adam-large-eps": ("adam", 0.0, {"betas": [0.8, 0.95], "eps": 1e-2}),
    "adamw": ("adamw", 0.1, {}),
    "adamw-uncorrected": ("adamw", 0.1, {"bias_correction": False, "eps": 1e-3}),
    "sgd": ("sgd", 0.0, {}),
    "sgd-momentum": ("sgd", 0.1, {"momentum": 0.9}),
    "sgd-dampening": ("sgd", 0.1, {"momentum": 0.9, "dampening": 0.5}),
    "sgd-nesterov": ("sgd", 0.0, {"momentum": 0.9, "nesterov": True}),
    "lion": ("lion", 0.0, {}),
    "lion-decay": ("lion", 0.1, {"betas": [0.8, 0.9]}),
    "muon": ("muon", 0.0, {}),
    "muon-options": ("muon", 0.1, {"momentum": 0.8, "nesterov": False, "ns_steps": 3}),
    "adafactor": ("adafactor", 0.0, {}),
    "adafactor-options": ("adafactor", 0.1, {"beta_1": 0.9, "clip_threshold": 0.5, "decay_rate": -0.5}),
    "adafactor-scaled": ("adafactor", 0.1, {"scale_parameter": True}),
    "adafactor-relative": ("adafactor", 0.1, {"relative_step": True}),
    "adafactor-warmup": ("adafactor", 0.0, {"relative_step": True, "warmup_init": True, **SCALED}),
}
"""Optimiser, weight decay and options."""

SCHEDULES = {
    "constant": make_schedule("constant", learning_rate=RATE, n_steps=N_STEPS),
    "linear": make_schedule("linear", learning_rate=RATE, n_steps=N_STEPS, warmup=4),
    "cosine": make_schedule("cosine", learning_rate=RATE, n_steps=N_STEPS, warmup=2, end=1e-3),
}

BETWEEN_LIBRARIES = (1e-6, 1e-5)
FROM_PAPER = (2e-6, 5e-5)
"""Parameters and moves apart, float32 against float32 and against float64."""
case_names = pytest.mark.parametrize("case", CASES)


@cache
def start() -> Arrays:
    draw = np.random.default_rng(0)
    return {name: _normal(draw, shape, 0.1) for name, shape in SHAPES.items()}


@cache
def gradients() -> list[Arrays]:
    """Of very different sizes from step to step, some near the epsilons."""
    draw = np.random.default_rng(1)
    sizes = 10.0 ** draw.uniform(-4, 0, N_STEPS)
    return [{name: _normal(draw, shape, size) for name, shape in SHAPES.items()} for size in sizes]


def _normal(draw: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    return (size * draw.standard_normal(shape)).astype(np.float32)


def rates(schedule: str) -> list[float]:
    return [SCHEDULES[schedule](step) for step in range(N_STEPS)]


# --- the two libraries --------------------------------------------------------------------------


def torch_optimizer(name: str, weight_decay: float = 0.0, options: Mapping[str, Any] | None = None) -> Any:
    from mlxpref.torch_backend.optimizers import make_optimizer

    return make_optimizer(name, weight_decay, options)


def mlx_optimizer(name: str, weight_decay: float = 0.0, options: Mapping[str, Any] | None = None) -> Any:
    from mlxpref.mlx_backend.optimizers import make_optimizer

    return make_optimizer(name, weight_decay, options)


def tensors(arrays: Arrays) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(value) for name, value in arrays.items()}


def by_torch(
    name: str, weight_decay: float, options: Mapping[str, Any], rates: list[float], grads: list[Arrays], at: Arrays
) -> Arrays:
    optimizer, params = torch_optimizer(name, weight_decay, options), tensors(at)
    optimizer.init(params)
    for gradient, rate in zip(grads, rates, strict=False):
        optimizer.step(params, tensors(gradient), rate)
    return {key: value.numpy() for key, value in params.items()}


def by_mlx(
    name: str,
    weight_decay: float,
    options: Mapping[str, Any],
    rates: list[float],
    grads: list[Arrays],
    at: Arrays,
    compiled: bool = False,
) -> Arrays:
    import mlx.core as mx
    from mlx.utils import tree_map

    optimizer, params = mlx_optimizer(name, weight_decay, options), {key: mx.array(value) for key, value in at.items()}
    optimizer.init(params)
    state = optimizer.state

    def update(params: Any, state: Any, gradient: Any, rate: Any) -> tuple[Any, Any]:
        optimizer.state = {**tree_map(lambda value: value, state), "learning_rate": rate}
        moved = optimizer.apply_gradients(gradient, params)
        return moved, optimizer.state

    update = mx.compile(update) if compiled else update
    for gradient, rate in zip(grads, rates, strict=False):
        given = {key: mx.array(value) for key, value in gradient.items()}
        params, state = update(params, state, given, mx.array(rate, mx.float32))
        mx.eval(params, state)
    return {key: np.array(value) for key, value in params.items()}


@cache
def final(library: str, case: str, schedule: str) -> Arrays:
    name, weight_decay, options = CASES[case]
    run = {"torch": by_torch, "mlx": by_mlx, "paper": by_paper}[library]
    return run(name, weight_decay, options, rates(schedule), gradients(), start())


def apart(found: Arrays, expected: Arrays) -> tuple[float, float]:
    """Largest difference of the parameters and of their moves, each relative to the largest of its tensor."""
    params, moves = 0.0, 0.0
    for name, begun in start().items():
        one, other = found[name].astype(np.float64), expected[name].astype(np.float64)
        difference = np.abs(one - other).max()
        params = max(params, difference / np.abs(other).max())
        moves = max(moves, difference / np.abs(other - begun).max())
    return params, moves


def assert_near(found: Arrays, expected: Arrays, allowed: tuple[float, float]) -> None:
    params, moves = apart(found, expected)
    assert params <= allowed[0]
    assert moves <= allowed[1]


# --- the papers ---------------------------------------------------------------------------------


def adam_paper(
    w: np.ndarray, gs: list[np.ndarray], rates: list[float], decay: float, options: Mapping[str, Any]
) -> np.ndarray:
    """Kingma and Ba, algorithm 1; Loshchilov and Hutter, algorithm 2, for ``decay``."""
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    corrected, eps = options.get("bias_correction", True), options.get("eps", 1e-8)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, alpha) in enumerate(zip(gs, rates, strict=True), 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t) if corrected else m
        v_hat = v / (1 - beta2**t) if corrected else v
        w = w - alpha * (m_hat / (np.sqrt(v_hat) + eps) + decay * w)
    return w


def sgd_paper(
    w: np.ndarray, gs: list[np.ndarray], rates: list[float], decay: float, options: Mapping[str, Any]
) -> np.ndarray:
    """Heavy ball; Nesterov's as Sutskever et al. 2013 have it, in the form that looks ahead from the new momentum."""
    mu, tau = options.get("momentum", 0.0), options.get("dampening", 0.0)
    v = np.zeros_like(w)
    for g, alpha in zip(gs, rates, strict=True):
        slope = g + decay * w
        v = mu * v + (1 - tau) * slope
        w = w - alpha * (slope + mu * v if options.get("nesterov") else v)
    return w


def lion_paper(
    w: np.ndarray, gs: list[np.ndarray], rates: list[float], decay: float, options: Mapping[str, Any]
) -> np.ndarray:
    """Chen et al., algorithm 2."""
    beta1, beta2 = options.get("betas", (0.9, 0.99))
    m = np.zeros_like(w)
    for g, eta in zip(gs, rates, strict=True):
        c = beta1 * m + (1 - beta1) * g
        w = w - eta * (np.sign(c) + decay * w)
        m = beta2 * m + (1 - beta2) * g
    return w


def muon_paper(
    w: np.ndarray, gs: list[np.ndarray], rates: list[float], decay: float, options: Mapping[str, Any]
) -> np.ndarray:
    """Jordan's post, its polynomial on the singular values themselves; decay in the gradient, as MLX has it."""
    mu, v = options.get("momentum", 0.95), np.zeros_like(w)
    for g, eta in zip(gs, rates, strict=True):
        slope = g + decay * w
        v = v + (1 - mu) * (slope - v)
        update = slope + mu * (v - slope) if options.get("nesterov", True) else v
        if w.ndim > 1:
            left, values, right = np.linalg.svd(update.reshape(w.shape[0], -1), full_matrices=False)
            values = values / np.sqrt((values**2).sum())
            for _ in range(options.get("ns_steps", 5)):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            update = (left * values @ right).reshape(w.shape)
            eta *= math.sqrt(max(1, w.shape[-2] / w.shape[-1]))
        w = w - eta * update
    return w


def adafactor_paper(
    w: np.ndarray, gs: list[np.ndarray], rates: list[float], decay: float, options: Mapping[str, Any]
) -> np.ndarray:
    """Shazeer and Stern, algorithms 4 and 5, by sums of rows and columns; of a stack each matrix has its own."""
    eps1, eps2 = options.get("eps", (1e-30, 1e-3))
    d, beta1 = options.get("clip_threshold", 1.0), options.get("beta_1")
    row, column, full, m = (np.zeros(()) for _ in range(4))
    for t, (g, rho) in enumerate(zip(gs, rates, strict=True), 1):
        beta2 = 1 - t ** options.get("decay_rate", -0.8)
        if options.get("relative_step"):
            rho = min(1e-6 * t if options.get("warmup_init") else 1e-2, 1 / math.sqrt(t))
        alpha = max(eps2, rms(w)) * rho if options.get("scale_parameter") else rho
        squares = g**2 + eps1
        if w.ndim > 1:
            row = beta2 * row + (1 - beta2) * squares.sum(-1)
            column = beta2 * column + (1 - beta2) * squares.sum(-2)
            full = np.einsum("...n,...m->...nm", row, column) / row.sum(-1)[..., None, None]
        else:
            full = beta2 * full + (1 - beta2) * squares
        u = g / np.sqrt(full)
        step = alpha * u / max(1, rms(u) / d)
        m = step if beta1 is None else beta1 * m + (1 - beta1) * step
        w = w - m - decay * alpha * w
    return w


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean()))


PAPERS: dict[str, Callable[..., np.ndarray]] = {
    "adam": adam_paper,
    "adamw": adam_paper,
    "sgd": sgd_paper,
    "lion": lion_paper,
    "muon": muon_paper,
    "adafactor": adafactor_paper,
}


def by_paper(
    name: str, weight_decay: float, options: Mapping[str, Any], rates: list[float], grads: list[Arrays], at: Arrays
) -> Arrays:
    def moved(key: str) -> np.ndarray:
        slopes = [gradient[key].astype(np.float64) for gradient in grads]
        return PAPERS[name](at[key].astype(np.float64), slopes, rates, weight_decay, options)

    return {key: moved(key) for key in at}


# --- the same update ----------------------------------------------------------------------------


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize("schedule", SCHEDULES)
@case_names
def test_both_libraries_make_the_same_updates(case: str, schedule: str) -> None:
    assert_near(final("torch", case, schedule), final("mlx", case, schedule), BETWEEN_LIBRARIES)


@pytest.mark.torch
@pytest.mark.parametrize("schedule", SCHEDULES)
@case_names
def test_pytorch_makes_the_update_of_the_paper(case: str, schedule: str) -> None:
    assert_near(final("torch", case, schedule), final("paper", case, schedule), FROM_PAPER)


@pytest.mark.mlx
@pytest.mark.parametrize("schedule", SCHEDULES)
@case_names
def test_mlx_makes_the_update_of_the_paper(case: str, schedule: str) -> None:
    """MLX's own Adam forms 1 - beta2 ** t in float32: its corrected steps are short by 6.4e-6, all to one side."""
    assert_near(final("mlx", case, schedule), final("paper", case, schedule), FROM_PAPER)


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize("case", ["adamw", "sgd-momentum", "lion-decay"])
def test_compiled_as_a_step_compiles_it(case: str) -> None:
    """The graph a training step runs may round otherwise than the operations one by one."""
    name, weight_decay, options = CASES[case]
    compiled = by_mlx(name, weight_decay, options, rates("cosine"), gradients(), start(), compiled=True)
    assert_near(final("torch", case, "cosine"), compiled, BETWEEN_LIBRARIES)


@pytest.mark.mlx
@pytest.mark.torch
def test_signs_agree_where_momentum_and_gradient_cancel() -> None:
    """Lion's step has full length however small the sum: one bit of rounding would send it the other way."""
    first = np.random.default_rng(2).standard_normal(4000).astype(np.float32)
    second = (-np.float32(0.9) * (np.float32(0.01) * first) / np.float32(0.1)).astype(np.float32)
    grads, at = [{"w": first}, {"w": second}], {"w": np.zeros(4000, np.float32)}
    ours, theirs = (run("lion", 0.0, {}, [1.0, 1.0], grads, at)["w"] for run in (by_torch, by_mlx))
    assert np.abs(ours + np.sign(first)).max() == 1 and (ours == -np.sign(first)).any()  # some cancel, some do not
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.mlx
@pytest.mark.torch
@case_names
def test_a_zero_gradient_or_rate_moves_nothing(case: str) -> None:
    """At the first step of a LoRA every ``lora_a`` has gradient 0, and a warm-up begins at rate 0."""
    name, _, options = CASES[case]
    zeros = {key: np.zeros_like(value) for key, value in start().items()}
    for run in (by_torch, by_mlx):
        for grads, rate in ((zeros, RATE), (gradients()[0], 0.0)):
            if rate or not options.get("relative_step"):
                found = run(name, 0.0, options, [rate], [grads], start())
                assert all((found[key] == value).all() for key, value in start().items())


# --- options ------------------------------------------------------------------------------------

CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("adam", {}, {"betas": [0.8, 0.999]}),
    ("adam", {}, {"betas": [0.9, 0.9]}),
    ("adam", {}, {"eps": 1e-2}),
    ("adam", {}, {"bias_correction": False}),
    ("adamw", {}, {"betas": [0.8, 0.9]}),
    ("adamw", {}, {"eps": 1e-2}),
    ("adamw", {}, {"bias_correction": False}),
    ("sgd", {}, {"momentum": 0.5}),
    ("sgd", {"momentum": 0.5}, {"dampening": 0.5}),
    ("sgd", {"momentum": 0.5}, {"nesterov": True}),
    ("lion", {}, {"betas": [0.5, 0.99]}),
    ("lion", {}, {"betas": [0.9, 0.5]}),
    ("muon", {}, {"momentum": 0.5}),
    ("muon", {}, {"nesterov": False}),
    ("muon", {}, {"ns_steps": 1}),
    ("adafactor", {}, {"eps": [1e-2, 1e-3]}),
    ("adafactor", {"scale_parameter": True}, {"eps": [1e-30, 5.0]}),
    ("adafactor", {}, {"clip_threshold": 0.5}),
    ("adafactor", {}, {"decay_rate": -0.5}),
    ("adafactor", {}, {"beta_1": 0.5}),
    ("adafactor", {}, {"scale_parameter": True}),
    ("adafactor", {}, {"relative_step": True}),
    ("adafactor", {"relative_step": True}, {"warmup_init": True}),
]


@pytest.mark.torch
@pytest.mark.parametrize("name, base, change", CHANGES, ids=lambda value: str(value))
def test_every_option_acts(name: str, base: dict[str, Any], change: dict[str, Any]) -> None:
    falling = rates("linear")
    plain = by_torch(name, 0.0, base, falling, gradients(), start())
    changed = by_torch(name, 0.0, {**base, **change}, falling, gradients(), start())
    assert apart(changed, plain)[1] > 1e-3


@pytest.mark.torch
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon", "adafactor"])
def test_weight_decay_acts(name: str) -> None:
    plain, decayed = (by_torch(name, decay, {}, rates("linear"), gradients(), start()) for decay in (0.0, 0.1))
    assert apart(decayed, plain)[1] > 1e-3


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "muon", "adafactor"])
def test_both_libraries_take_the_same_options(name: str) -> None:
    """And every one of them is seen to act above."""

    def taken(make: Callable[..., Any]) -> set[str]:
        with pytest.raises(ConfigError) as refused:
            make(name, 0.0, {"no_option": 1})
        return set(str(refused.value).partition("it takes ")[2].split(", ")) - {"weight_decay"}

    assert taken(torch_optimizer) == taken(mlx_optimizer)
    assert taken(torch_optimizer) == {option for by, _, change in CHANGES if by == name for option in change}


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize(
    "name, weight_decay, options, message",
    [
        ("adamax", 0.0, {}, "unknown optimizer 'adamax'; one of adam, adamw, sgd, muon, adafactor, lion"),
        ("adamw", 0.0, {"momentum": 0.9, "alpha": 1}, "optimizer adamw takes no alpha, momentum; it takes "),
        ("adam", 0.1, {}, "optimizer adam has no weight decay; set weight_decay: 0 or use adamw"),
    ],
)
def test_both_libraries_refuse_alike(name: str, weight_decay: float, options: dict[str, Any], message: str) -> None:
    for make in (torch_optimizer, mlx_optimizer):
        with pytest.raises(ConfigError) as refused:
            make(name, weight_decay, options)
        assert message in str(refused.value)


@pytest.mark.torch
@pytest.mark.parametrize(
    "name, weight_decay, options, message",
    [
        ("adamw", 0.0, {"weight_decay": 0.1}, "takes no weight_decay"),
        ("adamw", -0.1, {}, "weight_decay is -0.1"),
        ("adamw", math.nan, {}, "weight_decay is nan"),
        ("adamw", 0.0, {"betas": [0.9, 1.0]}, r"betas is \[0.9, 1.0\]: two numbers from 0 to below 1"),
        ("adamw", 0.0, {"betas": [0.9]}, "betas"),
        ("adamw", 0.0, {"betas": 0.9}, "betas"),
        ("adam", 0.0, {"eps": -1e-8}, "eps"),
        ("adam", 0.0, {"eps": [1e-30, 1e-3]}, "eps is .*: a number from 0"),
        ("adam", 0.0, {"bias_correction": "false"}, "bias_correction is 'false': true or false"),
        ("lion", 0.0, {"betas": [-0.1, 0.9]}, "betas"),
        ("sgd", 0.0, {"momentum": -0.9}, "momentum"),
        ("sgd", 0.0, {"momentum": True}, "momentum"),
        ("sgd", 0.0, {"momentum": 0.9, "dampening": -1.0}, "dampening"),
        ("sgd", 0.0, {"dampening": 0.5}, "dampening damps a momentum"),
        ("sgd", 0.0, {"nesterov": True}, "nesterov needs a momentum"),
        ("sgd", 0.0, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "no dampening"),
        ("muon", 0.0, {"ns_steps": 0}, "ns_steps"),
        ("muon", 0.0, {"ns_steps": 2.5}, "ns_steps"),
        ("adafactor", 0.0, {"eps": 1e-30}, "eps is 1e-30: two numbers"),
        ("adafactor", 0.0, {"beta_1": 1.0}, "beta_1"),
        ("adafactor", 0.0, {"clip_threshold": 0.0}, "clip_threshold"),
        ("adafactor", 0.0, {"decay_rate": 0.8}, "decay_rate"),
        ("adafactor", 0.0, {"warmup_init": True}, "warmup_init is a part of relative_step"),
    ],
)
def test_values_that_mean_nothing_or_do_nothing_are_refused(
    name: str, weight_decay: float, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"optimizer {name}[^$]*{message}"):
        torch_optimizer(name, weight_decay, options)


@pytest.mark.torch
def test_every_wrong_value_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)betas.*eps.*weight_decay"):
        torch_optimizer("adamw", -1.0, {"betas": 1, "eps": "small"})


# --- what is remembered -------------------------------------------------------------------------


@pytest.mark.torch
@case_names
def test_saved_and_loaded_it_goes_on_bit_for_bit(case: str) -> None:
    """Finds a moment or a step count that is not in the state, and one shared with the optimiser it came from."""
    from safetensors.torch import load, save

    whole, params = torch_optimizer(*CASES[case]), tensors(start())
    whole.init(params)
    grads, falling, half = gradients(), rates("cosine"), N_STEPS // 2
    for step in range(half):
        whole.step(params, tensors(grads[step]), falling[step])
    assert list(whole.state()) == whole.names() and "step" in whole.names()
    again, others = torch_optimizer(*CASES[case]), {name: value.clone() for name, value in params.items()}
    again.init(others)
    written = save(whole.state())
    kept = load(written)
    again.load(kept)
    for optimizer, held in ((whole, params), (again, others)):
        for step in range(half, N_STEPS):
            optimizer.step(held, tensors(grads[step]), falling[step])
    assert all((params[name] == others[name]).all() for name in params)
    assert all((value == again.state()[name]).all() for name, value in whole.state().items())
    assert all((value == kept[name]).all() for name, value in load(written).items())


@pytest.mark.torch
def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    import torch

    optimizer, params = torch_optimizer("adamw"), tensors(start())
    optimizer.init(params)
    optimizer.step(params, tensors(gradients()[0]), RATE)
    before = {name: value.clone() for name, value in optimizer.state().items()}
    state = {name: value + 1 for name, value in before.items() if name != "v.bias"}
    state |= {"w.bias": torch.zeros(33), "m.bias": torch.zeros(32), "v.wide.lora_b": torch.zeros(4, 24).double()}
    with pytest.raises(RunError) as refused:
        optimizer.load(state)
    message = str(refused.value)
    assert "no v.bias" in message and "w.bias is of no parameter" in message
    assert "m.bias is float32 [32], not float32 [33]" in message and "v.wide.lora_b is float64" in message
    assert all((value == before[name]).all() for name, value in optimizer.state().items())


@pytest.mark.torch
def test_a_state_of_another_optimizer_is_refused() -> None:
    adam, lion, params = torch_optimizer("adam"), torch_optimizer("lion"), tensors(start())
    adam.init(params)
    lion.init(params)
    with pytest.raises(RunError, match=r"no v\.wide"):
        adam.load(lion.state())
    with pytest.raises(RunError, match=r"v\.wide\.lora_b is of no parameter or slot"):
        lion.load(adam.state())


@pytest.mark.torch
@case_names
def test_parameters_move_in_place_and_gradients_stay(case: str) -> None:
    import torch

    optimizer = torch_optimizer(*CASES[case])
    params = {name: torch.nn.Parameter(value) for name, value in tensors(start()).items()}
    where = {name: value.data_ptr() for name, value in params.items()}
    optimizer.init(params)
    for gradient in gradients()[:2]:
        given = tensors(gradient)
        optimizer.step(params, given, RATE)
        assert all((given[name].numpy() == value).all() for name, value in gradient.items())
    assert {name: value.data_ptr() for name, value in params.items()} == where
    assert all(value.requires_grad and value.is_leaf for value in params.values())
    assert not any(value.requires_grad for value in optimizer.state().values())


@pytest.mark.torch
def test_a_parameter_without_gradient_is_named() -> None:
    optimizer, params = torch_optimizer("sgd"), tensors(start())
    optimizer.init(params)
    with pytest.raises(ValueError, match="gradients and optimizer state differ in bias"):
        optimizer.step(params, {name: value for name, value in params.items() if name != "bias"}, RATE)


# --- other people's code ------------------------------------------------------------------------


def by_torch_optim(kind: str, names: list[str], **options: Any) -> Arrays:
    """What a class of ``torch.optim`` itself makes of the same gradients, at a constant rate."""
    import torch

    params = {name: torch.nn.Parameter(value) for name, value in tensors(start()).items() if name in names}
    optimizer = getattr(torch.optim, kind)(params.values(), lr=RATE, **options)
    for gradient in gradients():
        for name, param in params.items():
            param.grad = torch.tensor(gradient[name])
        optimizer.step()
    return {**start(), **{name: value.detach().numpy() for name, value in params.items()}}


@pytest.mark.torch
@pytest.mark.parametrize(
    "case, kind, options",
    [
        ("adam", "Adam", {}),
        ("adam-large-eps", "Adam", {"betas": (0.8, 0.95), "eps": 1e-2}),
        ("adamw", "AdamW", {"weight_decay": 0.1}),
        ("sgd", "SGD", {}),
        ("sgd-momentum", "SGD", {"momentum": 0.9, "weight_decay": 0.1}),
        ("sgd-nesterov", "SGD", {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_torch_optim_makes_the_same_update_to_the_bit(case: str, kind: str, options: dict[str, Any]) -> None:
    theirs = by_torch_optim(kind, list(SHAPES), **options)
    assert all((theirs[name] == value).all() for name, value in final("torch", case, "constant").items())


@pytest.mark.torch
@pytest.mark.parametrize(
    "case, kind, options, names",
    [
        ("sgd-dampening", "SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}, list(SHAPES)),
        ("muon", "Muon", {"weight_decay": 0.0}, ["wide.lora_b", "tall.lora_a"]),
        ("adafactor", "Adafactor", {"weight_decay": 0.0, "eps": (1e-30, 1e-3)}, list(SHAPES)),
    ],
)
def test_torch_optim_makes_another_update(case: str, kind: str, options: dict[str, Any], names: list[str]) -> None:
    """Why these are not taken as they are: undamped first gradient; bfloat16; a rate relative to the weights."""
    theirs, ours = by_torch_optim(kind, names, **options), final("torch", case, "constant")
    for name in names:
        moves = np.abs(ours[name] - start()[name]).max()
        assert np.abs(ours[name] - theirs[name]).max() > 1e-3 * moves


# --- clipping -----------------------------------------------------------------------------------


def clipped_by_mlx(gradient: Arrays, max_norm: float) -> Arrays:
    """The gradients that a training step's optimiser is given: what plain descent at rate 1 takes from zeros."""
    import mlx.core as mx

    from mlxpref.mlx_backend.step import Step

    optimizer = mlx_optimizer("sgd")
    zeros, given = ({key: mx.array(f * value) for key, value in gradient.items()} for f in (0.0, 1.0))
    optimizer.init(zeros)
    step: Any = SimpleNamespace(max_grad_norm=max_norm, optimizer=optimizer)
    moved, *_ = Step._update_of(step, zeros, optimizer.state, given, mx.array(1.0), mx.array(0.0))
    return {key: -np.array(value) for key, value in moved.items()}


def clipped_by_torch(gradient: Arrays, max_norm: float) -> Arrays:
    import torch

    params = {key: torch.nn.Parameter(torch.zeros(value.shape)) for key, value in gradient.items()}
    for key, param in params.items():
        param.grad = torch.tensor(gradient[key])
    torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
    return {key: param.grad.numpy() for key, param in params.items() if param.grad is not None}


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize("norm, max_norm", [(1e-7, 1.0), (1e-4, 1e-5), (1e-3, 1e-3), (0.5, 1.0), (30.0, 1.0)])
def test_pytorch_clips_a_little_more_than_a_step_does(norm: float, max_norm: float) -> None:
    """A step divides by max(norm, 1e-6), PyTorch's ``clip_grad_norm_`` by norm + 1e-6: shorter by 1e-6 / norm."""
    first = {key: value.astype(np.float64) for key, value in gradients()[0].items()}
    size = math.sqrt(sum((value**2).sum() for value in first.values()))
    gradient = {key: (norm / size * value).astype(np.float32) for key, value in first.items()}
    ours, theirs = clipped_by_mlx(gradient, max_norm), clipped_by_torch(gradient, max_norm)
    factor = min(max_norm / max(norm, 1e-6), 1.0)
    pytorch_factor = min(max_norm / (norm + 1e-6), 1.0)
    for key, value in gradient.items():
        np.testing.assert_allclose(ours[key], factor * value, rtol=1e-6)
        np.testing.assert_allclose(theirs[key], pytorch_factor * value, rtol=1e-6)
