"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a config field, a data set, a checkpoint.

    Its message is one sentence that says what is wrong, where, and what to do; the programs print
    it alone, without a stack trace, and exit with status 2.
    """


class RunStoppedError(RuntimeError):
    """A run that ended itself, as at a loss that is not finite; the message says how to go on."""
