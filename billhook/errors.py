"""The two errors a user can meet: a mistake to correct, and a job that failed.

Every message says what is wrong, where, and what to do. The command line prints the message alone and exits with `exit_code`.
"""


class BillhookError(ValueError):
    """Something the user asked for cannot be done as asked (exit code 2)."""

    exit_code = 2


class JobError(BillhookError):
    """A well-formed job failed while it ran: full disk, a difference found on disk, numerical trouble (exit code 1)."""

    exit_code = 1


class Interrupted(JobError):
    """A run that ended before it was done and can be continued (exit code 1)."""
