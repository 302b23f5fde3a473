"""Every model of the zoo: what parametrize answers, and how far the rewritten one is from one with ε at its additions.

    python benchmarks/rewrite_models.py

Writes reports/rewrite/README.md. Exits 1 where an answer is not the one that was written down by hand.
"""

import re
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import looptransfer as lt
from tests.oracle import Results, both_runs
from tests.zoo import ZOO, Entry

REPORT = Path(__file__).parent.parent / "reports" / "rewrite" / "README.md"
HEAD = """# Which models are rewritten, and how

Made by `python benchmarks/rewrite_models.py` in {seconds:.0f} s: torch {torch}{packages}; one thread, weights and
inputs of fixed seeds, float64. {right} models are rewritten as the theory asks, {refused} are refused with a reason.

Each model is a small one of its build (`tests/zoo.py`). N and L are what `parametrize` counts, and equal what was
written down by hand. *Distance* is the largest difference, in outputs and in gradients of all parameters, in train and
in eval mode, between the rewritten model and the plain one run with ε multiplied into the traced additions, relative to
the largest value.

Beside this: [what on-stream parameters need](on_stream.txt) and [what the rewrite costs](cost.txt).
"""


def distance(ours: Results, theirs: Results) -> float:
    """The largest difference of two runs, relative to the largest value."""
    pairs = [*zip(ours[0], theirs[0], strict=True), *((ours[1][name], theirs[1][name]) for name in theirs[1])]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pairs)


def answer(entry: Entry) -> tuple[str, bool]:
    """A row of the table, and whether it is the one expected."""
    model = entry.build()
    try:
        with torch.set_grad_enabled(entry.gradients), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = lt.parametrize(model, entry.example(), **entry.kwargs)
    except lt.InputError as error:
        why = re.sub(r"\S*/([^/\s]+:\d+)", r"`\1`", str(error)).split(". ")[0]
        return f"| {entry.name} | – | – | – | refused: {why} |", bool(
            entry.refusal and re.search(entry.refusal, str(error))
        )
    loops = plan.loops if isinstance(plan.loops, frozenset) else {plan.loops}
    far = max(distance(*both_runs(entry, model, training)) for training in (True, False))
    seen = [(str(branch.handle), branch.visits) for branch in plan.branches] == [row[1:] for row in entry.rows]
    caveats = "; ".join(sorted({caveat.split(":")[0].split(" (")[0] for caveat in plan.caveats})) or "–"
    counts = ", ".join(f"{n:g}" for n in sorted(loops))
    right = seen and plan.layers == entry.layers and far < 1e-10 and entry.refusal is None
    return f"| {entry.name} | {counts} | {plan.layers} | {far:.0e} | {caveats} |", right


def main() -> int:
    torch.set_num_threads(1)
    started, lines, wrong = time.monotonic(), list[str](), list[str]()
    for family in dict.fromkeys(entry.family for entry in ZOO):
        lines += [f"\n## {family}\n", "| model | N | L | distance | warned of, or why not |", "|---|---|---|---|---|"]
        for entry in ZOO:
            if entry.family == family and entry.available():
                line, right = answer(entry)
                lines.append(line if right else f"{line} **not as expected**")
                wrong += [] if right else [entry.name]
    known = [entry for entry in ZOO if entry.available()]
    refused = sum(entry.refusal is not None for entry in known)
    head = HEAD.format(
        seconds=time.monotonic() - started,
        torch=torch.__version__,
        packages="".join(f", {name} {version(name)}" for name in ("transformers", "x-transformers", "peft")),
        right=len(known) - refused - len(wrong),
        refused=refused,
    )
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text("\n".join([head, *lines]) + "\n")
    print(f"{len(known)} models, {len(wrong)} not as expected: {', '.join(wrong) or 'none'}; {REPORT}")
    return bool(wrong)


def version(package: str) -> str:
    import importlib.metadata  # noqa: PLC0415

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
