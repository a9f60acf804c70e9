"""The reference store: what it finds again, what it does not, and what damage does to it."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest

from mlxpref.errors import RunError
from mlxpref.records import Logps, MicroBatch, Tokenized
from mlxpref.reference import (
    ReferenceStore,
    default_store_folder,
    logps_pass,
    policy_logps,
    reference_logps,
    response_key,
)

POLICY = fakes.table(1), fakes.table(2)


def make_policy() -> fakes.FakePolicy:
    return fakes.FakePolicy(*POLICY)


def fill(folder: Path, rows: list[Tokenized], fingerprint: str = "base") -> ReferenceStore:
    store = ReferenceStore(folder, fingerprint)
    reference_logps(rows, fakes.backend(), make_policy(), store)
    return store


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.shard"))


# --- values ---


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [64, 4096])
def test_each_response_gets_its_own_log_probs(share_prompts: bool, micro_batch_tokens: int) -> None:
    """Finds: rows or slots exchanged on the way through sorted micro-batches; a boundary off by one."""
    rows = fakes.random_rows(37) + fakes.random_rows(5, responses=4, seed=1)
    policy = make_policy()
    policy.share_prompts = share_prompts
    found, _ = reference_logps(rows, fakes.backend(), policy, None, micro_batch_tokens=micro_batch_tokens)
    own = policy_logps(rows, fakes.backend(), policy, micro_batch_tokens=micro_batch_tokens)
    for of, logps in ((POLICY[1], found), (POLICY[0], own)):
        for row, values in zip(rows, logps, strict=True):
            for ids, of_response in zip(row.response_ids, values, strict=True):
                expected = fakes.by_hand(of, row.prompt_ids.tolist(), ids.tolist())
                np.testing.assert_allclose(of_response, expected, rtol=1e-6)
                assert of_response.dtype == np.float32


def test_the_store_gives_back_the_same_bits(tmp_path: Path) -> None:
    rows = fakes.random_rows(20)
    computed, _ = reference_logps(rows, fakes.backend(), make_policy(), ReferenceStore(tmp_path, "base"))
    again, counts = reference_logps(rows, fakes.backend(), None, ReferenceStore(tmp_path, "base"))
    assert (counts.computed, counts.reused) == (0, 20)
    for a, b in zip(computed, again, strict=True):
        assert [x.tobytes() for x in a] == [x.tobytes() for x in b]


# --- what is found again ---


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    """A policy that is not even there shows that nothing was asked of it."""
    rows = fakes.random_rows(30)
    fill(tmp_path, rows)
    _, counts = reference_logps(rows[::-1], fakes.backend(), None, ReferenceStore(tmp_path, "base"))
    assert (counts.computed, counts.reused) == (0, 30)


def test_other_weights_compute_everything(tmp_path: Path) -> None:
    rows = fakes.random_rows(6)
    fill(tmp_path, rows, "base")
    _, counts = reference_logps(rows, fakes.backend(), make_policy(), ReferenceStore(tmp_path, "other"))
    assert (counts.computed, counts.reused) == (6, 0)


@pytest.mark.parametrize("change", ["prompt", "chosen", "rejected", "boundary"])
def test_a_changed_row_computes_that_row(tmp_path: Path, change: str) -> None:
    """``boundary``: the same ids with one token moved from the prompt's end to the response's start."""
    rows = fakes.random_rows(9, longest=40)
    rows[4] = replace(rows[4], prompt_ids=np.arange(5, dtype=np.int32))
    fill(tmp_path, rows)
    prompt, (chosen, rejected) = rows[4].prompt_ids, rows[4].response_ids
    changed = {
        "prompt": replace(rows[4], prompt_ids=np.append(prompt[:-1], prompt[-1] + 1).astype(np.int32)),
        "chosen": replace(rows[4], response_ids=(np.append(chosen, 7).astype(np.int32), rejected)),
        "rejected": replace(rows[4], response_ids=(chosen, np.append(rejected, 7).astype(np.int32))),
        "boundary": replace(
            rows[4],
            prompt_ids=prompt[:-1],
            response_ids=tuple(np.append(prompt[-1:], ids) for ids in (chosen, rejected)),
        ),
    }[change]
    policy = make_policy()
    rows[4] = changed
    found, counts = reference_logps(rows, fakes.backend(), policy, ReferenceStore(tmp_path, "base"))
    assert (counts.computed, counts.reused) == (1, 8)
    assert policy.asked == [(True, 1)]
    expected = fakes.by_hand(POLICY[1], changed.prompt_ids.tolist(), changed.response_ids[1].tolist())
    np.testing.assert_allclose(found[4][1], expected, rtol=1e-6)


def test_keys_tell_the_boundary() -> None:
    a, b, c = (np.array(x, np.int32) for x in ([1, 2], [3], [2, 3]))
    assert response_key(a, b) != response_key(a[:1], c)
    assert response_key(a.astype(np.int64), b) == response_key(a, b)


def test_rows_that_occur_twice_are_computed_once() -> None:
    rows = fakes.random_rows(4) * 3
    policy = make_policy()
    found, counts = reference_logps(rows, fakes.backend(), policy, None)
    assert sum(n for _, n in policy.asked) == counts.computed == 4
    assert len(found) == 12
    assert all(np.array_equal(x, y) for x, y in zip(found[0], found[8], strict=True))


def test_a_pair_is_known_from_the_list_that_held_it(tmp_path: Path) -> None:
    (row,) = fakes.random_rows(1, responses=4)
    fill(tmp_path, [row])
    pair = replace(row, response_ids=(row.response_ids[3], row.response_ids[1]))
    found = ReferenceStore(tmp_path, "base").get(pair)
    assert found is not None
    assert [len(x) for x in found] == [len(row.response_ids[3]), len(row.response_ids[1])]


@pytest.mark.parametrize("fingerprint", ["../outside", "a/b", "", "x" * 300, ".hidden"])
def test_any_fingerprint_is_one_folder_inside(tmp_path: Path, fingerprint: str) -> None:
    assert ReferenceStore(tmp_path, fingerprint).folder.parent == tmp_path


# --- damage ---


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x10  # inside the last value: still a finite number
    file.write_bytes(content)


DAMAGE = {
    "bit": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "empty": lambda file: file.write_bytes(b""),
    "other": lambda file: file.write_bytes(b"something else entirely"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_said_and_remade(tmp_path: Path, kind: str) -> None:
    """Finds: wrong log-probs taken for right ones, a crash, or damage that is met at every start."""
    rows = fakes.random_rows(8)
    fill(tmp_path, rows[:5])
    fill(tmp_path, rows[5:])
    damaged = shards(tmp_path)[0]
    DAMAGE[kind](damaged)
    store = ReferenceStore(tmp_path, "base")
    assert len(store.said) == 1 and str(damaged) in store.said[0]
    found, counts = reference_logps(rows, fakes.backend(), make_policy(), store)
    assert counts.computed in (3, 5) and counts.computed + counts.reused == 8
    expected, _ = reference_logps(rows, fakes.backend(), make_policy(), None)
    for a, b in zip(found, expected, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    after = ReferenceStore(tmp_path, "base")
    assert after.said == () and all(after.get(row) is not None for row in rows)


def test_a_shard_of_another_version_is_no_shard(tmp_path: Path) -> None:
    """Bytes that match their name but are not ours: read as numbers they would be nonsense."""
    import hashlib

    content = b"mlxpref-logps-9\n" + bytes(64)
    store = ReferenceStore(tmp_path, "base")
    store.folder.mkdir(parents=True)
    (store.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.shard").write_bytes(content)
    assert len(ReferenceStore(tmp_path, "base").said) == 1


def test_log_probs_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    rows = fakes.random_rows(3)
    policy = make_policy()
    policy.reference = np.full_like(POLICY[1], np.nan)
    with pytest.raises(RunError, match="not finite"):
        reference_logps(rows, fakes.backend(), policy, ReferenceStore(tmp_path, "base"))
    assert shards(tmp_path) == []


def test_lengths_must_fit(tmp_path: Path) -> None:
    (row,) = fakes.random_rows(1)
    with pytest.raises(ValueError, match="log-probs of"):
        ReferenceStore(tmp_path, "base").put(row, [np.zeros(len(ids) + 1) for ids in row.response_ids])


# --- interruption, processes, disks ---


class _Stopped(KeyboardInterrupt):
    pass


def test_an_interruption_keeps_what_was_computed(tmp_path: Path) -> None:
    rows = fakes.random_rows(40)
    left = 3

    def interrupted(policy: Any, batch: MicroBatch, *, reference: bool = False) -> Logps:
        nonlocal left
        left -= 1
        if left < 0:
            raise _Stopped
        return fakes.token_logps(policy, batch, reference=reference)

    broken = fakes.backend()
    broken.token_logps = interrupted
    with pytest.raises(_Stopped):
        reference_logps(rows, broken, make_policy(), ReferenceStore(tmp_path, "base"), micro_batch_tokens=256)
    policy = make_policy()
    _, counts = reference_logps(rows, fakes.backend(), policy, ReferenceStore(tmp_path, "base"), micro_batch_tokens=256)
    assert 0 < counts.computed < 40
    assert sum(n for _, n in policy.asked) == counts.computed == 40 - counts.reused


def test_what_was_computed_is_written_while_computing(tmp_path: Path) -> None:
    """Finds: everything kept in memory to the end, lost when the process is killed."""
    now = 0.0
    written = []

    def clock() -> float:
        nonlocal now
        now += 20.0
        return now

    def look(done: int, total: int) -> None:
        written.append(len(shards(tmp_path)))

    store = ReferenceStore(tmp_path, "base")
    reference_logps(
        fakes.random_rows(40), fakes.backend(), make_policy(), store,
        micro_batch_tokens=256, on_progress=look, clock=clock,
    )  # fmt: skip
    assert written[-1] >= 2
    assert len(ReferenceStore(tmp_path, "base")) == 80


def _write(folder: Path, seed: int) -> None:
    fill(folder, fakes.random_rows(30, seed=0) + fakes.random_rows(30, seed=seed))


def test_processes_share_a_store(tmp_path: Path) -> None:
    """Four processes write rows of their own and rows they share; every row is there, none damaged."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(tmp_path, seed)) for seed in (1, 2, 3, 4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store = ReferenceStore(tmp_path, "base")
    assert store.said == ()
    for seed in range(5):
        assert all(store.get(row) is not None for row in fakes.random_rows(30, seed=seed))
    assert [file for file in store.folder.iterdir() if file.suffix != ".shard"] == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="No space left on device"):
        fill(tmp_path, fakes.random_rows(3))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_progress_counts_rows() -> None:
    rows = fakes.random_rows(25)
    seen: list[tuple[int, int]] = []
    found = list(
        logps_pass(
            rows, fakes.backend(), make_policy(),
            reference=False, micro_batch_tokens=256, on_progress=lambda *at: seen.append(at),
        )
    )  # fmt: skip
    assert sorted(index for index, _ in found) == list(range(25))
    assert seen[-1] == (25, 25) and seen == sorted(seen)


def test_the_default_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path))
    assert default_store_folder() == tmp_path / "reference"
    monkeypatch.delenv("MLXPREF_CACHE")
    assert default_store_folder().parts[-2:] == ("mlxpref", "reference")
