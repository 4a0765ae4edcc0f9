"""The exceptions that a program turns into one sentence and an exit status."""

# `EX_TEMPFAIL` of sysexits.h: try again.
RESUME_STATUS = 75


class UserError(ValueError):
    """A mistake in what the user gave: a path, a config field, a data set, a checkpoint.

    Its message is one sentence that says what is wrong, where, and what to do; the programs print
    it alone, without a stack trace, and exit with status 2.
    """


class RunStoppedError(RuntimeError):
    """A run that ended itself, as at a loss that is not finite; the message says how to go on.

    Where a run has several processes all of them end so, at the same step. Exit status 1.
    """


class RunInterruptedError(RunStoppedError):
    """A run that was ended from outside; the same command, given again, goes on with it.

    The exit status is `RESUME_STATUS`, by which a launcher knows to start it again.
    """


class ProcessFailedError(RuntimeError):
    """A failure of this process alone, for which the whole run has to end; one sentence.

    It may be but the echo of another process's end. Exit status 1.
    """
