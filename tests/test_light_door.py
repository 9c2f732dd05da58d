"""Attacks want JAX and NumPy alone, SAM optax beside them: `pip install --no-deps`."""

import subprocess
import sys
import textwrap
import tomllib

import helpers
import pytest

# Of distributions, the packages to import where these have other names.
_IMPORTED: dict[str, str] = {
    **{"absl-py": "absl", "ml-collections": "ml_collections", "pillow": "PIL"},
    **{"orbax-checkpoint": "orbax", "tensorflow-datasets": "tensorflow_datasets"},
    **{"array-record": "array_record", "importlib-resources": "importlib_resources"},
}
# What JAX and optax themselves want.
_THERE = {"jax", "numpy", "optax", "scipy", "absl-py"}


def others():
    """The packages that the whole of samrobust wants, and its two libraries do not."""
    project = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text())["project"]
    wanted: list[str] = project["dependencies"]
    names = {name.partition(">")[0] for name in wanted} - _THERE
    assert {"flax", "ml-collections", "orbax-checkpoint", "rich"} <= names
    return sorted(_IMPORTED.get(name, name) for name in names)


USES = {
    "attacks": """
        import jax, jax.numpy as jnp, samrobust
        noise = samrobust.attacks.noise  # before another name has imported the package
        from samrobust import autoattack, l2, linf, pgd
        images, labels = jnp.full([4, 4, 4, 1], 0.5), jnp.arange(4)
        logits_fn = lambda images: images.reshape(len(images), -1)[:, :10]
        strong = autoattack(l2(0.5), version="custom", members=["apgd-ce", "square"])
        step = pgd(linf(0.1), step_size=0.05, num_steps=2)
        for attack in (noise(linf(0.1)), step, strong):
            moved = attack(logits_fn, images, labels, key=jax.random.key(0)) - images
            assert jnp.abs(moved).max() > 0
    """,
    "sharpness": """
        import jax, jax.numpy as jnp, optax
        from samrobust import asam, gsam, sam
        w, grad_fn = jnp.ones(3), jax.grad(lambda w: jnp.sum(w**4))
        for sharpness in (sam(0.1), asam(0.1), gsam(0.1)):
            tx = optax.chain(sharpness, optax.sgd(0.1))
            moved, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
            assert jnp.all(moved < 0)
    """,
}


@pytest.mark.parametrize("library", USES)
def test_a_library_works_where_nothing_else_can_be_imported(library):
    hidden = others() + ["optax"] * (library == "attacks")
    script = f"import sys\nsys.modules |= dict.fromkeys({hidden})\n"
    script += textwrap.dedent(USES[library])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=helpers.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
