"""The rule of --skip-limit: when steps that were left out end a run.

A step whose loss or gradient is not finite is left out of the weights (optim.py). One is an accident; many in a row
mean that the run is broken, and the remedy is a person's.
"""

import math

from gpt2fast.errors import RunError
from gpt2fast.training.session import Session
from gpt2fast.weights import checkpoint

SCALE_FLOOR = 1.0  # of fp16's loss: a gradient that overflows there overflows by itself


def is_skipped(loss: float, norm: float) -> bool:
    return not (math.isfinite(loss) and math.isfinite(norm))


class SkipLimit:
    """Call it with the metrics row of each step. `in_a_row` counts the newest steps that were left out."""

    def __init__(self, s: Session):
        self.s, self.in_a_row = s, 0

    def check(self, row: dict) -> None:
        """RunError if the step is one too many that was left out."""
        step, loss, norm, limit = row["step"], row["loss"], row["grad_norm"], self.s.config.skip_limit
        if not is_skipped(loss, norm):
            self.in_a_row = 0
            return
        if math.isfinite(loss) and self.s.take_step.scaler.get_scale() > SCALE_FLOOR:
            return  # how fp16 finds its loss scale
        self.in_a_row += 1
        if self.in_a_row >= limit:
            first = step - limit + 1
            kept = [path for saved, path in checkpoint.list_checkpoints(self.s.checkpoints) if saved < first]
            good = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint from before"
            raise RunError(
                f"step {step}: loss {loss}, norm {norm}: --skip-limit {limit} steps in a row were left out; {good}; "
                "try a lower --lr, a longer --warmup or --precision fp32"
            )
