"""Why a network is robust: flatness, confidence and margin of finished runs.

`samrobust sharpness` measures all finished runs of a table (`probe`), and holds the
measures against robust accuracy (`findings`); docs/flatness.md explains it. The
measures themselves are functions of `samrobust.sharpness.measures` and
`samrobust.attacks.margins`.
"""

__all__ = []
