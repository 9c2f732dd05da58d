"""From a config to a finished table: methods by name, runs, their folders, reports.

The only room that turns configs into objects. It has no public face of its own, so that
what reads the state of runs need not wait for JAX: import the module that is meant.
"""

__all__ = []
