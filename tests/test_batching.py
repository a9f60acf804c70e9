"""From tokenized examples to arrays: nothing scored twice, nothing lost, nothing padded into a score."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from mlxpref.data.batching import collate, collate_step
from mlxpref.data.order import epoch_order
from mlxpref.data.parts import PlannedPart
from mlxpref.data.plan import Plan, plan_pass, plan_steps
from mlxpref.data.shapes import LENGTHS, Shape, ceil_length, ceil_scored, floor_length, merge_shapes
from mlxpref.errors import ConfigError, DataError
from mlxpref.records import MicroBatch, Tokenized


def make_rows(n_sources: int, *, seed: int = 0, ks: tuple[int, ...] = (2,), longest: int = 200) -> list[Tokenized]:
    """Two halves a source, the second with its responses reversed; token ids are never 0."""
    rng = np.random.default_rng(seed)
    rows = []
    for source in range(n_sources):
        prompt = rng.integers(1, 1000, rng.integers(1, longest), np.int32)
        k = int(rng.choice(ks))
        responses = tuple(rng.integers(1, 1000, rng.integers(1, longest), np.int32) for _ in range(k))
        scores = tuple(float(v) for v in rng.random(k))
        row = Tokenized(prompt, responses, f"source-{source}", scores, extras={"margins": float(source)})
        rows += [row, replace(row, response_ids=responses[::-1], scores=scores[::-1])]
    return rows


def read_back(batch: MicroBatch, b: int, k: int) -> tuple[list[int], list[int], list[int]]:
    """Witness: by the words of the record alone, the prompt, the response as scored, and the row fed."""
    n_scored = len(batch.scored)
    places = [int(p) for p in batch.place[b, k] if p < n_scored]
    positions = [int(batch.scored[p]) for p in places]
    response = [int(batch.targets[p]) for p in places]
    start = 0
    for shelf in batch.shelves:
        rows, width = shelf.inputs.shape
        if start <= positions[0] < start + rows * width:
            row, first = divmod(positions[0] - start, width)
            break
        start += rows * width
    assert int(shelf.prompt[row]) == b
    assert positions == list(range(positions[0], positions[0] + len(positions))), "one row, in order"
    assert first + len(positions) <= width, "a response runs out of its row"
    fed = [*batch.prompts[b].tolist(), *shelf.inputs[row].tolist()]
    at = len(batch.prompts[b]) + first
    return fed[: at + 1], response, fed[: at + len(response)]


def check_micro_batch(rows: list[Tokenized], part: PlannedPart, batch: MicroBatch) -> None:
    shape = part.shape
    used: list[int] = []
    for b, index in enumerate(part.rows):
        for k, ids in enumerate(rows[index].response_ids):
            prompt, response, fed = read_back(batch, b, k)
            assert prompt == rows[index].prompt_ids.tolist()
            assert response == ids.tolist()
            assert fed == [*prompt, *response[:-1]]
            used += [int(p) for p in batch.place[b, k, : len(ids)]]
            assert (batch.place[b, k, len(ids) :] == shape.scored).all()
            assert batch.mask[b, k].tolist() == [1.0] * len(ids) + [0.0] * (shape.rows[0] - len(ids))
    n = len(used)
    assert sorted(used) == list(range(n)), "a scored position belongs to two tokens or to none"
    assert len(set(batch.scored[:n].tolist())) == n, "a position is scored twice"
    assert not batch.scored[n:].any() and not batch.targets[n:].any()
    assert [s.inputs.shape for s in batch.shelves] == [(shape.n, width) for width in shape.rows]
    assert batch.prompts.shape == (shape.n, shape.prompt)
    assert batch.place.shape == batch.mask.shape == (shape.n, shape.responses, shape.rows[0])
    assert batch.scored.shape == batch.targets.shape == (shape.scored,)
    for array in (batch.prompts, batch.scored, batch.targets, batch.place, *sum(batch.shelves, ())):
        assert array.dtype == np.int32


def visits(plan: Plan) -> list[int]:
    return sorted(row for step in plan.steps for part in step for row in part.rows)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("ks", [(2,), (3,), (2, 4, 5)])
def test_arrays_hold_every_token_once(ks: tuple[int, ...], share_prompts: bool) -> None:
    """Finds a shifted boundary, a lost or doubled token, a scored pad, a response under a wrong prompt."""
    rows = make_rows(30, ks=ks)
    plan = plan_steps(rows, batch_size=6, share_prompts=share_prompts, micro_batch_tokens=1500, max_shapes=12)
    assert len(plan.shapes) <= 12
    for step in plan.steps:
        for part, batch in zip(step, collate_step(rows, step).parts, strict=True):
            check_micro_batch(rows, part, batch)
            if not share_prompts:
                assert part.shape.prompt == 0
    assert visits(plan) == list(range(len(rows)))


def test_reference_stands_where_its_tokens_stand() -> None:
    """Finds reference log-probs laid down for another response, or beside the mask."""
    rows = make_rows(5, ks=(3,))
    reference = [[-ids.astype(np.float32) for ids in row.response_ids] for row in rows]
    for step in plan_pass(rows).steps:
        batch = collate(rows, step[0], reference)
        for b, k, t in np.argwhere(batch.mask):
            assert batch.reference[b, k, t] == -batch.targets[batch.place[b, k, t]]
        assert not (batch.reference * (1 - batch.mask)).any()


def test_reference_of_another_length_is_refused() -> None:
    """Finds stale reference log-probs joined to changed data."""
    rows = make_rows(1)
    wrong = [[np.zeros(len(ids) + 1, np.float32) for ids in row.response_ids] for row in rows]
    with pytest.raises(ValueError, match="source-0"):
        collate(rows, plan_pass(rows).steps[0][0], wrong)


def test_columns_follow_their_examples() -> None:
    """Finds columns in the order of the data instead of the order of the micro-batch."""
    rows = make_rows(8)
    for (part,) in plan_pass(rows).steps:
        batch = collate(rows, part, columns={"policy", "reference", "lengths", "scores", "margins"})
        assert set(batch.extras) == {"margins"}
        for b, index in enumerate(part.rows):
            assert batch.extras["margins"][b] == rows[index].extras["margins"]
            assert batch.scores[b].tolist() == np.float32(rows[index].scores).tolist()
    assert collate(rows, part).scores is None


def test_a_lacking_column_is_named() -> None:
    """Finds an objective fed with zeros where the data have nothing."""
    rows = [replace(row, scores=None) for row in make_rows(2)]
    with pytest.raises(DataError, match=r"'scores'.*'source-"):
        collate(rows, plan_pass(rows).steps[0][0], columns={"scores"})


def test_a_pass_visits_every_example_once_in_order_of_length() -> None:
    """Finds a reference computed twice or never, and short rows padded to long ones."""
    rows = make_rows(200, ks=(2, 3))
    plan = plan_pass(rows, micro_batch_tokens=2000, max_shapes=20)
    assert visits(plan) == list(range(len(rows)))
    assert len(plan.shapes) <= 20 and all(len(step) == 1 for step in plan.steps)
    assert plan.padding < 0.35
    assert plan.epochs[-1] == 1.0


@pytest.mark.parametrize("n_sources", [1, 7, 16])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_visits_every_example_once(n_sources: int, batch_size: int, shuffle: bool) -> None:
    """Finds a dropped last batch, and a batch larger than asked for."""
    rows = make_rows(n_sources)
    for epoch in range(3):
        batches = epoch_order([row.example_id for row in rows], batch_size=batch_size, shuffle=shuffle, epoch=epoch)
        assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
        assert all(0 < len(batch) <= batch_size for batch in batches)


def test_epochs_and_seeds_differ() -> None:
    """Finds a shuffle that is the same each epoch or ignores its seed."""
    ids = [str(n) for n in range(64)]
    orders = {str(epoch_order(ids, batch_size=4, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_halves_stay_together() -> None:
    """Finds the two halves of a source in different updates, wherever they stand in the data."""
    rng = np.random.default_rng(3)
    ids = [f"source-{n}" for n in rng.permutation(np.repeat(np.arange(40), rng.integers(1, 4, 40)))]
    for batch_size in (3, 4, 7):
        batch_of: dict[str, set[int]] = {}
        batches = epoch_order(ids, batch_size=batch_size)
        for at, batch in enumerate(batches):
            for row in batch:
                batch_of.setdefault(ids[row], set()).add(at)
        assert all(len(found) == 1 for found in batch_of.values())
        # Packing wastes little: no two batches could have been one, save a few odd ones.
        assert sum(len(batch) <= batch_size // 2 for batch in batches) <= 1


def test_halves_may_part_when_told_to() -> None:
    """Finds a keep_together that cannot be switched off."""
    ids = [f"source-{n // 2}" for n in range(400)]
    batches = epoch_order(ids, batch_size=4, keep_together=False)
    assert any(row ^ 1 not in batch for batch in batches for row in batch)


def test_batches_are_full_where_they_can_be() -> None:
    """Finds places left empty: a batch smaller than asked for is another learning rate."""
    singles = [str(n) for n in range(40)]
    threes_and_ones = [f"three-{n // 3}" for n in range(30)] + singles[:10]
    for ids in (singles, threes_and_ones):
        batches = epoch_order(ids, batch_size=4)
        assert [len(batch) for batch in batches] == [4] * 10


def test_no_shuffle_is_file_order() -> None:
    """Finds a sort by length, or halves drawn together from afar, where file order was asked for."""
    ids = [f"source-{n % 10}" for n in range(20)]
    batches = epoch_order(ids, batch_size=4, shuffle=False)
    assert [row for batch in batches for row in batch] == list(range(20))
    neighbours = [f"source-{n // 2}" for n in range(20)]
    batches = epoch_order(neighbours, batch_size=3, shuffle=False)
    assert batches == [[n, n + 1] for n in range(0, 20, 2)]


def test_batches_do_not_depend_on_micro_batches() -> None:
    """Finds an execution detail that changes what an update sees."""
    rows = make_rows(40)

    def contents(**options: int | bool) -> list[list[int]]:
        plan = plan_steps(rows, batch_size=8, epochs=2, seed=5, **options)
        return [sorted(row for part in step for row in part.rows) for step in plan.steps]

    expected = contents()
    assert contents(micro_batch_tokens=1) == expected
    assert contents(micro_batch_tokens=10**6) == expected
    assert contents(share_prompts=False) == expected
    assert contents(max_shapes=2) == expected


def test_a_plan_is_a_function_of_its_arguments() -> None:
    """Finds an order that depends on hashing, and a longer run that begins differently."""
    rows = make_rows(40, ks=(2, 3))
    plan = plan_steps(rows, batch_size=8, iters=20, seed=1)
    assert plan == plan_steps(list(rows), batch_size=8, iters=20, seed=1)
    longer = plan_steps(rows, batch_size=8, iters=40, seed=1)
    for short, long in zip(plan.steps, longer.steps, strict=False):
        assert sorted(r for part in short for r in part.rows) == sorted(r for part in long for r in part.rows)


@pytest.mark.parametrize(
    ("iters", "epochs", "expected"),
    [(None, None, 10), (None, 2.5, 25), (7, None, 7), (23, None, 23), (0, None, 0), (None, 0.01, 1)],
)
def test_a_run_is_as_long_as_asked(iters: int | None, epochs: float | None, expected: int) -> None:
    """Finds runs one step short, or an epoch too long."""
    rows = make_rows(20)
    plan = plan_steps(rows, batch_size=4, iters=iters, epochs=epochs)
    assert len(plan.steps) == len(plan.epochs) == expected
    if expected:
        assert plan.epochs[-1] == pytest.approx(expected * 4 / 40)


@pytest.mark.parametrize("max_shapes", [1, 2, 8, 64])
def test_shapes_are_few_and_each_fits(max_shapes: int) -> None:
    """Finds shapes beyond the promise: each one is traced, compiled, and never freed."""
    rows = make_rows(150, longest=400)
    for plan in (
        plan_steps(rows, batch_size=5, epochs=2, max_shapes=max_shapes),
        plan_pass(rows, max_shapes=max_shapes),
    ):
        used = {part.shape for step in plan.steps for part in step}
        assert used == set(plan.shapes) and len(used) <= max_shapes
        assert all(list(shape.rows) == sorted(shape.rows, reverse=True) for shape in used)
        for step in plan.steps:
            collate_step(rows, step)  # raises where a shape does not fit


def test_short_runs_compile_little() -> None:
    """Finds 64 compilations for a run that is over before they have paid."""
    plan = plan_steps(make_rows(50, longest=60), batch_size=4, iters=20)
    assert len(plan.shapes) <= 8


def test_padding_stays_within_reason() -> None:
    """Finds a plan that gives the gain of shared prompts back as padding."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(1000):
        lengths = np.clip(rng.lognormal([5, 5.4, 5.4], 0.7), 4, 512).astype(int)
        prompt, first, second = (np.ones(length, np.int32) for length in lengths)
        rows += [Tokenized(prompt, (first, second), str(n)), Tokenized(prompt, (second, first), str(n))]
    shared = plan_steps(rows, batch_size=8)
    whole = plan_steps(rows, batch_size=8, share_prompts=False)
    assert shared.tokens == whole.tokens == sum(row.n_tokens for row in rows)
    assert shared.padding < 0.2
    assert shared.slots < 0.9 * whole.slots


