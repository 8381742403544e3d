"""The one exception for mistakes that a user can mend."""


class XdscaleError(Exception):
    """Bad input or configuration, with a message that names the file, the value and what to do.

    The command line prints it as one message and ends with `EXIT_BAD_INPUT`, without a traceback.
    """


EXIT_BAD_INPUT = 2
"""Exit code after an `XdscaleError`."""

EXIT_STOPPED = 75
"""Exit code after SIGTERM or SIGUSR1: a checkpoint was saved, the same command continues (EX_TEMPFAIL)."""

EXIT_FAULT = 70
"""Exit code of the ranks that end because one of them died, hung or failed; one line says which (EX_SOFTWARE)."""
