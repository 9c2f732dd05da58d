"""Training image classifiers that hold up under attack, in JAX and Flax.

Standard training, sharpness-aware minimisation and PGD adversarial training, their
combinations, and the honest measurement of what they are worth. `samrobust.attacks`
and `samrobust.sharpness` are libraries of their own: they work in any JAX program.
"""

__version__ = "0.1.0"
