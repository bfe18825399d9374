"""The rule of --skip-limit: when skipped steps end a run.

A step whose loss or gradient is not finite is skipped: it does not change the weights (optim.py). One such step is an
accident; many in a row mean that the run is broken and needs a person to mend it.
"""

import math

from gpt2fast.errors import RunError
from gpt2fast.training.session import Session
from gpt2fast.weights import checkpoint

SCALE_FLOOR = 1.0  # at this loss scale or below it, an fp16 gradient that overflows does so without scaling


def is_skipped(loss: float, norm: float) -> bool:
    """Return whether a step with this loss and gradient norm does not change the weights."""
    return not (math.isfinite(loss) and math.isfinite(norm))


class SkipLimit:
    """The count of skipped steps, `in_a_row`, up to the newest step."""

    def __init__(self, s: Session):
        self.s, self.in_a_row = s, 0

    def check(self, row: dict) -> None:
        """Count the step of a metrics row. RunError if it is the last that --skip-limit allows to be skipped."""
        step, loss, norm, limit = row["step"], row["loss"], row["grad_norm"], self.s.config.skip_limit
        if not is_skipped(loss, norm):
            self.in_a_row = 0
            return
        if math.isfinite(loss) and self.s.take_step.scaler.get_scale() > SCALE_FLOOR:
            return  # this is how GradScaler finds its scale
        self.in_a_row += 1
        if self.in_a_row >= limit:
            first = step - limit + 1
            kept = [path for saved, path in checkpoint.list_checkpoints(self.s.checkpoints) if saved < first]
            good = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint from before"
            raise RunError(
                f"step {step}: loss {loss}, norm {norm}: --skip-limit {limit} steps in a row were skipped; {good}; "
                "try a lower --lr, a longer --warmup or --precision fp32"
            )
