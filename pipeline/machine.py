"""What machine this is."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from ..core.manifest import Machine


def machine() -> Machine:
    """Return the machine that a run took place on."""
    system = f"{platform.system()} {platform.release()}"
    return Machine(processor=processor(), cores=os.cpu_count() or 1, memory_bytes=memory_bytes(), system=system)


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Return the size of the memory, None where the system does not tell."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
