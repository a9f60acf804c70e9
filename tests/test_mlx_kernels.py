"""Functions of ours in the place of MLX's: equal to float64 and to MLX's own, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.mlx


def _on_a_gpu() -> bool:
    mlx = pytest.importorskip("mlx.core")
    return bool(mlx.default_device() == mlx.gpu)


on_a_cpu = pytest.mark.skipif("_on_a_gpu()", reason="what is kept, and in which chunks, is another matter on a GPU")


# --- exponentials ---


def test_exponentials_are_right_to_a_unit_in_the_last_place() -> None:
    """A polynomial of too low a degree, a wrong exponent, a split of log 2 that rounds."""
    import mlx.core as mx

    from mlxpref.mlx_backend.elementwise import exp_nonpositive

    x = np.concatenate([np.linspace(-87.3, 0, 40001), np.linspace(0, 80, 1001)]).astype(np.float32)
    found = np.array(mx.compile(exp_nonpositive)(mx.array(x)), np.float64)
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 1.2e-7


def test_exponentials_at_the_edges() -> None:
    """A masked score must weigh nothing, and not a number must not become one."""
    import mlx.core as mx

    from mlxpref.mlx_backend.elementwise import exp_nonpositive

    found = exp_nonpositive(mx.array([-1e30, -math.inf, -88.5, 0.0, math.nan]))
    assert np.array(found[:4]).tolist() == [0, 0, 0, 1]
    assert math.isnan(found[4].item())


def test_gated_units_and_their_slopes() -> None:
    """A slope without the sigmoid's own, or one that overflows far from zero."""
    import mlx.core as mx

    from mlxpref.mlx_backend.elementwise import swiglu

    gate = np.linspace(-80, 80, 4001)
    x, slope = np.random.default_rng(0).normal(size=(2, 4001))
    s = 1 / (1 + np.exp(-gate))
    given = [mx.array(value.astype(np.float32)) for value in (gate, x)]
    np.testing.assert_allclose(np.array(swiglu(*given)), gate * s * x, rtol=2e-6, atol=1e-30)
    weights = mx.array(slope.astype(np.float32))
    found = mx.grad(lambda *y: (swiglu(*y) * weights).sum(), argnums=(0, 1))(*given)
    np.testing.assert_allclose(np.array(found[0]), slope * x * (s + gate * s * (1 - s)), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(np.array(found[1]), slope * gate * s, rtol=2e-6, atol=1e-30)


def test_every_gated_mlp_is_found(tiny_model_dir: Path) -> None:
    """A model whose MLPs go on calling mlx-lm's function: it keeps four wide arrays for the gradient, ours fewer."""
    from mlxpref import mlx_backend

    sites = mlx_backend.load_policy(str(tiny_model_dir)).network.sites
    assert [module.__name__ for module in sites.gated] == ["mlx_lm.models.llama"]
    assert sites.groups


def test_log_probs_of_targets_and_their_slopes() -> None:
    """A softmax that overflows, a target's slope left out or put into another row."""
    import mlx.core as mx

    from mlxpref.mlx_backend.elementwise import picked_logps

    draw = np.random.default_rng(0)
    logits = draw.normal(0, 30, (17, 53))
    logits[3] += 500
    targets, weights = draw.integers(0, 53, 17), draw.normal(size=17)
    shifted = logits - logits.max(-1, keepdims=True)
    logps = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    rows = np.arange(17)
    slope = -np.exp(logps) * weights[:, None]
    slope[rows, targets] += weights
    given, wanted = mx.array(logits.astype(np.float32)), mx.array(targets)
    np.testing.assert_allclose(np.array(picked_logps(given, wanted)), logps[rows, targets], rtol=1e-6, atol=2e-5)
    found = mx.grad(lambda x: (picked_logps(x, wanted) * mx.array(weights.astype(np.float32))).sum())(given)
    np.testing.assert_allclose(np.array(found), slope, atol=1e-5)


# --- attention ---


def _attention64(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, slope: np.ndarray, scale: float, seen: np.ndarray
) -> list[np.ndarray]:
    """Result and the slopes of queries, keys and values, float64, one query at a time."""
    rows, heads, length, _ = q.shape
    groups = k.shape[1]
    out, dq, dk, dv = np.zeros((*q.shape[:3], v.shape[-1])), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for r in range(rows):
        for h in range(heads):
            g = h * groups // heads
            for t in range(length):
                at = np.flatnonzero(seen[t])
                scores = k[r, g, at] @ q[r, h, t] * scale
                weight = np.exp(scores - scores.max())
                weight /= weight.sum()
                out[r, h, t] = weight @ v[r, g, at]
                of_weight = v[r, g, at] @ slope[r, h, t]
                of_scores = weight * (of_weight - weight @ of_weight) * scale
                dq[r, h, t] = of_scores @ k[r, g, at]
                dk[r, g, at] += of_scores[:, None] * q[r, h, t]
                dv[r, g, at] += weight[:, None] * slope[r, h, t]
    return [out, dq, dk, dv]


SHAPES = {
    "one block": (2, 4, 2, 30, 0, 8, 8, False),
    "several blocks behind a prompt": (2, 6, 2, 150, 37, 8, 8, False),
    "exactly a block": (1, 2, 2, 64, 0, 8, 8, False),
    "values of another width": (1, 4, 4, 70, 3, 8, 12, False),
    "one query": (3, 4, 1, 1, 9, 8, 8, False),
    "a window": (2, 4, 2, 90, 21, 8, 8, True),
}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made again"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_is_attention(shape: tuple[Any, ...], kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile above the diagonal, a diagonal shifted by the prompt, groups mixed up, slopes of a tile dropped."""
    import mlx.core as mx

    from mlxpref.mlx_backend import attention

    monkeypatch.setattr(attention, "BLOCK", 32)
    monkeypatch.setattr(attention, "KEPT_BYTES", 10**9 if kept else 0)
    rows, heads, groups, length, past, wide, values, window = shape
    draw = np.random.default_rng(1)
    q = draw.normal(0, 2, (rows, heads, length, wide))
    k = draw.normal(0, 2, (rows, groups, past + length, wide))
    v = draw.normal(size=(rows, groups, past + length, values))
    slope = draw.normal(size=(rows, heads, length, values))
    place, of = np.arange(past, past + length)[:, None], np.arange(past + length)[None]
    seen = (of <= place) & ((of > place - 25) | (not window))
    want = _attention64(q, k, v, slope, 0.35, seen)
    given = [mx.array(x.astype(np.float32)) for x in (q, k, v)]
    mask = mx.array(seen) if window else None

    def run(q: Any, k: Any, v: Any) -> Any:
        return attention.causal_attention(q, k, v, scale=0.35, mask=mask)

    weights = mx.array(slope.astype(np.float32))
    slopes = mx.compile(mx.grad(lambda *x: (run(*x) * weights).sum(), argnums=(0, 1, 2)))(*given)
    for found, wanted in zip([run(*given), *slopes], want, strict=True):
        assert np.abs(np.array(found) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_long_rows_keep_no_scores() -> None:
    """Memory of a gradient that grows with the square of the length."""
    import mlx.core as mx

    from mlxpref.mlx_backend import attention

    def peak(length: int) -> int:
        q, k, v = (mx.random.normal((1, 4, length, 16)) for _ in range(3))
        mx.eval(q, k, v)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        run = mx.grad(lambda *x: attention.causal_attention(*x, scale=0.25).sum(), argnums=(0, 1, 2))
        mx.eval(run(q, k, v))
        return mx.get_peak_memory() - before

    assert attention.KEPT_BYTES < 4 * 4 * 6000**2 / 2
    assert peak(6000) < 2.5 * peak(3000)


# --- modules ---


@pytest.fixture
def adapted() -> Iterator[Callable[..., Any]]:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.lora import LoRALinear

    def make(dropout: float = 0.0, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> Any:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for index, name in enumerate(names):
                    layer = LoRALinear.from_base(nn.Linear(12, 8 + 4 * index), r=2 + index, dropout=dropout, scale=3.0)
                    layer.lora_b = mx.random.normal(layer.lora_b.shape)
                    self[name] = layer

            def __call__(self, x: Any) -> list[Any]:
                return [self[name](x) for name in names]

        mx.random.seed(0)
        return Block()

    yield make


def test_low_rank_terms_of_one_input(adapted: Callable[..., Any]) -> None:
    """A factor of one module given to its sister; a scale twice or not at all; an input that is not the sisters'."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxpref.mlx_backend import kernels, lowrank

    block = adapted()
    groups = lowrank.groups_of(block)
    assert len(groups) == 3 and id(block["o_proj"]) not in groups
    x, other = mx.random.normal((2, 5, 12)), mx.random.normal((2, 5, 12))

    def loss(parameters: Any, x: Any, other: Any) -> Any:
        block.update(parameters)
        return sum((out * (i + 1.0)).sum() ** 2 for i, out in enumerate([*block(x), *block(other)]))

    want = mx.value_and_grad(loss, argnums=(0, 1, 2))(block.trainable_parameters(), x, other)
    with kernels.in_place(kernels.Sites(groups, ()), differentiate=True):
        found = mx.value_and_grad(loss, argnums=(0, 1, 2))(block.trainable_parameters(), x, other)
    for (name, one), (_, two) in zip(tree_flatten(want), tree_flatten(found), strict=True):
        assert mx.abs(one - two).max() <= 2e-5 * mx.maximum(mx.abs(one).max(), 1e-3), name


def test_dropout_is_each_module_s_own(adapted: Callable[..., Any]) -> None:
    """Sisters that share one mask: mlx-lm draws one for each."""
    import mlx.core as mx

    from mlxpref.mlx_backend import kernels

    block, x = adapted(dropout=0.5), mx.random.normal((2, 5, 12))
    mx.random.seed(3)
    want = block(x)
    mx.random.seed(3)
    with kernels.in_place(kernels.sites_of(block), differentiate=True):
        found = block(x)
    for one, two in zip(want, found, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(two), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_products_with_quantised_weights(bias: bool) -> None:
    """A transposed weight, a bias left out, no slope of the input."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlxpref.mlx_backend import kernels

    layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 64, bias=bias), group_size=64, bits=4)
    layer.freeze()
    x = mx.random.normal((2, 40, 128))

    def both() -> list[Any]:
        return [layer(x), mx.grad(lambda x: (layer(x) ** 2).sum())(x)]

    want = both()
    with kernels.in_place(kernels.Sites({}, ()), differentiate=True):
        found = both()
    for one, two in zip(want, found, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(two), rtol=1e-4, atol=1e-4)


def test_nothing_stays_replaced(adapted: Callable[..., Any]) -> None:
    """Generation, or another library in this process, that runs on our functions after an error in a trace."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama
    from mlx_lm.tuner.lora import LoRALinear

    from mlxpref.mlx_backend import kernels

    def names() -> list[Any]:
        attend = mx.fast.scaled_dot_product_attention
        return [attend, llama.swiglu, LoRALinear.__call__, nn.QuantizedLinear.__call__]

    before = names()
    sites = kernels.Sites({}, (llama,))
    nested = kernels.in_place(sites, differentiate=True)
    with pytest.raises(RuntimeError), kernels.in_place(sites, differentiate=True), nested:
        raise RuntimeError
    assert names() == before


# --- what the compiled backward pass keeps ---


def peak_of(function: Callable[..., Any], *given: Any) -> int:
    """Bytes above what is held at rest, of a compiled value and gradient towards the first argument."""
    import mlx.core as mx

    run = mx.compile(mx.value_and_grad(function))
    mx.eval(given)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run(*given))
    return mx.get_peak_memory() - before


@on_a_cpu
def test_dequantised_matrices_are_not_kept() -> None:
    """mx.compile merges what both passes write alike: a 4-bit model would be held at full width during each step."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlxpref.mlx_backend import dequantised

    def peak(n: int) -> int:
        layers = [nn.QuantizedLinear(512, 512, bias=False, group_size=64, bits=4) for _ in range(n)]
        mx.eval([layer.parameters() for layer in layers])

        def loss(x: mx.array) -> mx.array:
            for layer in layers:
                x = dequantised.linear(layer, x)
            return x.sum()

        return peak_of(loss, mx.ones((32, 512)))

    assert peak(64) - peak(40) < 6 * 512 * 512 * 4


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_on_the_reference_blas(rows: int, bias: bool) -> None:
    """Weights laid out the wrong way round; a slope that forgets a leading axis, the bias, or trained weights."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    from mlxpref.mlx_backend import transposed

    rng = np.random.default_rng(rows)
    layer = nn.Linear(6, 5, bias=bias)
    x, wanted = rng.normal(size=(2, rows, 6)), rng.normal(size=(2, rows, 5))
    held = layer.parameters()
    mx.eval(held)
    weight = np.array(held["weight"], np.float64)
    offset = np.array(held["bias"], np.float64) if bias else 0.0

    def loss(parameters: Any, x: mx.array) -> mx.array:
        layer.update(parameters)
        return (mx.array(wanted, mx.float32) * transposed.linear(layer, x)).sum()

    value, (slopes, slope) = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))(held, mx.array(x, mx.float32))
    assert value.item() == pytest.approx((wanted * (x @ weight.T + offset)).sum(), rel=1e-5)
    np.testing.assert_allclose(np.array(slope), wanted @ weight, rtol=1e-4, atol=1e-5)
    found = {name: np.array(value) for name, value in tree_flatten(slopes)}
    np.testing.assert_allclose(found["weight"], np.einsum("bro,bri->oi", wanted, x), rtol=1e-4, atol=1e-5)
    if bias:
        np.testing.assert_allclose(found["bias"], wanted.sum((0, 1)), rtol=1e-4, atol=1e-5)


@on_a_cpu
def test_only_the_reference_blas_has_its_weights_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of every weight for a BLAS that has no use for it; none for the one it is made for."""
    import mlx.nn as nn

    from mlxpref import blas
    from mlxpref.mlx_backend import kernels, transposed

    before = nn.Linear.__call__
    for reference in (False, True):
        monkeypatch.setattr(blas, "_record", blas.BlasRecord(None, None, "", reference=reference))
        with kernels.in_place(kernels.Sites({}, ()), differentiate=True):
            assert nn.Linear.__call__ is (transposed.linear if reference else before)
        assert nn.Linear.__call__ is before


@on_a_cpu
def test_weights_laid_out_anew_are_not_kept() -> None:
    """mx.compile merges equal copies: prompts and responses would share one, held between their passes."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlxpref.mlx_backend import transposed

    def peak(n: int) -> int:
        layers = [nn.Linear(512, 512, bias=False) for _ in range(n)]
        mx.eval([layer.parameters() for layer in layers])

        def loss(x: mx.array) -> mx.array:
            for _ in range(2):
                for layer in layers:
                    x = transposed.linear(layer, x)
            return x.sum()

        return peak_of(loss, mx.ones((32, 512)))

    assert peak(64) - peak(40) < 6 * 512 * 512 * 4


@on_a_cpu
def test_gated_units_keep_three_arrays() -> None:
    """The product of gate and sigmoid kept beside them, where both passes write it alike."""
    import mlx.core as mx

    from mlxpref.mlx_backend.elementwise import swiglu

    frozen = mx.random.normal((2, 128, 128)) / 12

    def peak(n: int) -> int:
        def loss(x: mx.array) -> mx.array:
            for _ in range(n):
                x = swiglu(x @ frozen[0], x @ frozen[1])
            return x.sum()

        return peak_of(loss, mx.random.normal((2048, 128)))

    assert (peak(40) - peak(20)) / 20 < 3.5 * 2048 * 128 * 4


@on_a_cpu
def test_the_heads_chunks_leave_nothing_behind() -> None:
    """Slopes of slices, padded with zeros and added up: an array of all rows for each chunk. Logits of chunks that
    nothing orders, or that both passes write alike."""
    from types import SimpleNamespace

    import mlx.core as mx

    from mlxpref.mlx_backend import logps

    matrix = mx.random.normal((128, 65536))
    network = SimpleNamespace(vocabulary=65536, head=lambda h: h @ matrix, own_kernels=True, outer=())

    def peak(n: int, statistics: tuple[str, ...]) -> int:
        targets, weights = mx.zeros((n,), mx.int32), mx.arange(n)
        other = mx.random.normal((n, 128)) if "token_kl" in statistics else None

        def loss(hidden: mx.array) -> mx.array:
            found = logps._chunked(network, hidden * 2, targets, True, statistics, other)
            return sum((values * weights).sum() for values in found)

        return peak_of(loss, mx.random.normal((n, 128)))

    for statistics in ((), ("overlap",), ("token_kl",)):
        grown = peak(1024, statistics) - peak(256, statistics)
        assert grown < 12e6, statistics  # three chunks' logits: how many the scheduler overlaps is not always the same


def test_scores_made_again_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first block, which both passes write alike: behind a long prompt most of a layer's memory."""
    import mlx.core as mx

    from mlxpref.mlx_backend import attention

    monkeypatch.setattr(attention, "KEPT_BYTES", 0)
    keys, values = mx.random.normal((2, 1, 4, 2048, 16))

    def peak(n: int) -> int:
        def loss(x: mx.array) -> mx.array:
            for _ in range(n):
                x = attention.causal_attention(x, keys, values, scale=0.25)
            return x.sum()

        return peak_of(loss, mx.random.normal((1, 4, 256, 16)))

    assert (peak(12) - peak(6)) / 6 < 0.3 * 4 * attention.BLOCK * 2048 * 4
