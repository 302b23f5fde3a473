"""The one error that means: what you handed in cannot be used, and this is how to mend it."""


class InputError(ValueError):
    """Bad usage or input. The message names the value, the allowed range and the fix; the CLI ends with 2."""
