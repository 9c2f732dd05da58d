"""The adversarial training family: what holds whatever the network is."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.experiments import building, methods
from samrobust.training import Method, fit
from samrobust.training.adversaries.free import free
from samrobust.training.state import TrainState

KEY = jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    with helpers.quick_compilation():
        yield


def record(num_steps: int) -> Method:
    """A training that notes what each step is given, and learns nothing."""

    def init(key, images):
        del key, images
        notes = {"pixels": jnp.zeros([num_steps]), "draws": jnp.zeros([num_steps])}
        return TrainState(jnp.zeros([], jnp.int32), notes, {}, (), ())

    def step(state, images, labels, key):
        del labels
        # Other pixels, or the same ones at other places, have another sum.
        places = jnp.arange(images.size, dtype=jnp.float32).reshape(images.shape)
        noted = {"pixels": jnp.sum(images * places), "draws": jax.random.uniform(key)}
        notes = jax.tree.map(lambda n, x: n.at[state.step].set(x), state.params, noted)
        state = TrainState(state.step + 1, notes, {}, (), ())
        return state, {"loss": jnp.zeros([]), "accuracy": jnp.zeros([])}

    return Method(init, step)


def noted(replays: int, epochs: int) -> dict[str, np.ndarray]:
    options = {"epochs": epochs, "batch_size": 4, "key": KEY, "padding": 2}
    split = helpers.make_split(8)
    outcome = fit(record(2 * epochs), split, **options, flip=True, replays=replays)
    return {name: np.asarray(note) for name, note in outcome.state.params.items()}


def test_a_batch_is_replayed_with_the_same_crop_and_other_random_numbers():
    plain, replayed = noted(1, epochs=2), noted(3, epochs=4)
    assert len(set(plain["pixels"])) == 4
    # The data of the first epoch in the steps of three, and two of the second's.
    expected = np.repeat(plain["pixels"], 3)[:8]
    np.testing.assert_array_equal(replayed["pixels"], expected)
    assert len(set(replayed["draws"])) == 8
    np.testing.assert_array_equal(replayed["draws"][:4], plain["draws"])


def test_incomplete_batches_are_not_replayed():
    message = r"training\.drop_remainder with replays, got .*False, replays=3"
    config = helpers.make_config("free,eps=16,m=3", {"training.drop_remainder": False})
    with pytest.raises(ValueError, match=message):
        building.make_plan(config, 33)
    assert building.make_plan(config, 64).replays == 3
    assert methods.replays(helpers.make_config("sam,rho=0.1")) == 1


def test_free_perturbations_stay_in_ball_and_box_and_belong_to_places():
    adversary, radius = free(64.0), np.float32(64 / 255)
    state = adversary.init(jnp.zeros([4, 2, 2, 1]))
    images = jnp.linspace(0, 1, 12).reshape(3, 2, 2, 1)
    labels, correct = jnp.zeros(3, jnp.int32), jnp.zeros(3, bool)
    for number in range(3):
        moved, state = adversary.perturb(
            lambda x: x.reshape(3, -1), images, labels, state, key=KEY
        )
        assert float(jnp.min(moved)) >= 0
        assert float(jnp.max(moved)) <= 1
        slope = jax.random.normal(jax.random.key(number), images.shape)
        assert adversary.learn is not None
        state = adversary.learn(state, moved, labels, slope, correct)
        assert 0 < float(jnp.max(jnp.abs(state))) <= radius
        images = jnp.flip(images)
    np.testing.assert_array_equal(state[3], 0.0)  # of no example so far
