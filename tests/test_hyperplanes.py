"""Steps onto hyperplanes within a box: linear programs, duals, and the edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from samrobust.attacks import l2, linf, step_onto_hyperplane

BALLS = {"linf": (linf, np.inf), "l2": (l2, 2)}
SCALES = [1e-20, 1e-9, 1.0, 1e15]


def problem(size=12, num=64, seed=0):
    """Points on the box's faces among them, zero weights, planes the box may miss."""
    rng = np.random.default_rng(seed)
    points = np.clip(rng.uniform(-0.2, 1.2, (num, size)), 0, 1)
    normal = rng.standard_normal((num, size)) * (rng.uniform(size=(num, size)) > 0.2)
    normal *= 10 ** rng.uniform(-2, 0, (num, size))
    # From the nearest pixels to planes a third beyond what the box reaches.
    side = np.where(rng.uniform(size=num) > 0.5, 1.0, -1.0)
    room = reachable(points, normal, side)
    excess = side * room * rng.uniform(0.01, 1.3, num)
    return [array.astype(np.float32) for array in (points, normal, excess)]


def reachable(points, normal, side):
    """How much of an excess of this sign the box lets a step take away."""
    downhill = normal * side[:, None]
    gain = np.where(downhill > 0, downhill * points, downhill * (points - 1))
    return gain.sum(axis=1)


def steps(ball, points, normal, excess, box=(0.0, 1.0)):
    return np.asarray(compiled(ball, box)(points, normal, excess), np.float64)


@functools.cache
def compiled(ball, box):
    unit = BALLS[ball][0](1.0)
    return jax.jit(lambda *arrays: step_onto_hyperplane(unit, *arrays, box=box))


def smallest_linf(point, normal, excess):
    """The l-inf norm of the best step by a linear program over (d, t)."""
    size = len(point)
    identity, ones = np.eye(size), np.ones((size, 1))
    result = optimize.linprog(
        np.r_[np.zeros(size), 1],
        A_ub=np.r_[np.c_[identity, -ones], np.c_[-identity, -ones]],
        b_ub=np.zeros(2 * size),
        A_eq=np.r_[normal, 0][None],
        b_eq=[-excess],
        bounds=[*zip(-point, 1 - point, strict=True), (0, None)],
    )
    assert result.success
    return result.fun


def smallest_l2(point, normal, excess):
    """The l2 norm of the best step, by the root of the dual function's derivative."""

    def at(multiplier):
        return np.clip(-multiplier * normal, -point, 1 - point)

    edge = 1e3 / np.abs(normal[normal != 0]).min()
    root = optimize.brentq(lambda m: normal @ at(m) + excess, -edge, edge, xtol=1e-14)
    return np.linalg.norm(at(root))


SMALLEST = {"linf": smallest_linf, "l2": smallest_l2}


@pytest.mark.parametrize("ball", BALLS)
def test_the_step_is_the_smallest_that_reaches_the_plane_within_the_box(ball):
    points, normal, excess = (array.astype(np.float64) for array in problem())
    found = steps(ball, *problem())
    feasible = np.abs(excess) < reachable(points, normal, np.sign(excess)) - 1e-4
    assert 20 < feasible.sum() < 60
    on_plane = np.einsum("bi,bi->b", normal, found) + excess
    np.testing.assert_allclose(on_plane[feasible], 0, atol=1e-6)
    moved = points + found
    assert np.min(moved) >= -1e-7
    assert np.max(moved) <= 1 + 1e-7
    for i in np.flatnonzero(feasible):
        best = SMALLEST[ball](points[i], normal[i], excess[i])
        length = np.linalg.norm(found[i], BALLS[ball][1])
        np.testing.assert_allclose(length, best, rtol=2e-5)


