"""Freed tensors go back to the system: the resident size of a child process is read, not timed."""

import gc
import subprocess
import sys

import pytest

from angelslim.base import memory

PROGRAM = """
import os, torch
from angelslim.base.memory import peak_resident, return_large_blocks
assert return_large_blocks()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
for _ in range(3):  # freeing large blocks is what raises glibc's own threshold
    torch.ones(8 * 2**20)
before = resident()
kept = []
for _ in range(20):
    big = [torch.ones(2 * 2**20) for _ in range(4)]
    kept.append(torch.ones(1000))  # a small survivor behind each group of large ones
    del big
print(resident() - before, peak_resident() - before)
"""


def test_large_tensors_leave_no_holes():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    grown, peak = map(int, done.stdout.split())
    assert grown < 8 * 2**20  # one group is 32 MB
    assert peak >= 30 * 2**20


def test_the_peak_is_this_program_s_own():
    """A small program started by a large one reports its own peak."""
    starter = f"""
import subprocess, sys
held = bytearray(300 * 2**20)
for page in range(0, len(held), 4096):
    held[page] = 1
program = "from angelslim.base.memory import peak_resident; print(peak_resident())"
print(subprocess.run([{sys.executable!r}, "-c", program], capture_output=True, text=True, check=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, check=True)
    assert 2**20 < int(done.stdout) < 200 * 2**20


def test_the_collector_pauses_and_leaves_alone_what_was_loaded():
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(KeyError), memory.collector_paused():
            assert not gc.isenabled()
            with memory.collector_paused():
                pass
            assert not gc.isenabled() and gc.get_freeze_count() == frozen
            raise KeyError
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.enable()
        gc.unfreeze()
