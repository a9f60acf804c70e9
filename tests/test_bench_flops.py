"""The least a step has to compute, counted apart.

Finds: a matrix that is forgotten or counted twice, a backward that is counted where none is, tokens that nothing
needs, a window or a set of experts that is not looked at, a model's widths read wrongly.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlxpref.bench import lengths_of, minimum_flops, products, read_dims
from mlxpref.bench.dims import KNOWN, Dims, Layer, Matrix
from mlxpref.errors import ModelError
from mlxpref.parity.models import BUILT_IN, write_model
from mlxpref.records import Tokenized
from mlxpref.tensors import Tensor, write_tensors


def dense(n_layers: int = 2, window: int | None = None) -> Dims:
    """Hidden 8, two heads of 3, one of keys, inner 5, vocabulary 11."""
    matrices = (
        Matrix("self_attn.q_proj", 8, 6), Matrix("self_attn.k_proj", 8, 3), Matrix("self_attn.v_proj", 8, 3),
        Matrix("self_attn.o_proj", 6, 8),
        Matrix("mlp.gate_proj", 8, 5), Matrix("mlp.up_proj", 8, 5), Matrix("mlp.down_proj", 5, 8),
    )  # fmt: skip
    return Dims((Layer(matrices, heads=2, head_dim=3, window=window),) * n_layers, hidden=8, vocabulary=11)


# One row: a prompt of 3, responses of 2 and 4. Read: 3 + 1 + 3 = 7 tokens; the last layer's outputs that are wanted:
# the last prompt token's and 4 of responses, 5; scored: 6.
ROW = [(3, (2, 4))]
QKV, OWN = 8 * 6 + 2 * 8 * 3, 6 * 8 + 3 * 8 * 5
FIRST = 2 * 7 * (QKV + OWN)
LAST = 2 * (7 * (2 * 8 * 3) + 5 * (8 * 6 + OWN))
HEAD = 2 * 8 * 11 * 6
# Keys seen: by the prompt 1 + 2 + 3 (in the last layer by its last token: 3), by the responses 4 and 4 + 5 + 6.
PAIRS_FIRST, PAIRS_LAST = 6 + 4 + 15, 3 + 4 + 15


def test_forward_counted_by_hand() -> None:
    found = minimum_flops(dense(), ROW, adapted_from=None)
    assert found == (FIRST + LAST, 4 * 2 * 3 * (PAIRS_FIRST + PAIRS_LAST), HEAD, 0)
    assert found.total == sum(found)


def test_backward_counted_by_hand() -> None:
    """Of the lowest layer that trains, queries, keys and values need no gradient of their input."""
    r, adapted = 2, [(8, 6, 5), (8, 3, 7), (8, 3, 7), (6, 8, 5), (8, 5, 5), (8, 5, 5), (5, 8, 5)]
    lora = sum(3 * 2 * r * (a + b) * tokens for a, b, tokens in adapted)
    lora -= sum(2 * r * a * tokens for a, _, tokens in adapted[:3])
    not_needed = 2 * (5 * 8 * 6 + 7 * 2 * 8 * 3)
    found = minimum_flops(dense(), ROW, adapted_from=1, rank=r)
    attention = 4 * 2 * 3 * (PAIRS_FIRST + 3 * PAIRS_LAST)
    assert found == (FIRST + 2 * LAST - not_needed, attention, 2 * HEAD, lora)


def test_rows_add_up() -> None:
    both = minimum_flops(dense(), [*ROW, (9, (1, 1, 1))], adapted_from=0)
    apart = [minimum_flops(dense(), rows, adapted_from=0) for rows in (ROW, [(9, (1, 1, 1))])]
    assert both == pytest.approx([sum(parts) for parts in zip(*apart, strict=True)])


def test_keys_adapt_no_other_matrix() -> None:
    alone = minimum_flops(dense(1), ROW, adapted_from=0, keys={"mlp.down_proj"})
    assert alone.adapter == 3 * 2 * 8 * (5 + 8) * 5
    assert minimum_flops(dense(1), ROW, adapted_from=0, keys=()).adapter == 0


def test_full_fine_tuning_makes_every_weights_gradient() -> None:
    found = minimum_flops(dense(), ROW, adapted_from=0, rank=None)
    assert found.adapter == FIRST + LAST + HEAD
    assert minimum_flops(dense(), ROW, adapted_from=1, rank=None).adapter == LAST


@pytest.mark.parametrize("window", [1, 3, 4, 5, 100])
def test_a_window_against_counting_every_pair(window: int) -> None:
    def seen(place: int) -> int:
        return len([key for key in range(place + 1) if place - key < window])

    first = sum(seen(i) for i in range(3)) + seen(3) + sum(seen(3 + i) for i in range(3))
    last = seen(2) + seen(3) + sum(seen(3 + i) for i in range(3))
    found = minimum_flops(dense(window=window), ROW, adapted_from=None)
    assert found.attention == 4 * 2 * 3 * (first + last)


def test_a_token_meets_its_experts_only() -> None:
    def model(*matrices: Matrix) -> Dims:
        return Dims((Layer(matrices, 0, 0), Layer((), 0, 0)), 8, 11)

    expert, two = Matrix("mlp.switch_mlp.up_proj", 8, 5, experts=4, active=2), Matrix("mlp.up_proj", 8, 10)
    found = [minimum_flops(model(one), ROW, adapted_from=None).layers for one in (expert, two)]
    assert found[0] == found[1] == 2 * 8 * 10 * 7
    assert products(model(expert), 100, 10)[0] == (50, 8, 5, 2.0 * 8 * 5 * 2 * 100)


def test_lengths_are_those_of_rows() -> None:
    def ids(n: int) -> np.ndarray:
        return np.zeros(n, np.int32)

    plain = Tokenized(ids(3), (ids(2), ids(4)), "a")
    more = Tokenized(ids(3), (ids(2), ids(4)), "b", texts={"third": (ids(5),)}, leads=(ids(0), ids(0), ids(2)))
    assert lengths_of([plain, more]) == [(3, (2, 4)), (3, (2, 4, 7))]


def test_products_are_those_of_a_pass() -> None:
    """Alike shapes stand together, and nothing is left out of the FLOPs they weigh by."""
    found = products(dense(3), tokens=1000, scored=700)
    assert len({product[:3] for product in found}) == len(found)
    whole = minimum_flops(dense(3), [(1, (1000,))], adapted_from=None)  # 1000 read, and all wanted
    assert sum(product[3] for product in found) == whole.layers + whole.head * 0.7
    assert (512, 8, 11) in {product[:3] for product in found}, "logits are made in chunks"


# --- a model's files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_config_and_weights_say_the_same(name: str, tmp_path: Path) -> None:
    """Two readings that share nothing: keys of the config, and shapes in the weights' file."""
    folder = write_model(name, tmp_path / name)
    said = read_dims(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    seen = read_dims(folder)
    assert (said.source, seen.source) == ("config", "weights")
    rows = [(5, (7, 9)), (1, (2, 3))]
    for adapted_from in (None, 0, 1):
        ours, theirs = (minimum_flops(dims, rows, adapted_from=adapted_from) for dims in (said, seen))
        assert ours == pytest.approx(theirs)


def test_all_built_in_architectures_are_read_from_their_config() -> None:
    assert set(BUILT_IN) <= set(KNOWN)


def test_packed_weights_are_as_wide_as_what_they_stand_for(tmp_path: Path) -> None:
    shapes = {
        "model.layers.0.mixer.in_proj.weight": (24, 8), "model.layers.0.mixer.in_proj.scales": (24, 1),
        "model.layers.0.norm.weight": (64,), "model.layers.0.mixer.conv1d.weight": (64, 4, 1),
        "model.layers.0.mlp.experts.up_proj.weight": (6, 16, 64), "model.embed_tokens.weight": (99, 64),
    }  # fmt: skip
    tensors = {name: Tensor("F32", shape, lambda s=shape: np.zeros(s)) for name, shape in shapes.items()}
    write_tensors(tmp_path / "model.safetensors", tensors)
    config = {"hidden_size": 64, "vocab_size": 99, "num_experts_per_tok": 2, "quantization": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", **config}))
    (layer,) = read_dims(tmp_path).layers
    assert layer.heads == 0
    assert layer.matrices == (Matrix("mixer.in_proj", 64, 24), Matrix("mlp.experts.up_proj", 64, 16, 6, 2.0))


def test_layers_that_take_turns_have_their_own_windows(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma3", "text_config": {
            "model_type": "gemma3_text", "num_hidden_layers": 4, "hidden_size": 8, "intermediate_size": 5,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 3, "vocab_size": 11,
            "sliding_window": 4, "sliding_window_pattern": 2,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [layer.window for layer in read_dims(tmp_path).layers] == [4, None, 4, None]


def test_a_model_that_nothing_explains(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        read_dims(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "new"}')
    with pytest.raises(ModelError, match="how wide"):
        read_dims(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    with pytest.raises(ModelError, match="no key"):
        read_dims(tmp_path)


# --- another library's count ----------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(("name", "num_layers"), [("llama", 2), ("llama", -1), ("qwen3", 2), ("phi3", 1)])
def test_pytorch_counts_the_same_products(name: str, num_layers: int, tmp_path: Path) -> None:
    """PyTorch's own counter watches peft train: a prompt of one token leaves nothing that need not be computed, so
    products with matrices agree to the last one; its attention computes both halves."""
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder = write_model(name, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    n_layers, n = model.config.num_hidden_layers, 17
    trained = range(n_layers)[-num_layers:] if num_layers > 0 else range(n_layers)
    targets = rf".*layers\.({'|'.join(map(str, trained))})\..*_proj"
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(n)[None]).logits.sum().backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    ours = minimum_flops(read_dims(folder), [(1, (n,))], adapted_from=trained[0], rank=4)
    attention = counted.pop("aten.bmm")
    assert sum(counted.values()) == ours.layers + ours.head + ours.adapter
    assert attention == pytest.approx(ours.attention * 2 * n / (n + 1))
