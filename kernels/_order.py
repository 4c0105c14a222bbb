"""What a kernel owes those before and after it: to wait for what it reads, and to hand the step on."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """Before any load or store of a kernel that is launched while the one before it still runs: wait for its results.

    Its own successor may be launched from here on; that waits for all of this kernel in turn. Source: CUDA C++
    Programming Guide, "Programmatic Dependent Launch and Synchronization".
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def advance(at):
    """Do what ``at.advance`` asks for; the few programs that do it write the same."""
    if at.advance is not None:
        tl.store(at.advance.to, tl.load(at.step) + at.advance.by, mask=tl.program_id(0) == 0)