@pytest.mark.parametrize("ball", BALLS)
def test_where_the_box_misses_the_plane_every_pixel_goes_as_near_as_it_can(ball):
    points, normal, excess = problem()
    missed = np.abs(excess) > reachable(points, normal, np.sign(excess)) + 1e-4
    assert missed.sum() > 5
    moved = points + steps(ball, points, normal, excess)
    nearest = np.where(normal * np.sign(excess)[:, None] > 0, 0.0, 1.0)
    expected = np.where(normal == 0, points, nearest)
    np.testing.assert_allclose(moved[missed], expected[missed], atol=1e-7)


@pytest.mark.parametrize("ball", BALLS)
def test_pixels_of_no_weight_and_planes_of_no_excess_stay(ball):
    points, normal, excess = problem()
    assert not np.any(steps(ball, points, normal, excess)[normal == 0])
    assert not np.any(steps(ball, points, 0 * normal, excess))
    assert not np.any(steps(ball, points, normal, 0 * excess))


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_of_the_plane_does_not_matter(ball, scale):
    points, normal, excess = problem()
    scaled = np.float32(scale)
    np.testing.assert_allclose(
        steps(ball, points, normal * scaled, excess * scaled),
        steps(ball, points, normal, excess),
        atol=2e-6,
    )


@pytest.mark.parametrize("ball", BALLS)
def test_the_step_to_either_side_of_the_plane_mirrors_the_other(ball):
    points, normal, excess = problem()
    mirrored = steps(ball, 1 - points, -normal, excess)
    np.testing.assert_allclose(
        mirrored, -steps(ball, points, normal, excess), atol=2e-6
    )
    np.testing.assert_array_equal(
        steps(ball, points, -normal, -excess), steps(ball, points, normal, excess)
    )


@pytest.mark.parametrize("ball", BALLS)
def test_an_example_does_not_depend_on_its_batch_nor_on_its_shape(ball):
    points, normal, excess = problem(num=6)
    whole = steps(ball, points, normal, excess)
    alone = [steps(ball, *(a[i : i + 1] for a in problem(num=6))) for i in range(6)]
    np.testing.assert_allclose(np.concatenate(alone), whole, atol=1e-7)
    shaped = steps(ball, points.reshape(6, 2, 2, 3), normal.reshape(6, 2, 2, 3), excess)
    np.testing.assert_allclose(shaped.reshape(6, 12), whole, atol=1e-7)


@pytest.mark.parametrize("ball", BALLS)
def test_what_is_not_finite_spoils_neither_its_example_nor_the_others(ball):
    points, normal, excess = problem(num=6)
    expected = steps(ball, points, normal, excess)
    normal[1, 3], excess[2], excess[4] = np.nan, np.nan, np.inf
    found = steps(ball, points, normal, excess)
    assert np.all(np.isfinite(found))
    assert not np.any(found[2])
    np.testing.assert_allclose(found[[0, 3, 5]], expected[[0, 3, 5]], atol=1e-7)


@pytest.mark.parametrize("ball", BALLS)
def test_the_step_lies_on_the_plane_in_many_dimensions_and_another_box(ball):
    rng = np.random.default_rng(1)
    points = rng.uniform(-1, 1, (4, 3072)).astype(np.float32)
    normal = rng.standard_normal((4, 3072)).astype(np.float32)
    excess = np.array([0.1, -10.0, 500.0, -1500.0], np.float32)
    found = steps(ball, points, normal, excess, box=(-1.0, 1.0))
    gained = np.einsum("bi,bi->b", normal.astype(np.float64), found)
    np.testing.assert_allclose(gained, -excess, rtol=1e-5)
    assert np.abs(points + found).max() <= 1 + 1e-6


def test_a_weight_that_underflows_in_the_direction_moves_no_pixel_to_nan():
    """Where the box misses the plane, the common length is infinite: times 0 NaN."""
    tiny = float(np.finfo(np.float32).tiny)
    points, normal = jnp.full([1, 3], 0.5), jnp.array([[1.0, 1.0, tiny]])
    step = step_onto_hyperplane(l2(1.0), points, normal, jnp.array([10.0]))
    np.testing.assert_array_equal(step, [[-0.5, -0.5, 0]])
