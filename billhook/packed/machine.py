"""Which machine a figure was measured on."""

import os
import platform
from pathlib import Path
from typing import Any


def hardware(device: str = "cpu") -> dict[str, Any]:
    """Name of the processor, cores that may be used, threads of torch, memory in GiB, and the GPU where `device` is
    one."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))), "")
    found: dict[str, Any] = {
        "processor": name or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if device.startswith("cuda") and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
