"""Which kernel computes a case, and why: the first that can, from the fastest to the most general.

Capability is asked for, never a GPU's name: the device type and its compute capability, the dtype, the head
dimensions, the block, and whether a compiler or Triton is there.
"""

from __future__ import annotations

from ...base.errors import ConfigError, did_you_mean
from . import dense, flex, hopper, triton_flash
from .base import Case, Kernel

KERNELS: dict[str, Kernel] = {
    module.KERNEL.name: module.KERNEL for module in (hopper, triton_flash, flex, dense)
}


def choose(case: Case, wanted: str = "auto") -> tuple[Kernel, str]:
    """Return a kernel for `case` and the reason of the choice.

    A kernel that is named and cannot compute the case is a `ConfigError`; "auto" takes the first that can.
    """
    if wanted != "auto":
        if wanted not in KERNELS:
            raise ConfigError(
                f"Unknown attention kernel {wanted!r}.", fix=did_you_mean(wanted, [*KERNELS, "auto"])
            )
        reason = KERNELS[wanted].refuses(case)
        if reason:
            raise ConfigError(
                f"The attention kernel {wanted!r} cannot run here: {reason}.", fix="Use kernel: auto."
            )
        return KERNELS[wanted], "asked for"
    refused: list[str] = []
    for kernel in KERNELS.values():
        reason = kernel.refuses(case)
        if not reason:
            return kernel, "; ".join(refused) or "the fastest that there is"
        refused.append(reason)
    raise AssertionError("the reference computes everything")
