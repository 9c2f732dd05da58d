"""SAM in a Flax NNX training loop, with BatchNorm: python nnx_sam.py.

`sam` is a transformation of optax: it comes first in the chain and is given `grad_fn`,
the gradient on this step's batch as a function of the parameters.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from samrobust.attacks import linf, pgd
from samrobust.data import load_dataset
from samrobust.sharpness import last_metrics, sam


class CNN(nnx.Module):
    """A small network; normalize inside, so that attacks see pixels in [0, 1]."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dense = nnx.Linear(8 * 8 * 32, 10, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.relu(self.norm(self.conv(images)))
        return self.dense(hidden.reshape(len(images), -1))


def loss_fn(model, images, labels):
    """Returns the mean loss, and moves BatchNorm's running statistics."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def step(model, optimizer, images, labels):
    """Trains on a batch."""

    def grad_fn(params):  # of a copy: the second pass leaves the statistics alone
        moved = nnx.clone(model)
        nnx.update(moved, params)
        return nnx.as_pure(nnx.grad(loss_fn)(moved, images, labels))

    grads = nnx.grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads, grad_fn=grad_fn)


def main(rho, epochs=10, batch_size=64):
    """Trains on 8 x 8 digits; prints natural and robust accuracy."""
    data = load_dataset("digits")
    images, labels = data.train.images / 255.0, data.train.labels
    model = CNN(nnx.Rngs(0))
    tx = optax.chain(sam(rho), optax.sgd(0.05, momentum=0.9))  # sam comes first
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    num_batches = len(images) // batch_size
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.key(epoch), len(images))
        order = order[: num_batches * batch_size]
        for batch in order.reshape(num_batches, batch_size):
            step(model, optimizer, images[batch], labels[batch])
    print(f"SAM, rho = {rho}" if rho else "standard training")
    for name, value in last_metrics(optimizer.opt_state).items():  # of the last step
        print(f"  {name}: {value[...]:.3f}")

    model.eval()  # BatchNorm by its running statistics
    images, labels = jnp.float32(data.test.images / 255), data.test.labels
    attack = pgd(linf(16 / 255), step_size=4 / 255, num_steps=10)
    attack = jax.jit(attack, static_argnums=0)
    broken = attack(model, images, labels, key=jax.random.key(0))
    for name, shown in (("natural", images), ("PGD", broken)):
        accuracy = (model(shown).argmax(1) == labels).mean()
        print(f"  {name} accuracy: {accuracy:.1%}")


if __name__ == "__main__":
    for rho in (0.0, 0.1):  # standard training, SAM
        main(rho)
