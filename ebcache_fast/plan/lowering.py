"""Lowering of a step's rules to its launches, and the proof that nothing is read before it is stored."""

from collections.abc import Iterable, Sequence

from ebcache_fast.errors import TableError
from ebcache_fast.plan.emitter import Emitter
from ebcache_fast.plan.memory import Memory
from ebcache_fast.plan.program import CHANGE, REST, Program, Slot
from ebcache_fast.plan.sites import Site, SiteShape
from ebcache_fast.plan.step_plan import StepPlan


def lower(
    step: StepPlan,
    site_shapes: Sequence[SiteShape],
    memory: Memory,
    *,
    samples: bool,
    steps: int = 1,
    float8: frozenset[int] = frozenset(),
    tokens: int | None = None,
    is_guided: bool | None = None,
) -> Program:
    """The program of one step on a model of these sites.

    memory: of the whole plan. samples: whether our own loop runs it, and the sampler's step with it; then ``steps``
    equal ones may run at once if nothing but a sum of neighbouring slots is left of them. float8: sites, counted
    through the model, that take their input so. tokens, is_guided: see `Emitter`, which refuses what does not fit.
    """
    emitter = Emitter(site_shapes, memory, float8, tokens, is_guided)
    enter = {span.first: span for span in step.spans}
    leave = {span.last: span for span in step.spans}
    skipped = {site for span in step.spans if span.skips for site in range(span.first, span.last + 1)}
    for site, rule in enumerate(step.rules):
        emitter.begin(site)
        if site in enter:
            enter[site].enter(emitter)
        if site not in skipped:
            rule.emit(site, emitter)
        if site in leave:
            leave[site].leave(emitter)
    return Program(emitter.end(samples=samples), step.sites, steps)


def draft(step: StepPlan) -> Program:
    """The program of one step as far as its slots go, for whoever knows no model yet."""
    return lower(step, bare(step.sites), Memory(), samples=False)


def bare(sites: Iterable[Site]) -> list[SiteShape]:
    """Shapes of sites of which nothing else is known: all costs 0."""
    return [SiteShape(site.layer, site.branch, macs=0, weights=0) for site in sites]


def verify(programs: Iterable[Program]) -> None:
    """Raise TableError, naming step and site, where a program reads what neither it nor an earlier one wrote."""
    stored: set[Slot] = set()
    for i, program in enumerate(programs):
        if missing := next((slot for slot in program.reads if slot not in stored), None):
            site = program.sites[missing.first]
            raise TableError(
                f"steps[{i}]: {site.branch.name} of layer {site.layer} reads its {described(missing)}, which no step "
                f"stored; let an earlier step keep it, by {keeper_of(missing)}"
            )
        stored |= program.writes


def described(slot: Slot) -> str:
    """A slot's meaning in words, with its age where there are several."""
    return slot.meaning + f" of age {slot.age}" * (slot.age > 0)


def keeper_of(slot: Slot) -> str:
    """The rule that keeps such a slot, as people write it."""
    if slot.meaning == CHANGE:
        return f"KeepSpan({slot.first}, {slot.last}{f', {slot.age}' * (slot.age > 0)})"
    if slot.meaning.startswith(REST):
        return f"FullAndWindow({slot.meaning.removeprefix(REST).strip()})"
    return f"Compute({slot.age})" if slot.age else "COMPUTE, as in a first step that is NO_CACHE"
