"""What the kernel knows of a process: processor time and memory. Linux only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, List

__all__ = ("cpu_seconds", "family", "resident_bytes")

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _fields(pid: int) -> List[str]:
    # The name, in brackets, may have spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds(*pids: int) -> float:
    """Return the processor time that *pids* have used so far, of user and system together."""
    total = 0
    for pid in pids:
        fields = _fields(pid)
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def resident_bytes(pid: int) -> int:
    """Return the memory of *pid* that is in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def family(pid: int) -> List[int]:
    """Return *pid* and all that it has started."""
    parents: Dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(_fields(int(entry))[1])
            except OSError:
                continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found