@pytest.mark.parametrize("seed", range(4))
def test_no_row_is_longer_than_the_longest_example(seed: int) -> None:
    """Finds pads beyond the positions a model has: reading there gives garbage, or NaN."""
    rows = make_rows(40, seed=seed, longest=300)
    longest = max(len(row.prompt_ids) + len(ids) - 1 for row in rows for ids in row.response_ids)
    for plan in (plan_steps(rows, batch_size=4, max_shapes=5), plan_pass(rows, max_shapes=3)):
        assert max(shape.prompt + shape.rows[0] for shape in plan.shapes) == longest


def test_the_budget_bounds_micro_batches() -> None:
    """Finds micro-batches that outgrow memory: only single examples and a little merging may pass it."""
    rows = make_rows(300, longest=100)
    for plan in (
        plan_steps(rows, batch_size=32, micro_batch_tokens=2000),
        plan_pass(rows, micro_batch_tokens=2000),
    ):
        assert all(shape.slots <= 2000 * 1.1 for shape in plan.shapes if shape.n > 1)
        assert max(shape.n for shape in plan.shapes) > 4


def test_mixed_list_lengths_never_share_a_micro_batch() -> None:
    """Finds a pair laid out in a shape for lists."""
    rows = make_rows(60, ks=(2, 3, 4, 5, 6))
    plan = plan_steps(rows, batch_size=8, max_shapes=5)
    for step in plan.steps:
        for part in step:
            assert {len(rows[row].response_ids) for row in part.rows} == {part.shape.responses}
    with pytest.raises(DataError, match="max_shapes is 4"):
        plan_steps(rows, batch_size=8, max_shapes=4)


