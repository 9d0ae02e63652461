"""The library's errors. Each message is one sentence: what was wrong, what was expected, what to do."""


class SteerableError(Exception):
    """Something failed although it was asked for correctly (the command line exits with 1)."""


class UsageError(SteerableError):
    """The arguments or input files are wrong (the command line exits with 2)."""


class SteerableWarning(UserWarning):
    """Steering went on, but probably not as intended."""
