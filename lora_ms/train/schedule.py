"""Learning-rate schedules."""

import math


def learning_rate(
    step: int, total_steps: int, peak: float, kind: str = "cosine", warmup_steps: int = 0, end: float = 0.0
) -> float:
    """Learning rate of optimiser step ``step`` (from 0), as transformers' schedules have it.

    Rises linearly from 0 over ``warmup_steps``; then stays (``constant``) or falls from ``peak`` to ``end`` by
    ``total_steps``, linearly or along half a cosine.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if kind == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    left = 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return end + (peak - end) * left
