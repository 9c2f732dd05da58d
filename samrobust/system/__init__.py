"""The machine under a run: files, processes, devices, and what ran on them.

A room without a public face of its own: import the module that is meant. Only
`distributed` and parts of `runtime` and `provenance` load JAX.
"""

__all__ = []
