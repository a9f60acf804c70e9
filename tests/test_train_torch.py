"""Training on PyTorch: stopping changes no bit, and what a run leaves is mlx-lm's."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.errors import AdapterError, ModelError, RunError
from tests.test_mlx_exactness import random_rows
from tests.test_train_mlx import STATES, adapter, configure, run
from tests.torch_models import assert_logps, jittered, read

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

__all__ = ["configure"]  # a fixture


@pytest.fixture
def uncompiled() -> Iterator[None]:
    import mlx.core as mx

    mx.disable_compile()  # a dozen graphs, traced for a step or two each
    yield
    mx.enable_compile()


TORCH = "model.backend=torch"


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["adapter.fine_tune_type=dora", "training.grad_checkpoint=true", "optimizer.name=muon"],
        ["adapter={fine_tune_type: full, num_layers: 1}", "optimizer.learning_rate=1e-4", "optimizer.name=adafactor"],
        STATES,
    ],
    ids=["lora", "dora", "full", "states"],
)
def test_resumed_equals_uninterrupted_byte_for_byte(configure: Any, tmp_path: Path, settings: list[str]) -> None:
    """Dropout is on: forgotten random state, moments, the objective's or the reference's state would show."""
    whole = run(configure(TORCH, *settings, f"output.adapter_path={tmp_path / 'whole'}"))
    stopped = run(configure(TORCH, *settings), stop=3)
    assert stopped.interrupted == signal.SIGINT and stopped.step == 3
    resumed = run(configure(TORCH, *settings), resume=True)
    assert adapter(resumed.folder) == adapter(whole.folder)
    assert adapter(resumed.folder / "best") == adapter(whole.folder / "best")
    assert resumed.best_value == whole.best_value
    assert losses(resumed.folder) == losses(whole.folder)


@pytest.mark.mlx
@pytest.mark.parametrize(
    "settings",
    [
        [],
        # STATES' other objectives divide, or cut, by noise here
        pytest.param(["objective=[{name: bco}, {name: group_robust}]", *STATES[1:]], marks=pytest.mark.slow),
    ],
    ids=["dpo", "states"],
)
def test_a_run_is_that_of_mlx(configure: Any, tmp_path: Path, settings: list[str], uncompiled: None) -> None:
    """The same losses, evaluations and adapter from one first adapter, through the whole of ``train``."""
    from mlxpref import torch_backend

    settings = [*settings, "optimizer.learning_rate=1e-2"]
    first = ["adapter.lora_parameters.dropout=0", "training.iters=2", f"output.adapter_path={tmp_path / 'start'}"]
    start = run(configure(TORCH, *first))
    found = {}
    for backend in ("mlx", "torch"):
        more = ["adapter=null", f"adapter={{init_from: {start.folder}}}", f"output.adapter_path={tmp_path / backend}"]
        folder = run(configure(*settings, *more, f"model.backend={backend}", "optimizer.weight_decay=0.1")).folder
        found[backend] = losses(folder), folder
    np.testing.assert_allclose(found["torch"][0], found["mlx"][0], atol=2e-4)
    weights = [torch_backend.load_adapter(folder).to_save() for _, folder in found.values()]
    for name, value in weights[0].items():
        gap = float((weights[1][name] - value).abs().max())
        assert gap < 1e-3 * max(float(value.abs().max()), 1e-2), name


def test_first_loss_best_adapter_and_facts(configure: Any) -> None:
    result = run(configure(TORCH, "optimizer.learning_rate=1e-2", "adapter.lora_parameters.dropout=0"))
    assert losses(result.folder)[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses(result.folder)[-1] < 0.692
    assert (result.folder / "best" / "adapters.safetensors").is_file()
    facts = json.loads((result.folder / "run.json").read_text())
    assert "torch" in json.dumps(facts)
    with pytest.raises(RunError):
        run(configure(TORCH, "output.adapter_path=" + str(result.folder)))


def test_starting_from_an_adapter_takes_it_as_reference(configure: Any, tmp_path: Path) -> None:
    first = run(configure(TORCH, "adapter.lora_parameters.dropout=0"))
    more = [f"adapter.init_from={first.folder}", f"output.adapter_path={tmp_path / 'second'}"]
    assert losses(run(configure(TORCH, *more)).folder)[0] == pytest.approx(np.log(2), abs=2e-6)


@pytest.mark.slow
def test_momentum_carries_the_reference_on(configure: Any, tmp_path: Path) -> None:
    """Finds: a setting nobody reads, a base that is the adapter, a previous round exchanged with this one."""
    first = run(configure(TORCH, "objective.beta=1.0"))
    round_two = [TORCH, "objective.beta=1.0", "adapter=null", f"adapter={{init_from: {first.folder}}}"]

    def loss(name: str, *settings: str) -> float:
        return losses(run(configure(*round_two, *settings, f"output.adapter_path={tmp_path / name}")).folder)[0]

    plain = loss("plain")
    assert loss("base", "reference.momentum=2.0") > plain + 0.001
    same = loss("same", "reference.momentum=2.0", f"reference.previous={first.folder}")
    assert same == pytest.approx(plain, abs=1e-5)


def test_no_socket_is_opened(configure: Any, no_sockets: list[str]) -> None:
    run(configure(TORCH, "training.iters=2"))


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.mlx
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_adapters_go_from_room_to_room(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The same log-probs after loading in the other room and in mlx-lm, the reference's too."""
    import mlx.core as mx
    from mlx_lm import load

    from mlxpref import mlx_backend, torch_backend

    rooms = {"mlx": mlx_backend, "torch": torch_backend}
    rows = random_rows(300, n=3)
    for name, room in rooms.items():
        other = rooms["torch" if name == "mlx" else "mlx"]
        options = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}}
        policy = room.load_policy(str(tiny_model_dir), **options)
        policy.set_values(jittered(policy.values(), 0.05))
        folder = tmp_path / f"{kind}-{name}"
        room.save_adapter(policy, folder, extra={"objective": "dpo"})
        assert {file.name for file in folder.iterdir()} == {"adapters.safetensors", "adapter_config.json"}
        expected = read(room, policy, rows, share=False)
        for one in (room, other):
            loaded = one.load_adapter(folder)
            assert not loaded.masters and not loaded.notes
            assert_logps(read(one, loaded, rows, share=False), expected)
            base = one.load_policy(str(tiny_model_dir), trainable=False)
            reference = read(one, loaded, rows, share=False, reference=True)
            assert_logps(reference, read(one, base, rows, share=False), 1e-6)
            assert max(np.abs(a - b).max() for a, b in zip(reference[0], expected[0], strict=True)) > 1e-2
        model, _ = load(str(tiny_model_dir), adapter_path=str(folder))
        ids = np.concatenate([rows[0].prompt_ids, rows[0].response_ids[0]])
        logits = np.array(model(mx.array(ids[None, :-1]))[0], np.float64)
        logps = (logits - np.logaddexp.reduce(logits, -1)[:, None])[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(logps[len(rows[0].prompt_ids) - 1 :], expected[0][0], atol=1e-4)


@pytest.mark.mlx
def test_a_trained_adapter_says_the_same_in_mlx_lm(configure: Any) -> None:
    """Greedy text by mlx-lm's own command path, from the folder that a run left."""
    from mlx_lm import generate, load

    from mlxpref import torch_backend

    folder = run(configure(TORCH, "optimizer.learning_rate=3e-2")).folder
    policy = torch_backend.load_adapter(folder)
    model, tokenizer = load(json.loads((folder / "adapter_config.json").read_text())["model"], adapter_path=str(folder))
    ids = policy.tokenizer.encode("Once upon a time")
    (text,) = torch_backend.generate(policy, [ids], max_tokens=16)
    assert text == generate(model, tokenizer, prompt=ids, max_tokens=16)
    (base,) = torch_backend.generate(policy, [ids], max_tokens=16, adapter=False)
    assert text != base


def test_adapters_that_do_not_fit_are_refused(make_model_dir: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Every mismatch in one message; a base that was replaced is noticed."""
    from mlxpref import torch_backend

    policy = torch_backend.load_policy(str(tiny_model_dir), num_layers=2, lora_parameters={"rank": 4, "scale": 2.0})
    folder = tmp_path / "adapter"
    torch_backend.save_adapter(policy, folder, extra={})
    with pytest.raises(AdapterError, match=r"made for another model(.|\n)*layers\.2.*not in the model"):
        torch_backend.load_adapter(folder, model_path=str(make_model_dir(num_hidden_layers=2)))
    (note,) = torch_backend.load_adapter(folder, model_path=str(make_model_dir(seed=3))).notes
    assert "trained on other weights" in note
    with pytest.raises(AdapterError, match="is this an adapter folder"):
        torch_backend.load_adapter(tmp_path / "nowhere")
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "adapters.safetensors").write_bytes(b"half")
    with pytest.raises(AdapterError, match="damaged"):
        torch_backend.load_adapter(tmp_path / "damaged")
    with pytest.raises(AdapterError, match="damaged"):
        torch_backend.load_policy(str(tiny_model_dir), init_from=str(tmp_path / "damaged"))
    with pytest.raises(ModelError, match="no such folder"):
        torch_backend.load_adapter(folder, model_path=str(tmp_path / "gone"))


@pytest.mark.mlx
def test_a_run_of_the_other_room_is_not_gone_on_with(configure: Any) -> None:
    """A checkpoint of MLX's, resumed with the backend changed, or changed under it."""
    stopped = run(configure("training.iters=4"), stop=2)
    with pytest.raises(RunError, match="backend"):
        run(configure(TORCH, "training.iters=4"), resume=True)
    settings = (stopped.folder / "config.yaml").read_text()
    assert "backend" in settings
