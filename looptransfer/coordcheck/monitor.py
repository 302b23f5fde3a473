"""A training run that is watched: what every visit of every branch adds to the stream, every so many steps."""

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from looptransfer.checks import is_count
from looptransfer.coordcheck.observe import Observation, find_branches, observe
from looptransfer.errors import InputError, ScalingWarning
from looptransfer.rewrite.forward import ExampleInputs
from looptransfer.rewrite.insert import has_multiplier
from looptransfer.rewrite.plan import planned

EVERY = 200  # steps; a measurement takes less than two, where the inputs are a sequence or two
# A statistic of a visit -> how it is logged.
NAMES = {"stream_rms": "stream_rms", "branch_rms": "increment_rms", "gradient_rms": "gradient_rms"}
ALIGNED = 0.75  # an exponent from here up is no random walk, which is ½


class Monitor:
    """Watches a rewritten model in training, by a forward of its own every `every` steps, and a backward with `loss`.

    `monitor(step)` returns numbers by name for any logger, and none between the measurements. For every visit from 1
    there is `BRANCH/stream_rms/VISIT`, the stream after the addition, and `BRANCH/increment_rms/VISIT`, what was added;
    with `loss` also `BRANCH/gradient_rms/VISIT`, the gradient of the loss with respect to that stream, which is that
    with respect to what was added as well. `alignment` is the mean cosine between the increments of the loops, and
    `exponent` the p in ‖Σ δ_n‖ ∝ N^p that it comes to: ½ where they point anywhere, 1 where all point the same way.
    Random state, buffers and the gradients of parameters stay as they are, and nothing that is seen ends the training.

    Args:
        model: rewritten; also inside DDP or compiled.
        example_inputs: what its forward takes; a sequence or two are enough, the same all the time.
        every: steps between measurements.
        loss: model output -> loss of `example_inputs` in nats, such as `lambda output: output.loss`.

    Raises:
        InputError: not rewritten, a random loop count, `every` is no whole number from 1, a loss without a gradient,
            or as `coord_check`.

    Warns:
        ScalingWarning: when called, once for each cause. A branch has lost its ε; the model no longer does what its
            plan says; what is added is not finite; or, under "sqrt", which makes up for √N, p is above 0.75. Under
            the rules with 1/N p ≤ 1 is made up for whatever it is, and "unscaled" promises nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        every: int = EVERY,
        loss: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not is_count(every):
            raise InputError(f"every is {every!r}; give a whole number of steps from 1 up")
        inner, self.plan = planned(model)
        if self.plan.random_loops:
            raise InputError("the loop count is random, so that visits cannot be compared; watch a model that keeps it")
        self.model, self.inputs, self.every, self.loss = model, example_inputs, every, loss
        self.branches = find_branches(inner, example_inputs, self.plan)
        if loss is not None:
            observe(inner, example_inputs, self.branches, loss=loss)  # a loss that fails is told at once
        self.warned: set[str] = set()

    def __call__(self, step: int) -> dict[str, float]:
        """The numbers, if it is time to measure."""
        if step % self.every:
            return {}
        try:
            inner, plan = planned(self.model)
            if plan is not self.plan:  # rescaled
                self.plan, self.branches = plan, find_branches(inner, self.inputs, plan)
            seen = observe(inner, self.inputs, self.branches, loss=self.loss)
        except InputError as error:
            self._warn("plan", f"at step {step} the model cannot be measured as its plan says: {error}")
            return {}
        lost = [str(b.handle) for b in plan.branches if not has_multiplier(inner, b.handle, b.multiplier)]
        if lost:
            self._warn("ε", f"at step {step} the branch {lost[0]} has lost its ε, as where its module was replaced")
        return self._judged(numbers_of(seen), step)

    def _judged(self, numbers: dict[str, float], step: int) -> dict[str, float]:
        odd = next((name for name, value in numbers.items() if not math.isfinite(value)), None)
        if odd is not None:
            self._warn("finite", f"at step {step} {odd} is {numbers[odd]}")
        elif self.plan.rule == "sqrt" and numbers.get("exponent", 0) > ALIGNED:
            self._warn(
                "exponent",
                f"at step {step} the loops add up as N^{numbers['exponent']:.2f}, since their increments point the "
                f"same way (mean cosine {numbers['alignment']:.2f}), and 'sqrt' makes up for N^0.5: the LR may not "
                "transfer. Take 'factored'",
            )
        return numbers

    def _warn(self, cause: str, message: str) -> None:
        if cause not in self.warned:
            self.warned.add(cause)
            warnings.warn(message, ScalingWarning, stacklevel=4)


def numbers_of(seen: Observation) -> dict[str, float]:
    """What `Monitor` logs of a forward."""
    numbers = {
        f"{module}/{NAMES[statistic]}/{visit}": value
        for module, visit, statistic, value in seen.values
        if statistic in NAMES
    }
    if seen.cosines is not None:
        count = len(seen.cosines)
        total = float(seen.cosines.sum())  # ‖Σ δ_n‖² / ‖δ‖², of increments that are equally long
        numbers["alignment"] = (total - count) / (count * (count - 1))
        numbers["exponent"] = math.log(max(total, 1.0)) / (2 * math.log(count))
    return numbers
