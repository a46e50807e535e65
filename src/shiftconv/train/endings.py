"""How a run ends before it is done, other than by an error of its own. Imports no torch, so the command line can."""

STOPPED = 75  # exit status of a run that was asked to stop and can go on (EX_TEMPFAIL: try again later)
FAILED = 2  # that of one with an error, which it has told in one line
INTERRUPTED = 130  # that of one stopped by Ctrl-C, as of any program


class Stopped(RuntimeError):
    """The run was asked to stop; its checkpoint is written, and it can go on.

    Attributes:
        reason: a signal's name, or that the launcher is gone.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    @property
    def status(self) -> int:
        """The exit status of the process."""
        return INTERRUPTED if self.reason == "SIGINT" else STOPPED


class ElsewhereError(RuntimeError):
    """Another process of the run has met an error, and tells it; this one has nothing to add."""
