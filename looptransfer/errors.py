"""What goes wrong, and what deserves a second look."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the value, the allowed range and the fix."""


class VerificationError(InputError):
    """A rewritten model does not do what its plan says."""


class ScalingWarning(UserWarning):
    """A model can be rewritten, but the rule was not derived for all that it does."""
