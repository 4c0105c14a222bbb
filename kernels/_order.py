"""Order of kernels: each waits for the results that it reads, and some hand the step on."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait, before any load or store, for the results of the kernel before, if this one is launched while that runs.

    Its own successor may be launched from here on; that waits for all of this kernel in turn. Source: CUDA C++
    Programming Guide, "Programmatic Dependent Launch and Synchronization".
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def advance(at):
    """Store the step for a later kernel, if ``at.advance`` asks for it; the few programs that do it write the same."""
    if at.advance is not None:
        tl.store(at.advance.to, tl.load(at.step) + at.advance.by, mask=tl.program_id(0) == 0)
