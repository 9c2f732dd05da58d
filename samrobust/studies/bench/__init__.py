"""Speed: how fast a training step, an epoch and an evaluation are, and against what.

This file loads no JAX, which `twin` does without.
"""

__all__ = []