def test_merging_only_ever_adds_room() -> None:
    """Finds a merged shape that shares more of a prompt than one of its prompts has."""
    rng = np.random.default_rng(0)
    needs = [
        Shape(
            n=int(rng.choice([1, 2])),
            prompt=int(rng.choice([0, 8, 64, 128])),
            rows=tuple(sorted((int(v) for v in rng.choice(LENGTHS[:40], 3)), reverse=True)),
            scored=int(rng.integers(1, 20)) * 64,
            responses=3,
        )
        for _ in range(2000)
    ]
    merged = merge_shapes(needs, max_shapes=10, max_slots=10**9)
    assert len(set(merged)) <= 10
    for need, shape in zip(needs, merged, strict=True):
        assert (shape.n, shape.responses) == (need.n, need.responses)
        assert shape.prompt <= need.prompt and shape.scored >= need.scored
        for mine, theirs in zip(shape.rows, need.rows, strict=True):
            assert shape.prompt + mine >= need.prompt + theirs
        assert shape.fits(need)
    assert not merged[0].fits(replace(needs[0], scored=10**6))


def test_the_ladder() -> None:
    """Finds a floor above, a ceiling below, or steps too coarse to be cheap."""
    for n in range(1, 3000):
        assert floor_length(n) <= n <= ceil_length(n)
        assert ceil_length(n) - n < max(8, n / 8)
        assert n <= ceil_scored(n) < n + max(64, n / 4) and ceil_scored(n) % 64 == 0
    assert floor_length(7) == 0 and floor_length(8) == 8


