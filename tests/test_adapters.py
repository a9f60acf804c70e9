"""Adapters combined: the weights of the merged model, where they go, and what is refused.

The witness is dense: ``W + scale · (A B)ᵀ`` in float64 from what the safetensors library reads, summed with the
weights. Finds: factors averaged one by one, a scale lost or applied twice, a module of one adapter dropped, a rank or
key that a loader does not accept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxpref.adapters import read_adapter, write_adapter
from mlxpref.errors import AdapterError, ModelError, RunError, UsageError
from mlxpref.files import safetensors_header
from mlxpref.merging import extrapolate, interpolate
from mlxpref.tensors import Tensor, tensors_of, write_tensors

WIDTHS = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 16), "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (32, 64), "mlp.up_proj": (32, 64), "mlp.down_proj": (64, 32),
}  # fmt: skip
"""Inputs and outputs of the tiny model's matrices."""

Weights = dict[str, np.ndarray]


@pytest.fixture
def make_lora(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """A function that writes an adapter of the tiny model as mlx-lm would: ``keys`` None are all matrices."""

    def make(
        name: str, *, seed: int, rank: int = 4, scale: float = 2.0, layers: tuple[int, ...] = (1, 2),
        keys: list[str] | None = None, model: Path | None = None, facts: dict[str, Any] | None = None, **config: Any,
    ) -> Path:  # fmt: skip
        rng = np.random.default_rng(seed)
        arrays = {}
        for at in (f"model.layers.{layer}.{key}" for layer in layers for key in keys or WIDTHS):
            inputs, outputs = WIDTHS[at.split(".", 3)[3]]
            arrays[f"{at}.lora_a"] = (rng.standard_normal((inputs, rank)) / np.sqrt(inputs)).astype(np.float32)
            arrays[f"{at}.lora_b"] = (rng.standard_normal((rank, outputs)) / np.sqrt(rank)).astype(np.float32)
        lora = {"rank": rank, "scale": scale, "dropout": 0.0} | ({} if keys is None else {"keys": keys})
        settings = {
            "fine_tune_type": "lora", "model": str(model or tiny_model_dir), "num_layers": 3 - min(layers),
            "lora_parameters": lora,
        }  # fmt: skip
        return write(tmp_path / name, arrays, settings | ({} if facts is None else {"mlxpref": facts}) | config)

    return make


@pytest.fixture
def make_full(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """A function that writes a full fine-tune of the last layers of the tiny model."""

    def make(name: str, *, seed: int, layers: tuple[int, ...] = (2,)) -> Path:
        rng = np.random.default_rng(seed)
        base = load_file(tiny_model_dir / "model.safetensors")
        kept = [key for key in base if any(key.startswith(f"model.layers.{layer}.") for layer in layers)]
        arrays = {key: base[key] + rng.standard_normal(base[key].shape).astype(np.float32) / 8 for key in kept}
        settings = {"fine_tune_type": "full", "model": str(tiny_model_dir), "num_layers": 3 - min(layers)}
        return write(tmp_path / name, arrays, settings)

    return make


def write(folder: Path, arrays: Weights, config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(arrays, folder / "adapters.safetensors", metadata={"format": "mlx"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def change(folder: Path, **config: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def dense(base: Path, folder: Path) -> Weights:
    """Every weight of the model with this adapter, float64."""
    weights = {name: value.astype(np.float64) for name, value in load_file(base / "model.safetensors").items()}
    arrays = {name: value.astype(np.float64) for name, value in load_file(folder / "adapters.safetensors").items()}
    config = settings(folder)
    if config["fine_tune_type"] == "full":
        return weights | arrays
    for module in sorted({name.rpartition(".")[0] for name in arrays}):
        product = arrays[f"{module}.lora_a"] @ arrays[f"{module}.lora_b"]
        added = product if module.endswith("embed_tokens") else product.T
        weights[f"{module}.weight"] += config["lora_parameters"]["scale"] * added
    return weights


def mixed(base: Path, parts: list[tuple[Path, float]]) -> Weights:
    """``θ_0 + Σ λ (θ − θ_0)`` of dense weights."""
    start = {name: value.astype(np.float64) for name, value in load_file(base / "model.safetensors").items()}
    found = [(dense(base, folder), weight) for folder, weight in parts]
    return {name: value + sum(by * (weights[name] - value) for weights, by in found) for name, value in start.items()}


def furthest(one: Weights, other: Weights) -> float:
    """Largest difference between the weights of two models."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


# --- interpolation -----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (1.5, -0.5), (0.2, 0.0), (0.0, 0.0)])
def test_merged_weights_are_the_weighted_sum(
    weights: tuple[float, float], make_lora: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Ranks, scales, layers and modules differ; some modules are in one adapter alone."""
    first = make_lora("a", seed=1, rank=4, scale=2.0)
    second = make_lora("b", seed=2, rank=3, scale=-5.0, layers=(0, 1, 2), keys=["self_attn.q_proj", "mlp.down_proj"])
    write_adapter(interpolate([first, second], weights), tmp_path / "out")
    expected = mixed(tiny_model_dir, [(first, weights[0]), (second, weights[1])])
    assert furthest(dense(tiny_model_dir, tmp_path / "out"), expected) < 1e-6


def test_three_of_one_shape_keep_their_keys_and_add_their_ranks(
    make_lora: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    keys = ["self_attn.v_proj"]
    folders = [make_lora(f"a{seed}", seed=seed, rank=seed + 1, keys=keys) for seed in range(3)]
    write_adapter(interpolate(folders, [0.5, 0.25, 0.25]), tmp_path / "out")
    config = settings(tmp_path / "out")
    assert config["lora_parameters"] == {"rank": 6, "scale": 1.0, "dropout": 0.0, "keys": keys}
    assert config["num_layers"] == 2 and config["model"] == str(tiny_model_dir)
    arrays = load_file(tmp_path / "out" / "adapters.safetensors")
    assert {value.shape for value in arrays.values()} == {(32, 6), (6, 16)}
    assert {value.dtype for value in arrays.values()} == {np.dtype(np.float32)}
    parts = list(zip(folders, [0.5, 0.25, 0.25], strict=True))
    assert furthest(dense(tiny_model_dir, tmp_path / "out"), mixed(tiny_model_dir, parts)) < 1e-6


def test_averaged_factors_are_another_model(
    make_lora: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """What other programs offer as a merge: it has the cross terms A_1 B_2 and half of what was learned."""
    first, second = make_lora("a", seed=1), make_lora("b", seed=2)
    arrays = [load_file(folder / "adapters.safetensors") for folder in (first, second)]
    averaged = {name: (value + arrays[1][name]) / 2 for name, value in arrays[0].items()}
    factorwise = write(tmp_path / "factorwise", averaged, settings(first))
    expected = mixed(tiny_model_dir, [(first, 0.5), (second, 0.5)])
    write_adapter(interpolate([first, second], [0.5, 0.5]), tmp_path / "out")
    assert furthest(dense(tiny_model_dir, tmp_path / "out"), expected) < 1e-6
    assert furthest(dense(tiny_model_dir, factorwise), expected) > 0.1


def test_a_layer_of_experts_is_stacked_along_its_own_rank(
    make_lora: Callable[..., Path], tmp_path: Path
) -> None:
    """mlx-lm has (experts, r, inputs) and (experts, outputs, r) there, the other way round."""
    rng = np.random.default_rng(3)
    at, folders, deltas = "model.layers.2.mlp.switch_mlp.up_proj", [], []
    for name, rank in (("a", 2), ("b", 5)):
        a = rng.standard_normal((4, rank, 8)).astype(np.float32)
        b = rng.standard_normal((4, 6, rank)).astype(np.float32)
        lora = {"rank": rank, "scale": 3.0, "dropout": 0.0, "keys": ["mlp.switch_mlp.up_proj"]}
        config = {"fine_tune_type": "lora", "model": "some/experts", "num_layers": 1, "lora_parameters": lora}
        folders.append(write(tmp_path / name, {f"{at}.lora_a": a, f"{at}.lora_b": b}, config))
        deltas.append(3.0 * np.einsum("eor,eri->eoi", b.astype(np.float64), a))
    write_adapter(interpolate(folders, [0.25, -2.0]), tmp_path / "out")
    arrays = load_file(tmp_path / "out" / "adapters.safetensors")
    scale = settings(tmp_path / "out")["lora_parameters"]["scale"]
    found = scale * np.einsum("eor,eri->eoi", arrays[f"{at}.lora_b"].astype(np.float64), arrays[f"{at}.lora_a"])
    assert arrays[f"{at}.lora_a"].shape == (4, 7, 8)
    np.testing.assert_allclose(found, 0.25 * deltas[0] - 2.0 * deltas[1], atol=1e-5)


def test_a_part_of_weight_nothing_adds_no_rank(make_lora: Callable[..., Path]) -> None:
    first, second = make_lora("a", seed=1), make_lora("b", seed=2)
    merged = interpolate([first, second], [1.0, 0.0])
    assert merged.lora["rank"] == 4
    for name, tensor in read_adapter(first).tensors.items():
        np.testing.assert_array_equal(merged.tensors[name].read(), tensor.read())


# --- extrapolation -----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-1.5, -1.0, 0.0, 0.5])
def test_from_the_base_the_adapter_is_scaled(
    alpha: float, make_lora: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = make_lora("a", seed=1)
    write_adapter(extrapolate(folder, alpha), tmp_path / "out")
    found = dense(tiny_model_dir, tmp_path / "out")
    assert furthest(found, mixed(tiny_model_dir, [(folder, 1 + alpha)])) < 1e-6
    old, new = settings(folder), settings(tmp_path / "out")
    assert new["lora_parameters"]["rank"] == old["lora_parameters"]["rank"], "no new weights"
    assert new["num_layers"] == old["num_layers"] and "keys" not in new["lora_parameters"]


def test_nothing_more_is_the_adapter_bit_for_bit(make_lora: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_lora("a", seed=1, scale=20.0)
    write_adapter(extrapolate(folder, 0.0), tmp_path / "out")
    old, new = (load_file(one / "adapters.safetensors") for one in (folder, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)
    assert settings(tmp_path / "out")["lora_parameters"] == settings(folder)["lora_parameters"]


def test_back_to_the_start_a_new_round_could_still_train(
    make_lora: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A scale of 0 would be the base as well, and no gradient would ever reach the factors."""
    write_adapter(extrapolate(make_lora("a", seed=1), -1.0), tmp_path / "out")
    assert furthest(dense(tiny_model_dir, tmp_path / "out"), mixed(tiny_model_dir, [])) == 0
    assert settings(tmp_path / "out")["lora_parameters"]["scale"] == 2.0
    arrays = load_file(tmp_path / "out" / "adapters.safetensors")
    assert all(value.any() for name, value in arrays.items() if name.endswith("lora_a"))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5])
def test_from_another_adapter_the_way_between_them_goes_on(
    alpha: float, make_lora: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    end, start = make_lora("end", seed=1, rank=4), make_lora("start", seed=2, rank=2, scale=7.0)
    write_adapter(extrapolate(end, alpha, start), tmp_path / "out")
    expected = mixed(tiny_model_dir, [(end, 1 + alpha), (start, -alpha)])
    assert furthest(dense(tiny_model_dir, tmp_path / "out"), expected) < 1e-6
    assert settings(tmp_path / "out")["lora_parameters"]["rank"] == {-1.0: 2, 0.0: 4, 0.5: 6}[alpha]


# --- full fine-tunes ---------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.25), (2.0, -1.0)])
@pytest.mark.parametrize("layers", [(2,), (1, 2)])
def test_full_fine_tunes_are_mixed_and_the_base_fills_up(
    weights: tuple[float, float], layers: tuple[int, ...], make_full: Callable[..., Path], tiny_model_dir: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The base has a part where weights do not sum to 1, and where one adapter left a layer as it was."""
    first, second = make_full("a", seed=1), make_full("b", seed=2, layers=layers)
    write_adapter(interpolate([first, second], weights), tmp_path / "out")
    expected = mixed(tiny_model_dir, [(first, weights[0]), (second, weights[1])])
    assert furthest(dense(tiny_model_dir, tmp_path / "out"), expected) < 1e-6
    assert settings(tmp_path / "out")["num_layers"] == len(layers)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5])
def test_a_full_fine_tune_goes_on_from_the_base(
    alpha: float, make_full: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = make_full("a", seed=1)
    write_adapter(extrapolate(folder, alpha), tmp_path / "out")
    expected = mixed(tiny_model_dir, [(folder, 1 + alpha)])
    assert furthest(dense(tiny_model_dir, tmp_path / "out"), expected) < 1e-6


def test_the_base_is_left_alone_where_it_is_not_needed(make_full: Callable[..., Path], tmp_path: Path) -> None:
    folders = [make_full(f"a{seed}", seed=seed) for seed in range(3)]
    for folder in folders:
        change(folder, model=str(tmp_path / "moved"))
    interpolate(folders, [0.7, 0.2, 0.1])  # sums to 1 up to rounding
    with pytest.raises(ModelError, match="moved"):
        interpolate(folders, [0.7, 0.2, 0.2])


def test_a_base_without_such_a_tensor_is_refused(
    make_full: Callable[..., Path], make_model_dir: Callable[..., Path]
) -> None:
    folder = make_full("a", seed=1)
    other = make_model_dir(intermediate_size=48)
    change(folder, model=str(other))
    with pytest.raises(AdapterError, match=r"base is needed[\s\S]*mlp\.down_proj"):
        extrapolate(folder, 0.5)


# --- files -------------------------------------------------------------------------------------


def test_a_number_that_a_type_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for dtype, value in (("F32", 1e39), ("F16", 1e6), ("BF16", 3.4e38), ("F32", np.nan)):
        tensors = {"w": Tensor(dtype, (1,), lambda value=value: np.array([value]))}  # type: ignore[misc]  # mypy cannot infer the lambda
        with pytest.raises(AdapterError, match="w: not finite, or too large"):
            write_tensors(tmp_path / "file.safetensors", tensors)
        assert not list(tmp_path.iterdir())


@pytest.mark.mlx
def test_other_types_are_read_and_rounded_as_mlx_does(tmp_path: Path) -> None:
    """bfloat16 is not NumPy's: its rounding here against MLX's own, ties and both signs included."""
    import mlx.core as mx

    drawn = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, -0.0, 1e-40, 65504.0], np.float32)
    values = np.concatenate([drawn, ties])
    for dtype, name in ((mx.bfloat16, "BF16"), (mx.float16, "F16"), (mx.float32, "F32")):
        ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
        write_tensors(ours, {"w": Tensor(name, values.shape, lambda: values.astype(np.float64))})
        mx.save_safetensors(str(theirs), {"w": mx.array(values).astype(dtype)})
        loaded: list[Any] = [mx.load(str(file)) for file in (ours, theirs)]
        found, stored = (arrays["w"] for arrays in loaded)
        assert found.dtype == dtype
        expected = np.array(stored.astype(mx.float32), np.float64)
        normal = np.abs(values) > 1e-30  # MLX may flush subnormal numbers
        np.testing.assert_array_equal(np.array(found.astype(mx.float32), np.float64)[normal], expected[normal])
        read = tensors_of(theirs, safetensors_header(theirs))["w"].read()
        np.testing.assert_array_equal(read[normal], expected[normal])


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x02\0\0\0\0\0\0\0[]", b"\x09\0\0\0\0\0\0\0" + b'{"a":{}} '])
def test_what_is_no_safetensors_file_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError):
        safetensors_header(file)


# --- what is refused ---------------------------------------------------------------------------


def test_an_occupied_folder_stays_as_it_is(make_lora: Callable[..., Path], tmp_path: Path) -> None:
    merged = extrapolate(make_lora("a", seed=1), 0.5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="is there already"):
        write_adapter(merged, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_different_bases_are_refused(make_lora: Callable[..., Path], make_model_dir: Callable[..., Path]) -> None:
    first, second = make_lora("a", seed=1), make_lora("b", seed=2, model=make_model_dir(seed=1))
    with pytest.raises(AdapterError, match="different base models"):
        interpolate([first, second], [0.5, 0.5])
    prints: list[dict[str, Any]] = [{"base_fingerprint": "abc"}, {"base_fingerprint": "def"}]
    change(second, model=settings(first)["model"], mlxpref=prints[1])
    interpolate([first, second], [0.5, 0.5])  # one of them says nothing about its weights
    change(first, mlxpref=prints[0])
    with pytest.raises(AdapterError, match="other base weights"):
        interpolate([first, second], [0.5, 0.5])


def test_one_base_in_two_places_is_one(make_lora: Callable[..., Path]) -> None:
    """Equal fingerprints are equal weights, wherever they lie."""
    facts = {"base_fingerprint": "abc"}
    first, second = make_lora("a", seed=1, facts=facts), make_lora("b", seed=2, facts=facts)
    change(second, model="owner/same")
    assert interpolate([first, second], [0.5, 0.5]).facts["base_fingerprint"] == "abc"


def test_types_are_not_mixed(make_lora: Callable[..., Path], make_full: Callable[..., Path]) -> None:
    with pytest.raises(AdapterError, match="fine_tune_type lora and full"):
        interpolate([make_lora("a", seed=1), make_full("b", seed=2)], [0.5, 0.5])


def test_dora_is_refused_except_as_it_is(make_lora: Callable[..., Path], tmp_path: Path) -> None:
    folder, other = (make_lora(name, seed=1, fine_tune_type="dora") for name in ("a", "b"))
    arrays = load_file(folder / "adapters.safetensors")
    arrays["model.layers.2.mlp.down_proj.m"] = np.ones(32, np.float32)
    save_file(arrays, folder / "adapters.safetensors")
    for merge in (
        lambda: interpolate([folder, other], [0.5, 0.5]),
        lambda: interpolate([folder], [0.5]),
        lambda: extrapolate(folder, 0.5),
        lambda: extrapolate(folder, -1.0),
    ):
        with pytest.raises(AdapterError, match="DoRA adapters cannot be merged"):
            merge()
    write_adapter(extrapolate(folder, 0.0), tmp_path / "out")
    copied = load_file(tmp_path / "out" / "adapters.safetensors")
    assert {name: value.tobytes() for name, value in copied.items()} == {n: v.tobytes() for n, v in arrays.items()}


def no_scale(folder: Path) -> None:
    change(folder, lora_parameters={"rank": 4, "alpha": 8})


def cut(folder: Path) -> None:
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def edited(folder: Path, edit: Callable[[Weights], Any]) -> None:
    arrays = load_file(folder / "adapters.safetensors")
    edit(arrays)
    save_file(arrays, folder / "adapters.safetensors")


AT = "model.layers.2.mlp.up_proj"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (cut, "damaged or cut off"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no scale": (no_scale, "scale is None"),
    "no base": (lambda folder: change(folder, model=None), "names no base model"),
    "no layers": (lambda folder: change(folder, num_layers=None), "no key num_layers"),
    "unknown type": (lambda folder: change(folder, fine_tune_type="ia3"), "'ia3'"),
    "half a pair": (lambda folder: edited(folder, lambda w: w.pop(f"{AT}.lora_b")), rf"{AT}: lora_a alone"),
    "ranks": (
        lambda folder: edited(folder, lambda w: w.update({f"{AT}.lora_b": np.zeros((3, 64), np.float32)})),
        rf"{AT}: lora_a \(32, 4\) and lora_b \(3, 64\)",
    ),
    "fused factors": (
        lambda folder: edited(folder, lambda w: w.update({f"{AT}.lora_a.0": np.zeros((32, 4), np.float32)})),
        rf"{AT}\.lora_a\.0: unknown",
    ),
    "whole numbers": (
        lambda folder: edited(folder, lambda w: w.update({f"{AT}.lora_a": np.zeros((32, 4), np.int32)})),
        "of type I32",
    ),
    "no factors": (lambda folder: edited(folder, lambda w: [w.pop(name) for name in list(w)]), "there are none"),
    "layer": (
        lambda folder: edited(
            folder,
            lambda w: w.update({f"model.layers.9.mlp.up_proj.{k}": w[f"{AT}.{k}"] for k in ("lora_a", "lora_b")}),
        ),
        "model.layers.9: the model has no such layer",
    ),
    "width": (
        lambda folder: edited(folder, lambda w: w.update({f"{AT}.lora_a": np.zeros((48, 4), np.float32)})),
        "48 wide",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_cannot_be_merged_is_named(what: str, make_lora: Callable[..., Path]) -> None:
    damage, says = DAMAGES[what]
    folder = make_lora("a", seed=1)
    damage(folder)
    with pytest.raises(AdapterError, match=says):
        extrapolate(folder, 0.5)


def test_widths_that_differ_are_named_where_the_base_is_not_at_hand(make_lora: Callable[..., Path]) -> None:
    first, second = (make_lora(name, seed=1, model=Path("owner/name")) for name in ("a", "b"))
    edited(second, lambda w: w.update({f"{AT}.lora_a": np.zeros((48, 4), np.float32)}))
    with pytest.raises(AdapterError, match=rf"{AT} is \(32, 64\) and \(48, 64\)"):
        interpolate([first, second], [0.5, 0.5])


@pytest.mark.parametrize("weights", [[np.nan], [np.inf], [], [0.5, 0.5]])
def test_weights_are_a_finite_number_each(weights: list[float], make_lora: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="weight"):
        interpolate([make_lora("a", seed=1)], weights)


# --- what the result says of itself ------------------------------------------------------------


def test_recipes_that_differ_need_a_word(make_lora: Callable[..., Path]) -> None:
    """The wrong words would ask the merged model what one half of it never read."""
    recipes = [{"carrier": "system", "template": "x {score}"}, {"carrier": "first_user", "template": "x {score}"}, None]
    folders = [make_lora(f"a{i}", seed=i, facts={"recipe": recipe}) for i, recipe in enumerate(recipes)]
    with pytest.raises(AdapterError, match=r"a0: carrier 'system'[\s\S]*a1: carrier 'first_user'"):
        interpolate(folders[:2], [0.5, 0.5])
    with pytest.raises(AdapterError, match="a2: without goals"):
        interpolate(folders[1:], [0.5, 0.5])
    assert interpolate(folders, [0.5, 0.3, 0.2], recipe_from=folders[1]).facts["recipe"] == recipes[1]
    assert interpolate([folders[0], folders[2]], [1.0, 0.0]).facts["recipe"] == recipes[0]
    with pytest.raises(UsageError, match="name one of"):
        interpolate(folders[:2], [0.5, 0.5], recipe_from=folders[2])
    assert extrapolate(folders[0], 0.5, folders[1]).facts["recipe"] == recipes[0]


def test_facts_are_those_that_all_parts_share(make_lora: Callable[..., Path]) -> None:
    shared = {"recipe": None, "tokenization": {"max_length": 64}, "base_fingerprint": "abc",
              "model": {"path": "m", "revision": "v1", "fingerprint": "of a reference"}}  # fmt: skip
    first = make_lora("a", seed=1, facts=shared | {"objective": {"name": "dpo"}, "step": 7})
    second = make_lora("b", seed=2, facts=shared | {"objective": {"name": "ipo"}, "step": 9})
    facts = interpolate([first, second], [0.7, 0.3]).facts
    assert facts["objective"] is None and facts["tokenization"] == {"max_length": 64}
    assert facts["model"] == {"path": "m", "revision": "v1"} and facts["base_fingerprint"] == "abc"
    assert [part["weight"] for part in facts["merged_from"]] == [0.7, 0.3]
    assert [part["objective"]["name"] for part in facts["merged_from"]] == ["dpo", "ipo"]
    assert [part["adapter"] for part in facts["merged_from"]] == [str(first), str(second)]
    assert facts["merged_from"][0]["sha256"] != facts["merged_from"][1]["sha256"] and "numpy" in facts["versions"]


# --- in the model ------------------------------------------------------------------------------


def logits(model: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(model(mx.array([[5, 9, 130, 77, 200, 31, 8]]))[0].astype(mx.float32), np.float64)


def with_weights(base: Path, weights: Weights, folder: Path) -> Path:
    """The base model's folder with other weights in it."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    arrays = {name: value.astype(np.float32) for name, value in weights.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.mlx
@pytest.mark.parametrize("keys", [["self_attn.q_proj", "mlp.down_proj"], None], ids=["full names", "all"])
def test_the_model_with_the_result_is_the_model_of_merged_weights(
    keys: list[str] | None, make_lora: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Through our loader and mlx-lm's; ``keys`` that no one adapter has are the modules' own names."""
    from mlx_lm import load

    from mlxpref import mlx_backend

    first = make_lora("a", seed=1, rank=4, scale=2.0)
    second = make_lora("b", seed=2, rank=3, scale=1.0, layers=(0, 1, 2), keys=keys)
    parts = [(first, 0.7), (second, 0.6)]
    write_adapter(interpolate([first, second], [0.7, 0.6]), tmp_path / "out")
    expected = logits(load(str(with_weights(tiny_model_dir, mixed(tiny_model_dir, parts), tmp_path / "dense")))[0])
    policy = mlx_backend.load_adapter(tmp_path / "out")
    np.testing.assert_allclose(logits(policy.model), expected, atol=2e-4)
    theirs, _ = load(str(tiny_model_dir), adapter_path=str(tmp_path / "out"))
    np.testing.assert_allclose(logits(theirs), expected, atol=2e-4)
    alone = logits(load(str(tiny_model_dir), adapter_path=str(first))[0])
    assert np.abs(alone - expected).max() > 0.05, "the comparison could not fail"


@pytest.mark.mlx
def test_an_adapted_embedding_is_merged_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its factors are (tokens, r) and (r, width): stacked as others are, and not turned."""
    from mlx_lm import load

    rng, folders = np.random.default_rng(4), []
    rows = json.loads((tiny_model_dir / "config.json").read_text())["vocab_size"]
    for name, rank in (("a", 2), ("b", 3)):
        arrays = {
            "model.embed_tokens.lora_a": rng.standard_normal((rows, rank)).astype(np.float32),
            "model.embed_tokens.lora_b": rng.standard_normal((rank, 32)).astype(np.float32),
        }
        lora = {"rank": rank, "scale": 0.5, "dropout": 0.0, "keys": ["model.embed_tokens"]}
        config = {"fine_tune_type": "lora", "model": str(tiny_model_dir), "num_layers": 1, "lora_parameters": lora}
        folders.append(write(tmp_path / name, arrays, config))
    write_adapter(interpolate(folders, [0.4, 0.6]), tmp_path / "out")
    weights = mixed(tiny_model_dir, [(folders[0], 0.4), (folders[1], 0.6)])
    expected = logits(load(str(with_weights(tiny_model_dir, weights, tmp_path / "dense")))[0])
    theirs, _ = load(str(tiny_model_dir), adapter_path=str(tmp_path / "out"))
    np.testing.assert_allclose(logits(theirs), expected, atol=2e-4)


@pytest.mark.mlx
def test_full_fine_tunes_and_dora_load_as_they_did(
    make_full: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    from mlxpref import mlx_backend

    first, second = make_full("a", seed=1), make_full("b", seed=2, layers=(1, 2))
    write_adapter(interpolate([first, second], [0.5, 0.75]), tmp_path / "out")
    expected = with_weights(
        tiny_model_dir, mixed(tiny_model_dir, [(first, 0.5), (second, 0.75)]), tmp_path / "dense"
    )
    plain = mlx_backend.load_policy(str(expected), trainable=False)
    np.testing.assert_allclose(logits(mlx_backend.load_adapter(tmp_path / "out").model), logits(plain.model), atol=2e-4)

    policy = mlx_backend.load_policy(str(tiny_model_dir), fine_tune_type="dora", num_layers=1)
    mlx_backend.save_adapter(policy, tmp_path / "dora", extra={})
    write_adapter(extrapolate(tmp_path / "dora", 0.0), tmp_path / "same")
    found = [logits(mlx_backend.load_adapter(tmp_path / name).model) for name in ("dora", "same")]
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.mlx
def test_the_next_round_starts_from_a_merged_adapter(make_lora: Callable[..., Path], tmp_path: Path) -> None:
    """Finds keys that make modules without factors, or factors without a module: the room refuses both."""
    from mlxpref import mlx_backend

    first = make_lora("a", seed=1)
    second = make_lora("b", seed=2, rank=2, layers=(0, 1, 2), keys=["self_attn.q_proj"])
    write_adapter(interpolate([first, second], [0.5, 0.5]), tmp_path / "out")
    policy = mlx_backend.load_policy(settings(first)["model"], init_from=str(tmp_path / "out"))
    assert set(policy.trainable()) == set(load_file(tmp_path / "out" / "adapters.safetensors"))
