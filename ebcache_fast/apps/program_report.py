"""The distinct programs of a plan on a model, with how often each runs and what it costs, as text."""

from collections import Counter
from collections.abc import Iterator

from ebcache_fast.engine.step_scheduler import StepScheduler
from ebcache_fast.plan import ModelShape, Plan, lower

ROWS, ITEMSIZE = 2, 2  # one guided sample in bfloat16


def programs_shown(plan: Plan, shape: ModelShape) -> Iterator[str]:
    """The lines of each program as our own loop runs it. Raises TableError for a plan of another model.

    Steps that are one sum run up to three at once: that is a program of its own. Launches are ours: a branch has those
    of its products and its attention besides.
    """
    step_macs = dict(zip(plan.steps, plan.step_macs(shape), strict=True))
    moved = dict(zip(plan.steps, plan.bytes_moved(shape, ROWS, ITEMSIZE), strict=True))
    counts = Counter(StepScheduler(plan).dispatches())
    for (step, steps), times in counts.items():
        program = lower(
            step,
            shape.site_shapes,
            plan.memory,
            samples=True,
            steps=steps,
            tokens=shape.tokens,
            is_guided=True,
        )
        name = step.type_name if steps == 1 else f"{steps} x {step.type_name}"
        ours, branches = len(program) - len(program.branches), len(program.branches)
        yield f"{name}: runs {times} times; {ours} launches and {branches} branches"
        yield (
            f"{steps * step_macs[step] / 1e9:.2f} G multiply-accumulates (one guidance branch), at least "
            f"{moved[step] / 2**20:.1f} MiB moved (one guided sample, bfloat16)"
        )
        yield from (f"  {line}" for line in str(program).splitlines())
        yield ""
    live = len(plan.memory.live)
    gibibytes = plan.cache_bytes(shape, ROWS, ITEMSIZE) / 2**30
    yield f"{len(counts)} programs, each one graph; {live} slots are kept, {gibibytes:.3f} GiB"
