"""The errors that a user can see: a mistake to correct, and a job that failed; and the test for out of memory.

Every message says what is wrong, where, and what to do. The command line prints it and exits with `exit_code`.
"""


class BillhookError(ValueError):
    """A request that cannot be carried out (exit code 2)."""

    exit_code = 2


class JobError(BillhookError):
    """A job that failed while it ran: full disk, damaged output, numerical trouble (exit code 1)."""

    exit_code = 1


class Interrupted(JobError):
    """A run that was interrupted and can be resumed (exit code 1)."""


# torch has its own class for a GPU only; these are the messages of its allocator and libraries
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
    "cannot allocate memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine or a GPU is out of memory."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
