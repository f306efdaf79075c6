"""Freed tensors go back to the system: the resident size of a child process is read, not timed."""

import gc
import os
import subprocess
import sys
from functools import partial

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


SIZES = """
import os, sys, torch
from angelslim.base.memory import keep_few_kernels, return_large_blocks, trim
return_large_blocks()
if sys.argv[1] == "few":
    keep_few_kernels()
def resident():
    trim()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
linear = torch.nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
with torch.no_grad():
    for rows in range(2, 82):
        linear(torch.ones(rows, 512, dtype=torch.bfloat16))
    before = resident()
    for rows in range(82, 482):
        linear(torch.ones(rows, 512, dtype=torch.bfloat16))
print(resident() - before)
"""


def test_products_of_ever_new_sizes_pile_up_half_as_much():
    clean = {name: value for name, value in os.environ.items() if name != memory.KERNELS}
    run = partial(subprocess.run, capture_output=True, check=True, env=clean)
    grown = {how: int(run([sys.executable, "-c", SIZES, how]).stdout) for how in ("many", "few")}
    # Nothing grows where no kernel is compiled.
    assert grown["few"] <= max(0.75 * grown["many"], 2**23), grown


def test_what_the_user_says_of_kernels_stays(monkeypatch):
    monkeypatch.setenv(memory.KERNELS, "5")
    memory.keep_few_kernels()
    assert os.environ[memory.KERNELS] == "5"
