"""Learning rate as a function of the step."""

import math


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, final: float) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine down to `final`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * progress))
