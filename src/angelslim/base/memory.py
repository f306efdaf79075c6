"""Return freed tensors to the system, so that resident memory is what a run holds.

glibc serves allocations below a threshold from a heap that only shrinks at its end, and raises the threshold
(up to 32 MB) as large blocks are freed. Weights of that size then leave holes, and a run that frees every block
still grows by tens of megabytes a block. Fixing the threshold makes large tensors mappings of their own, which
go back when freed. The threshold is 8 MB: each mapping is made of pages that the system first has to clear, which costs
more than the arithmetic on temporaries of a few megabytes. That has to happen before the first large allocation: a hole that is already there, touched
or not, serves later requests before a mapping is made. `trim` gives back what has gathered in holes since.

oneDNN, which multiplies bfloat16 matrices on CPUs, keeps what it compiled for each combination of sizes: a thousand of
them, half a megabyte each. Tokens that go to an expert, and samples of their own length, make new combinations all the
time: a run through a mixture of 64 experts grew by 50 MB a block. `keep_few_kernels` halves that; the rest is a cache
inside oneDNN without a bound.

Python's own collector of cycles walks through everything that is alive, again and again while large libraries are
being loaded, and finds nothing: a quarter of the time that loading takes. `collector_paused` spares that.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 2**23
KERNELS, _FEW = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 64  # a block has about ten combinations of sizes at a time


def return_large_blocks() -> bool:
    """Fix glibc's thresholds at 8 MB for this process; return whether that was possible."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _LARGE)) and bool(mallopt(_M_MMAP_THRESHOLD, _LARGE))


def keep_few_kernels() -> None:
    """Let oneDNN keep 64 compiled kernels, unless the user said otherwise; it looks once, at its first product."""
    os.environ.setdefault(KERNELS, str(_FEW))


def trim() -> None:
    """Give the heap's free pages back to the system; takes milliseconds."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Load modules without looking for cycles; the collector leaves alone what is alive at the end.

    For the start of a program: what it loads stays until it exits. A collector that is switched off stays off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _glibc(function: str) -> Any:
    """Return a function of glibc, or None where another C library is in use."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL("libc.so.6"), function)
    except (OSError, AttributeError):
        return None


def peak_resident() -> int:
    """Return the largest resident size of this process so far, in bytes.

    Linux's own high-water mark starts anew with each program; the figure of `getrusage` may still be that of the
    process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
