"""The LR optimum over N, as a test. Every commit runs the bracketed one; the nightly job runs both (see README.md)."""

from experiment import experiment

from looptransfer.pytest_plugin import LRTransfer

LRS = [2.0**log2 for log2 in range(-8, -2)]


def test_the_stored_optima_are_still_bracketed(lr_transfer: LRTransfer) -> None:
    lr_transfer.assert_bracketed(experiment, seeds=8)


def test_the_optima_have_not_moved(lr_transfer: LRTransfer) -> None:
    results = lr_transfer.sweep(experiment, loops=[1, 2], lrs=LRS, seeds=8)
    lr_transfer.assert_optimum(results)
    lr_transfer.assert_flat(results, tolerance=0.4)  # over one doubling of so noisy a model; the default is 0.2
