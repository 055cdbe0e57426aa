"""Learning rate and batch size as functions of the step alone, so that a resumed run continues exactly (report, 2.4).

Steps count from 1 to `steps`, as people do.
"""

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    steps: int,
    kind: Literal["cosine", "wsd"] = "cosine",
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final_fraction: float = 0.1,
) -> float:
    """The part of the peak learning rate that `step` uses: in (0, 1], and `final_fraction` at the last step.

    Up to `warmup_steps` it rises linearly and reaches 1. Then:
        cosine: half a cosine from 1 down to `final_fraction`. GLM-4.5's choice: 2.5e-4 to 2.5e-5.
        wsd: warm-up, stable, decay: 1, and over the last `decay_steps` linearly down to `final_fraction`.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    if kind == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2
    progress = max(0.0, (step - (steps - decay_steps)) / max(1, decay_steps))
    return 1 - (1 - final_fraction) * progress


def micro_batches_at(step: int, full: int, first: int = 0, warmup_steps: int = 0) -> int:
    """Micro-batches that `step` is made of: from `first`, linearly with the step, to `full` from step `warmup_steps` on.

    Small batches teach more a token while the gradient is still coarse; GLM-4.5 grows its batch from 16M to 64M tokens
    over the first 500B.
    """
    if step >= warmup_steps:
        return full
    return first + (full - first) * (step - 1) // max(1, warmup_steps - 1)
