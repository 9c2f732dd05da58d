"""The paper's training step in PyTorch, and the same step as fast as PyTorch has it.

Shares the stopwatch and the form of messages with samrobust and nothing else, and loads
no JAX, so that neither its answers nor its time and memory depend on what they are
compared with. PyTorch is no dependency: without it the modules here cannot be imported.
"""

__all__ = []
