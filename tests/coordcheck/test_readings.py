import pytest

from looptransfer.coordcheck.promises import Promise
from looptransfer.coordcheck.readings import reading


def first_visit(exponent: float, alpha: float = 1, answer: str = "fails", where: str = "looped") -> str:
    promised = 0.0 if where == "once" else -alpha
    promise = Promise("loops", "branch_rms", where, "init", "first", promised, promised)  # type: ignore[arg-type]
    return reading(promise, "f", exponent, alpha, answer)


@pytest.mark.parametrize(
    ("exponent", "alpha", "words"),
    [
        (0.02, 1, "the multiplier of f is not applied, or not recomputed for N"),
        (-0.48, 1, "the multiplier of f is 1/√N where 1/N is needed"),
        (-2.05, 1, "the multiplier of f is applied twice"),
        (-1.02, 0.5, "the multiplier of f is applied twice"),
        (-1.0, 0, "the multiplier of f is 1/N where 1 is needed"),
        (-0.75, 1, "what f adds at its first visit falls as N^-0.75 where N^-1 is promised"),
        (0.3, 1, "what f adds at its first visit grows as N^0.30 where N^-1 is promised"),
    ],
)
def test_an_exponent_is_called_by_what_causes_it(exponent: float, alpha: float, words: str) -> None:
    assert first_visit(exponent, alpha).startswith(words)


def test_a_branch_outside_the_loop_must_not_know_n() -> None:
    assert "visited once" in first_visit(-1, where="once")


def test_what_is_not_sure_asks_for_seeds() -> None:
    assert first_visit(-0.8, answer="inconclusive").endswith("; more seeds would tell")


def test_a_stream_that_fades_has_too_small_a_multiplier() -> None:
    promise = Promise("loops", "stream_rms", "final", "init", "last", -0.5, 0)
    assert "the multiplier is too small" in reading(promise, "f", -0.9, 1, "fails")


def test_depth_speaks_of_l() -> None:
    promise = Promise("layers", "multiplier", "looped", "init", "all", -0.5, -0.5)
    expected = "the multiplier of f falls as L^-1.00 where L^-0.5 is promised"
    assert reading(promise, "f", -1, 1, "fails") == expected
