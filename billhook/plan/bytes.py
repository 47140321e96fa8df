"""Sizes in bytes as people write them."""

import math
import re

from billhook.errors import BillhookError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: str | int) -> int:
    """Bytes of a size such as 2500000000, "2.5GB" (10^9) or "2GiB" (2^30); raises BillhookError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", str(size).strip(), re.IGNORECASE)
    unit = found[2].upper() if found else "?"
    unit += "B" if unit in ("K", "M", "G", "KI", "MI", "GI") else ""
    if found is None or unit not in _UNITS or not 0 < float(found[1]) < math.inf:
        raise BillhookError(f"The size {size!r:.40} is not a number of bytes, such as 2.5GB, 800MB or 2GiB.")
    return int(float(found[1]) * _UNITS[unit])
