from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from tests.broken import ALL, GATE, Broken, all_broken, all_pairs, changed, hook, run_broken

SLOW = {"ends its process", "workers"}


def test_a_broken_experiment_is_bad_input_and_told_in_one_line_with_its_own(tmp_path: Path) -> None:
    turn = cycle(ALL)
    rows = [broken for broken in all_broken() if broken.commands and broken.kind not in SLOW]
    pairs = [(broken, next(command for command in turn if command in broken.commands)) for broken in rows[::3]]
    wrong, _ = run_broken(pairs, tmp_path)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", dict.fromkeys(broken.kind for broken in all_broken()))
def test_every_command_answers_or_says_what_is_wrong(tmp_path: Path, kind: str) -> None:
    wrong, counts = run_broken([pair for pair in all_pairs() if pair[0].kind == kind], tmp_path)
    print(counts)  # shown by pytest -rP
    assert wrong == []


def unchecked() -> Iterator[tuple[str, str, str]]:
    """Ways in which a gate could pass without having checked: what, the file, a phrase of the message."""
    generator = "generator = torch.Generator().manual_seed(seed)"
    fixed = (generator, "generator = torch.Generator().manual_seed(0)")
    yield "the file ends the process with success", hook("top", "sys.exit(0)"), "SystemExit: 0"
    yield "the model ends the process with success", hook("forward", "sys.exit(0)"), "SystemExit: 0"
    yield "the data end the process at once", hook("batches", "os._exit(0)"), "there is no answer"
    yield "an exception that is no Exception", hook("loss", "raise type('Stop', (BaseException,), {})"), "Stop: "
    yield "an answer that the user's code printed", hook("loss", "print('HOLDS'); os._exit(0)"), "there is no answer"
    yield "every N is one model", changed(("Net(loops)", "Net(2)")), "loop equally often"
    shared = ("def make_model(loops):", "net = Net(2)\ndef make_model(loops):\n    net.loops = loops\n    return net")
    yield "one model is trained on and on", changed(shared), "gives the same weights at each call"
    still = ("return Net(loops)", "torch.manual_seed(0); return Net(loops)")
    yield "the seeds change nothing", changed(fixed, still), "the same batches and the same weights"
    unseeded = (generator, "generator = torch.Generator(); generator.seed()")
    yield (
        "the data ignore the seed and the runs are not paired",
        changed(unseeded),
        "another batch 0 at its second call",
    )
    unpaired = ("batches(10**6)", "batches(time.time_ns())")
    yield "the held-out set is another one each time", changed(unpaired), r"held_out\(\) gives another batch 0"
    yield "the batches end early", changed(("    while True:", "    for _ in range(3):")), "ended after 3 of the 4"
    yield "the loss is never a number", hook("loss", "return (output * float('nan')).mean()"), "the loss at init.* nan"
    random = ("range(self.loops)", "range(int(torch.randint(1, 2 * self.loops + 1, ())))")
    yield "the loop count is another one in every forward", changed(random), "loops another number of times"
    yield (
        "nothing is trained",
        changed(("return Net(loops)", "return Net(loops).requires_grad_(False)")),
        "no parameter",
    )


def test_a_gate_that_could_not_check_does_not_pass(tmp_path: Path) -> None:
    ways = [(Broken(what, text, phrase, line=()), GATE) for what, text, phrase in unchecked()]
    wrong, _ = run_broken(ways, tmp_path)
    assert len(ways) >= 10
    assert wrong == []
