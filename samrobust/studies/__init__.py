"""What is studied with the package: the theory of its paper, speed, the authors' code.

Nothing but the command line imports a study.
"""

__all__ = []
