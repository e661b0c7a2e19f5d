"""Processor time, memory and connections of a process, as the kernel counts them. Linux only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Iterator, List

__all__ = (
    "connections",
    "cpu_seconds",
    "family",
    "folder_bytes",
    "reaped_cpu_seconds",
    "resident_bytes",
)

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _fields(pid: int) -> List[str]:
    # The name, in brackets, may have spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds(*pids: int) -> float:
    """Return the processor time that *pids* have used so far, of user and system together."""
    total = 0
    for pid in pids:
        try:
            fields = _fields(pid)
        except OSError:
            # A child that has ended counts as reaped.
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def reaped_cpu_seconds(pid: int) -> float:
    """Return the processor time of children of *pid* that have ended."""
    fields = _fields(pid)
    return (int(fields[13]) + int(fields[14])) / _TICKS


def resident_bytes(pid: int) -> int:
    """Return the memory of *pid* that is in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def folder_bytes(folder: Path) -> int:
    """Return how much of the disk a folder takes; files may come and go meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:
                continue
    return total


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


def connections(pid: int, port: int) -> int:
    """Return how many TCP connections *pid* has to *port*; none if it has ended."""
    established = set(_sockets_to(port))
    found = 0
    try:
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            try:
                found += os.readlink(descriptor.path) in established
            except OSError:
                continue
    except OSError:
        return 0
    return found


def _sockets_to(port: int) -> Iterator[str]:
    """Yield the sockets that are connected to *port*, as links in ``/proc`` name them."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == "01" and int(fields[2].rpartition(":")[2], 16) == port:
                yield f"socket:[{fields[9]}]"
