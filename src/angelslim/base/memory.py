"""Return freed tensors to the system, so that resident memory is what a run holds.

glibc serves allocations below a threshold from a heap that only shrinks at its end, and raises the threshold
(up to 32 MB) as large blocks are freed. Weights of that size then leave holes, and a run that frees every block
still grows by tens of megabytes a block. Fixing the threshold makes large tensors mappings of their own, which
go back when freed. The heap's free end has to go back as well, or it serves them before a mapping is made.
"""

from __future__ import annotations

import ctypes
import resource
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 2**20


def return_large_blocks() -> bool:
    """Fix glibc's thresholds at 1 MB for this process; return whether that was possible."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return bool(mallopt(_M_TRIM_THRESHOLD, _LARGE)) and bool(mallopt(_M_MMAP_THRESHOLD, _LARGE))
    except (OSError, AttributeError):  # another C library, which has no such habit or no such knob
        return False


def peak_resident() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
