"""Exponents read in plain words."""

from looptransfer.coordcheck.promises import Promise

NEAR = 0.15  # of an exponent that is recognised as a cause
RULES = {1.0: "1/N", 0.5: "1/√N", 0.0: "1"}


def reading(promise: Promise, module: str, exponent: float, alpha: float, answer: str) -> str:
    """One sentence. `exponent` is what was measured, `alpha` the rule's: ε ∝ N^−α."""
    if promise.statistic in _LEVELS:
        text = _LEVELS[promise.statistic](module, exponent, promise.low, answer == "passes")
    elif promise.axis != "loops":
        symbol = "L" if promise.axis == "layers" else "width"
        text = f"{_subject(promise, module)} {_grows(exponent, symbol)} where {_promised(promise, symbol)}"
    elif promise.statistic == "branch_rms" and answer != "passes":
        text = _branch(promise, module, exponent, alpha)
    elif promise.statistic in {"added_rms", "stream_rms"} and answer != "passes":
        text = _stream(promise, module, exponent, alpha)
    else:
        text = f"{_subject(promise, module)} {_grows(exponent)} where {_promised(promise)}"
    return f"{text}; more seeds would tell" if answer == "inconclusive" else text


def _branch(promise: Promise, module: str, exponent: float, alpha: float) -> str:
    """The multiplier that makes a branch add N^exponent at each visit."""
    growth = f"what {module} adds at {'its first' if promise.which == 'first' else 'a'} visit {_grows(exponent)}"
    applied, needed = -exponent, -promise.low
    if promise.where == "once":
        return f"{growth}, though it is visited once and its multiplier must not depend on N"
    if abs(applied) < NEAR and needed:
        return f"the multiplier of {module} is not applied, or not recomputed for N: {growth}"
    if needed and abs(applied - 2 * needed) < NEAR:
        return f"the multiplier of {module} is applied twice: {growth}"
    for power, formula in RULES.items():
        if abs(applied - power) < NEAR and abs(power - needed) > NEAR:
            return f"the multiplier of {module} is {formula} where {RULES[alpha]} is needed: {growth}"
    return f"{growth} where {_promised(promise)}"


def _stream(promise: Promise, module: str, exponent: float, alpha: float) -> str:
    growth = f"{_subject(promise, module)} {_grows(exponent)}"
    if exponent < promise.low:
        return f"{growth} where {_promised(promise)}: the multiplier is too small"
    if alpha == 1 and abs(exponent - 0.5) < NEAR:
        return f"{growth}: the multiplier is 1/√N where 1/N is needed, or visits do not add up as they should"
    if alpha == 1 and abs(exponent - 1) < 2 * NEAR:
        return f"{growth}: some multiplier is missing"
    return f"{growth} where {_promised(promise)}"


def _subject(promise: Promise, module: str) -> str:
    when = {"init": "at initialisation", "one": "in one step", "end": "at the last step"}[promise.moment]
    return {
        "multiplier": f"the multiplier of {module}",
        "branch_rms": f"what {module} adds at a visit",
        "added_rms": f"the sum of what {module} adds",
        "stream_rms": f"the stream {when}",
        "output_rms": f"the output {when}",
        "change_since_step": f"the change of the {'output' if module == 'output' else 'stream'} {when}",
        "change_since_init": f"the change of the {'output' if module == 'output' else 'stream'} since initialisation",
        "gradient_rms": f"the gradient of {_named(module)}",
        "update_rms": f"the step of {_named(module)}",
        "attention_logit_rms": f"the attention logits of {module}",
    }.get(promise.statistic, f"{promise.statistic} of {module}")


def _grows(exponent: float, symbol: str = "N") -> str:
    if abs(exponent) < 0.05:
        return f"does not depend on {symbol} ({symbol}^{exponent:.2f})"
    return f"{'grows' if exponent > 0 else 'falls'} as {symbol}^{exponent:.2f}"


def _promised(promise: Promise, symbol: str = "N") -> str:
    if promise.low == promise.high:
        return f"{symbol}^{promise.low:g} is promised"
    return f"{symbol}^{promise.low:g} to {symbol}^{promise.high:g} is promised"


def _step_ratio(module: str, octaves: float, promised: float, kept: bool) -> str:
    text = (
        f"the step of {module} is {2**octaves:.3g} times that outside the branches where {2**promised:.3g} is promised"
    )
    return (
        text if kept else f"{text} (by its factor over L): were the groups of param_groups kept, and not overwritten?"
    )


def _lost_to_eps(module: str, share: float, _: float, kept: bool) -> str:
    text = f"Adam's eps takes {100 * share:.1f} % of the first step of {_named(module)}"
    return text if kept else f"{text}: the step then depends on the size of the gradient, and so on L and width"


def _named(module: str) -> str:
    return {"outside": "the parameters outside", "on stream": "the parameters on the stream"}.get(module, module)


_LEVELS = {"step_ratio": _step_ratio, "lost_to_eps": _lost_to_eps}
