"""The loop over attacks in stages: each example once a stage, until it breaks."""

import itertools
from collections import Counter
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.evaluation.fates import Fates
from samrobust.evaluation.survivors import Stage, survivors

NUM_EXAMPLES, NUM_STAGES = 29, (3, 2)
# The stage that breaks an example, by column; beyond the last one none does.
BREAKS_AT = np.random.default_rng(0).integers(0, 5, (2, NUM_EXAMPLES))


def make_columns(passes: Counter) -> dict[str, list[Stage]]:
    """Stages that count which example went through which of them."""

    def make_stage(column: int, number: int) -> Stage:
        def run(indices):
            passes.update((column, number, i) for i in set(indices.tolist()))
            broken = BREAKS_AT[column][indices] == number
            images = np.full(len(indices), 10 * column + number)
            return jnp.asarray(images), jnp.asarray(broken), jnp.asarray(~broken)

        return Stage(f"stage {number}", 1.0, run)

    return {
        f"column {column}": [make_stage(column, number) for number in range(count)]
        for column, count in enumerate(NUM_STAGES)
    }


def fresh(columns: dict[str, list[Stage]]) -> dict[str, Fates]:
    return {
        name: Fates.fresh([stage.name for stage in stages], NUM_EXAMPLES)
        for name, stages in columns.items()
    }


def pursue(columns, fates, size, on_batch=lambda *_: None):
    """Attacks in all columns; yields batches with the number of their column."""
    chosen: Any = size if callable(size) else lambda *_: size
    rests = survivors(columns, fates, size=chosen, on_batch=on_batch)
    for number, (_, rest) in enumerate(rests):
        for batch in rest:
            yield number, batch


def broken_at(fates: dict[str, Fates]) -> np.ndarray:
    return np.stack([own.broken_at for own in fates.values()])


@pytest.mark.parametrize("size", [1, 8, lambda _, now: max(1, now // 3), 64])
def test_every_example_goes_through_each_stage_once_until_it_breaks(size):
    passes: Counter = Counter()
    columns = make_columns(passes)
    fates = fresh(columns)
    batches = list(pursue(columns, fates, size))
    expected = {
        (column, number, i)
        for column, count in enumerate(NUM_STAGES)
        for number, i in itertools.product(range(count), range(NUM_EXAMPLES))
        if number <= BREAKS_AT[column, i]
    }
    assert passes == dict.fromkeys(expected, 1)
    beyond = np.array(NUM_STAGES)[:, None] <= BREAKS_AT
    np.testing.assert_array_equal(broken_at(fates), np.where(beyond, -1, BREAKS_AT))
    for own, row in zip(fates.values(), beyond, strict=True):
        np.testing.assert_array_equal(own.non_finite, ~row)
        assert own.is_whole
        assert own.is_possible()
    for column, batch in batches:
        stage = int(batch.images[0]) - 10 * column
        np.testing.assert_array_equal(
            batch.broken, BREAKS_AT[column, batch.indices] == stage
        )


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 11])
def test_a_loop_that_is_cut_after_a_batch_goes_on_with_what_is_left(cut):
    """With batches of other sizes, so that nothing hangs on their borders."""
    passes: Counter = Counter()
    columns = make_columns(passes)
    fates = fresh(columns)
    assert len(list(itertools.islice(pursue(columns, fates, 4), cut))) == cut
    assert all(own.is_possible() for own in fates.values())
    assert not all(own.is_whole for own in fates.values())
    list(pursue(columns, fates, 5))
    whole = fresh(columns)
    assert set(passes.values()) == {1}
    list(pursue(columns, whole, 8))
    np.testing.assert_array_equal(broken_at(fates), broken_at(whole))


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 6])
def test_the_size_depends_on_what_a_member_and_a_stage_begin_with_alone(cut):
    """However far the stage was when the loop was cut."""
    columns, asked = make_columns(Counter()), []
    members = {"column 0": ["one", "two", "two"], "column 1": ["one", "one"]}
    fates = {name: Fates.fresh(each, NUM_EXAMPLES) for name, each in members.items()}

    def size(*counts):
        asked.append(counts)
        return 7

    list(itertools.islice(pursue(columns, fates, size), cut))
    list(pursue(columns, fates, size))
    left = {  # how many go through a stage
        (column, number): int(np.sum(number <= BREAKS_AT[column]))
        for column, count in enumerate(NUM_STAGES)
        for number in range(count)
    }
    firsts = {(0, 0): 0, (0, 1): 1, (0, 2): 1, (1, 0): 0, (1, 1): 0}
    expected = [(left[place[0], first], left[place]) for place, first in firsts.items()]
    assert list(dict.fromkeys(asked)) == list(dict.fromkeys(expected))


def test_the_work_that_is_told_rises_to_all_but_the_last_example():
    columns, told = make_columns(Counter()), []
    list(pursue(columns, fresh(columns), 8, lambda *report: told.append(report)))
    shares = [done for done, *_ in told]
    assert shares == sorted(shares)
    assert {total for _, total, _ in told} == {NUM_EXAMPLES}
    assert shares[-1] == NUM_EXAMPLES - 1  # that all is done the caller says
    standing = np.sum(BREAKS_AT[0] >= 1)
    lines = [line for *_, line in told]
    assert f"column 0: stage 0, {standing} of 29 images survive" in lines


def test_what_is_left_out_as_wrong_before_the_attack_was_not_broken_by_it():
    fates = Fates.fresh(["one"], 3)
    fates.broken_at[:2], fates.non_finite[:2] = 0, True
    fates.leave_out(np.array([True, False, False]))
    assert fates.broken_by().tolist() == ["natural", "one", ""]
    assert fates.num_non_finite == 1
    assert fates.is_possible()
