"""The checks on the network itself: gradients, randomness."""

import numpy as np

from samrobust.evaluation import check_finite
from samrobust.sanity import network_verdicts
from samrobust.sanity.finding import Finding
from samrobust.sanity.look import Look
from samrobust.sanity.network import measure_gradients, measure_logits

__all__ = ["NUM_NETWORK_MEASURES", "network_findings"]

NUM_NETWORK_MEASURES = 3


def network_findings(look: Look) -> list[Finding]:
    """Whether there are gradients to follow, and whether two passes agree.

    Raises:
      ValueError: if the logits are not finite: there is nothing to check.
    """
    first, second = (look.measure(measure_logits(look.model)) for _ in range(2))
    check_finite(int(np.sum(~first["finite"])), len(first["finite"]))
    gradients = look.measure(measure_gradients(look.model))
    return [
        network_verdicts.judge_gradients(
            gradients["correct"],
            gradients["zero"],
            gradients["zero_margin"],
            gradients["saturated"],
        ),
        network_verdicts.judge_randomness(first["logits"], second["logits"]),
    ]
