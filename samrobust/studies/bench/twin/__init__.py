"""The paper's training step in PyTorch, and the same step as fast as PyTorch has it.

Imports nothing else of samrobust and no JAX, so that neither its answers nor its time
and memory depend on what they are compared with. PyTorch is no dependency: without it
the modules here cannot be imported, but for `spec`.
"""

__all__ = []
