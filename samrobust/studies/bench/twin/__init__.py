"""The paper's training step in PyTorch, and the same step as fast as PyTorch has it.

Shares the stopwatch, the form of messages and the network of RobustBench's bundles,
which is PyTorch's alone, with samrobust and nothing else, and loads no JAX, so that
neither its answers nor its time and memory depend on what they are compared with.
PyTorch is no dependency: without it the modules here cannot be imported.
"""

__all__ = []
