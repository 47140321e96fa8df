"""The two errors a user can meet: a mistake to correct, and a job that failed; and how to tell that memory ran out.

Every message says what is wrong, where, and what to do. The command line prints the message alone and exits with
`exit_code`.
"""


class BillhookError(ValueError):
    """Something the user asked for cannot be done as asked (exit code 2)."""

    exit_code = 2


class JobError(BillhookError):
    """A well-formed job failed while it ran: full disk, a difference found on disk, numerical trouble (exit code 1)."""

    exit_code = 1


class Interrupted(JobError):
    """A run that ended before it was done and can be continued (exit code 1)."""


# torch has a class of its own on a GPU only; these are what its allocator and libraries say
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
    "cannot allocate memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, of the machine or of a GPU."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
