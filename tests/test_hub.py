"""A model's folder: found locally without a question, asked for at the hub, refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxpref.errors import ModelError
from mlxpref.hub import model_folder


def test_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == tmp_path


def test_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    """It would be taken for the revision that is read, and read is what lies there."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"lies on this disk: a revision \(v2\)"):
        model_folder(str(tmp_path), revision="v2")


def test_config_that_is_not_json_is_named(tmp_path: Path) -> None:
    """Otherwise the tokenizer or the weights are blamed for it."""
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(ModelError, match=r"config\.json: not JSON"):
        model_folder(str(tmp_path))


@pytest.mark.parametrize("path", ["./nowhere", "no-such-model", "a/b/c"])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(path: str) -> None:
    """A mistyped path must not turn into a question to the hub."""
    with pytest.raises(ModelError, match="no such folder"):
        model_folder(path)


def test_unreachable_hub_names_the_remedy() -> None:
    with pytest.raises(ModelError, match=r"hub cannot be reached.*hf download owner/no-such-model"):
        model_folder("owner/no-such-model")


def test_download_asks_for_weights_only_when_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspecting data with a model's tokenizer must not fetch gigabytes."""
    import huggingface_hub

    asked = []

    def download(path: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((path, revision, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_folder("owner/name", revision="main") == tmp_path
    model_folder("owner/name", weights=False)
    assert asked == [("owner/name", "main", True), ("owner/name", None, False)]


def test_refusal_of_the_hub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    def download(*_: object, **__: object) -> str:
        raise HFValidationError("not a repo id")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=r"hub does not give it \(not a repo id\)"):
        model_folder("owner/na me")
