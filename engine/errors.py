"""Errors whose message is one plain sentence, fit to be shown to a learner as it is."""


class WorkbenchError(Exception):
    """Something went wrong and the message says what, and what to do about it."""


class InputError(WorkbenchError, ValueError):
    """What was asked for makes no sense: the message names the value and what is allowed."""


class DoesNotFitError(WorkbenchError):
    """What was asked for needs more memory than the device has; the message says what would fit."""


class JobCancelledError(WorkbenchError):
    """The job was cancelled before it had a result."""


class JobFailedError(WorkbenchError):
    """The job ended without a result: its worker died, it ran out of memory, or it took too long."""
