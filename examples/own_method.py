"""A method, a network and an augmentation of your own, trained like the package's.

    samrobust table --config=digits --seeds=1 --config.training.epochs=5 \
        --config.model.name=own_method:MLP --workdir=runs/own \
        --config.data.augmentation=own_method:cutout \
        '--rows=st;own_method:smoothed,share=0.1;own_method:noisy,std=0.1+sam,rho=0.2'

in the folder of this file. Each function up to the network is another kind of part;
join them by `+` with each other and with the package's own. docs/own.md explains them.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from samrobust.sharpness import two_pass
from samrobust.training import Adversary, Averaging, Objective


def smoothed(share: float) -> Objective:
    """Label smoothing: an objective, a loss [B] of logits [B, K] and labels [B]."""

    def loss(logits, labels):
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), share)
        return optax.softmax_cross_entropy(logits, targets)

    return Objective(loss, views=("adversarial",))


def signed(rho: float, *, aux=None, grouped=False) -> optax.GradientTransformation:
    """SAM in the l-inf norm: sharpness, from an ascent direction."""

    def ascend(grads, params, rho):
        return jax.tree.map(lambda g: rho * jnp.sign(g), grads)

    return two_pass(rho, ascend, aux=aux, grouped=grouped)


def noisy(std: float) -> Adversary:
    """Gaussian noise: an adversary without a memory."""

    def perturb(logits_fn, images, labels, state, *, key):
        noise = std * jax.random.normal(key, images.shape)
        return jnp.clip(images + noise, 0, 1), state

    return Adversary(perturb)


def tail(start: int) -> Averaging:
    """The mean of all weights from a step on."""

    def update(average, variables, step):
        share = 1 / jnp.maximum(step - start + 1, 1)
        return jax.tree.map(lambda a, w: a + share * (w - a), average, variables)

    return Averaging(init=lambda variables: variables, update=update)


class MLP(nn.Module):
    num_classes: int = 10
    hidden: int = 64

    @nn.compact
    def __call__(self, images, *, train):
        hidden = nn.relu(nn.Dense(self.hidden)(images.reshape(len(images), -1)))
        return nn.Dense(self.num_classes)(hidden)


def cutout(images, *, key, size=3):
    """Blackens a square at a random place of each image (DeVries and Taylor, 2017)."""

    def near(key, length):
        first = jax.random.randint(key, [len(images), 1], 0, length) - size // 2
        place = jnp.arange(length)
        return (first <= place) & (place < first + size)

    row_key, column_key = jax.random.split(key)
    rows, columns = near(row_key, images.shape[1]), near(column_key, images.shape[2])
    return jnp.where(rows[:, :, None, None] & columns[:, None, :, None], 0, images)
