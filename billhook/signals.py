"""Ctrl-C and SIGTERM, which batch systems send: both raise KeyboardInterrupt, and neither is lost."""

import os
import signal
import sys
import threading
from typing import Any

STOPPED = "Stopped. Nothing was written."
_AGAIN = 0.05  # seconds
_before = sys.unraisablehook


def install() -> None:
    """Let SIGTERM end a run as Ctrl-C does, from now on."""
    global _before
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.unraisablehook is not _raise_again:
        _before, sys.unraisablehook = sys.unraisablehook, _raise_again


def _raise_again(unraisable: Any) -> None:
    """Raise a KeyboardInterrupt again that Python dropped, because it was raised in a `__del__` or a callback."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        _before(unraisable)
        return
    timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
