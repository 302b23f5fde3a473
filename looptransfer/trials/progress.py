"""The progress of searches: a bar with an ETA on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from looptransfer.trials.run import Run

PLAIN_EVERY = 30.0  # seconds between lines where there is no terminal
TOLD_FROM = 0.1  # of the work, before which a guess at the rest is off by many times
BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"


class Progress:
    """The progress of one search, or of several that follow each other. Runs are weighed by their loop count.

    Args:
        name: what is going on.
        expected: the weight of all runs, where several searches share this.
    """

    def __init__(self, name: str, expected: int = 0) -> None:
        self.name, self.expected = name, expected
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(desc=name, unit="loop", disable=not self.terminal, bar_format=BAR)
        self.started = self.printed = time.monotonic()
        self.before = self.made = 0  # weight that was trained by the searches before this one; and with this one
        self.there: int | None = None  # weight that was finished before this search began
        self.ended = False

    def show(self, finished: Iterable[Run], coming: Iterable[Run], text: str) -> None:
        """Show a search by its runs that are finished, and those that are still to come."""
        weight, left = _weight(finished), _weight(coming)
        self.there = weight if self.there is None else self.there
        self.made = self.before + weight - self.there
        rest = max(left, self.expected - self.there - self.made)
        if self.terminal:
            self.bar.total, self.bar.n = self.made + rest, self.made
            self.bar.set_postfix_str(text)
        elif time.monotonic() - self.printed >= PLAIN_EVERY or (not left and not self.ended and weight > self.there):
            self.printed = time.monotonic()
            spent = self.printed - self.started
            known = rest and self.made > TOLD_FROM * (self.made + rest)
            eta = f", about {rest * spent / self.made:.0f} s left" if known else ""
            print(f"{self.name}: {text}, {spent:.0f} s{eta}", file=sys.stderr, flush=True)
        self.ended = not left

    def end_search(self) -> None:
        """Go on to the next search."""
        self.before, self.expected = self.made, self.expected - (self.there or 0)
        self.there, self.ended = None, False


_stories: list[Progress] = []


@contextmanager
def one_story(name: str, expected: int) -> Iterator[None]:
    """Show all searches meanwhile as one; `expected` is the sum of the loop counts of all their runs."""
    _stories.append(Progress(name, expected))
    try:
        yield
    finally:
        _stories.pop().bar.close()


@contextmanager
def progress_of(name: str) -> Iterator[Progress]:
    """The progress of a search: its own, or that of the story that it is part of."""
    progress = _stories[-1] if _stories else Progress(name)
    try:
        yield progress
    finally:
        progress.end_search()
        if not _stories:
            progress.bar.close()


def _weight(runs: Iterable[Run]) -> int:
    return sum(run.loops for run in runs)