@pytest.mark.parametrize(
    "options", [{"iters": 1, "epochs": 1.0}, {"batch_size": 0}, {"iters": -1}, {"epochs": float("nan")}]
)
def test_contradictions_are_refused(options: dict[str, float]) -> None:
    """Finds a knob that silently wins over another."""
    with pytest.raises(ConfigError):
        plan_steps(make_rows(2), **{"batch_size": 2, **options})


def test_no_data_is_an_error() -> None:
    """Finds a run of no steps over no data that calls itself trained."""
    with pytest.raises(DataError, match="no example is left"):
        plan_steps([], batch_size=2)
    assert plan_pass([]).steps == ()


@pytest.mark.slow
def test_planning_a_large_run_is_quick() -> None:
    """Finds a quadratic planner: 60,000 examples take a second or two."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(30_000):
        lengths = np.clip(rng.lognormal([5, 5.4, 5.4], 0.7), 4, 512).astype(int)
        prompt, first, second = (np.empty(length, np.int32) for length in lengths)
        rows += [Tokenized(prompt, (first, second), str(n)), Tokenized(prompt, (second, first), str(n))]
    start = time.perf_counter()
    plan = plan_steps(rows, batch_size=16)
    assert time.perf_counter() - start < 20
    assert len(plan.shapes) <= 128
