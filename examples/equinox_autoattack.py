"""AutoAttack on an Equinox model.

    pip install equinox
    python equinox_autoattack.py

An attack takes any function from images in [0, 1] to logits: bring your own model.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from samrobust.attacks import autoattack, linf, pgd
from samrobust.data import load_dataset


class CNN(eqx.Module):
    """A small network of one image; Equinox wants channels first."""

    conv: eqx.nn.Conv2d
    dense: eqx.nn.Linear

    def __init__(self, key):
        conv_key, dense_key = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 16, 3, padding=1, key=conv_key)
        self.dense = eqx.nn.Linear(8 * 8 * 16, 10, key=dense_key)

    def __call__(self, image):
        hidden = jax.nn.relu(self.conv(jnp.moveaxis(image, -1, 0)))
        return self.dense(hidden.ravel())


def train(model, images, labels, steps):
    """Returns the model after full-batch steps of Adam."""
    tx = optax.adam(3e-3)

    @eqx.filter_jit
    def step(model, opt_state):
        def loss_fn(model):
            logits = jax.vmap(model)(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        updates, opt_state = tx.update(eqx.filter_grad(loss_fn)(model), opt_state)
        return eqx.apply_updates(model, updates), opt_state

    opt_state = tx.init(eqx.filter(model, eqx.is_array))
    for _ in range(steps):
        model, opt_state = step(model, opt_state)
    return model


@eqx.filter_jit  # compiled once, for all weights of this model
def accuracy(model, images, labels, attack, key):
    """Returns the share of images that are still right under the attack."""
    # With a state, as of BatchNorm: jax.vmap(lambda image: model(image, state)[0]).
    logits_fn = jax.vmap(eqx.nn.inference_mode(model))
    broken = attack(logits_fn, images, labels, key=key) if attack else images
    return jnp.mean(logits_fn(broken).argmax(1) == labels)


def main(steps=200, num_images=200, epsilon=16 / 255):
    data = load_dataset("digits", test_size=num_images)
    images, labels = jnp.float32(data.train.images / 255), data.train.labels
    model = train(CNN(jax.random.key(0)), images, labels, steps)
    images, labels = jnp.float32(data.test.images / 255), data.test.labels
    attacks = {
        "natural": None,
        "PGD": pgd(linf(epsilon), step_size=epsilon / 4, num_steps=10),
        "AutoAttack": autoattack(linf(epsilon)),
    }
    for name, attack in attacks.items():
        found = accuracy(model, images, labels, attack, jax.random.key(1))
        print(f"{name:>10}: {found:.1%}")


if __name__ == "__main__":
    main()
