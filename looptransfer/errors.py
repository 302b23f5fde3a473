"""Errors, and warnings of what deserves a second look."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the value, the allowed range and the fix.

    It ends with the page of the documentation that explains it, `page`, where there is one.
    """

    page = ""

    def __str__(self) -> str:
        return f"{super().__str__()} (more: docs/{self.page})" if self.page else super().__str__()


@contextmanager
def explained_in(page: str) -> Iterator[None]:
    """Tell an InputError that leaves a function which page explains it; the innermost function has the word."""
    try:
        yield
    except InputError as error:
        error.page = error.page or page
        raise


class UserCodeError(InputError):
    """The user's own code failed; the message names its file and line."""


class FailedRunError(UserCodeError, RuntimeError):
    """Runs of a search failed in the user's code; those that finished are kept, and stand in the table `finished`."""

    finished: "pd.DataFrame | None" = None


class LedgerError(InputError):
    """The storage of a ledger did not answer for minutes; what is finished is kept."""


class VerificationError(InputError):
    """A rewritten model does not do what its plan says."""


class ScalingWarning(UserWarning):
    """A model can be rewritten, but the rule was not derived for all that it does."""


class PairingWarning(UserWarning):
    """Seeds pair the runs of an experiment less than it may seem."""
