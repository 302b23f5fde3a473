"""The LR optimum over N, as a test. Every commit runs the bracketed one; the nightly job runs both (see README.md)."""

from experiment import experiment

from looptransfer.pytest_plugin import LRTransfer


def test_the_stored_optima_are_still_bracketed(lr_transfer: LRTransfer) -> None:
    lr_transfer.assert_bracketed(experiment, loops=[1, 4])


def test_the_lr_transfers_and_its_optima_have_not_moved(lr_transfer: LRTransfer) -> None:
    results = lr_transfer.sweep(experiment, loops=[1, 2, 4], lrs=[2.0**log2 for log2 in range(-7, -1)], seeds=6)
    lr_transfer.assert_optimum(results)
    lr_transfer.assert_flat(results)
