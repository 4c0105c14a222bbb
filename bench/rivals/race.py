"""Contenders taking turns over one case, and what is told of each."""

import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bench.marks import seconds_between
from bench.rivals import plain
from bench.rivals.case import Case
from bench.rivals.layouts import method
from bench.rivals.limit import within
from bench.rivals.loop import Run
from bench.rivals.rival import Rival, Trajectory
from ebcache_fast.plan import Branch

PREPARING = 0.8  # of the time, after which nobody else is prepared
LEAST_ROUNDS = 2  # of which quartiles can be taken
JUDGED = 4  # samples whose error is looked at
ACTIVATIONS = 1 + 1 + 3 + 1 + 4  # h, a branch's input, packed projections, attention, the MLP's hidden: in widths


@dataclass
class Entry:
    """What is known of a contender."""

    rival: Rival
    setup_seconds: float = 0.0  # to make it, and of its first run: compiling, tuning, capturing
    error: float | None = None  # of its latents against the method in float32, relative RMS
    why: str | None = None  # it does not run
    peak_bytes: int | None = None  # that were allocated at a time, until its first run was over; of a GPU
    loops: list[float] = field(default_factory=list)  # seconds of each trajectory
    hosts: list[float] = field(default_factory=list)  # seconds of a step on the host, likewise
    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # median of each, by step type

    def forget_times(self) -> None:
        """Those of a warm-up."""
        for taken in (self.loops, self.hosts, *self.steps.values()):
            taken.clear()

    def told(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        about = {"name": self.rival.name, "what": self.rival.what, "is_cached": self.rival.is_cached, "why": self.why}
        if self.why is not None:
            return about
        return about | {
            "error": self.error,
            "setup_s": self.setup_seconds,
            "peak_bytes": self.peak_bytes,
            "rounds": len(self.loops),
            "loop_ms": summary(self.loops, 1e3),
            "step_ms": {name: summary(seconds, 1e3) for name, seconds in self.steps.items()},
            "host_us_a_step": summary(self.hosts, 1e6),
        }


def summary(seconds: Sequence[float], unit: float) -> dict[str, Any]:
    """Median and quartiles, in so many parts of a second."""
    low, median, high = statistics.quantiles([unit * one for one in seconds], n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high]}


def race(
    case: Case,
    rivals: Sequence[Rival],
    rounds: int,
    say: Callable[[str], None],
    seconds: float = math.inf,
    keep: Callable[[list[Entry]], None] = lambda _: None,
) -> list[Entry]:
    """Every rival prepared, then ``rounds`` trajectories of each in turn; one that fails is told so and left out.

    Where ``seconds`` do not suffice, there are fewer rounds, or fewer rivals. ``keep`` gets what there is after each
    round from the second on: an end that is forced leaves nothing else.
    """
    start = time.perf_counter()
    cases = {True: case, False: case.uncached()}
    truths = {cached: truth(few(cases[cached])) for cached in {rival.is_cached for rival in rivals}}
    entries, running = [Entry(rival) for rival in rivals], list[tuple[Entry, Trajectory]]()
    for entry in entries:
        cached, left = entry.rival.is_cached, start + PREPARING * seconds - time.perf_counter()
        if left < 0:
            entry.why = "no time was left"
        elif (run := prepared(entry, cases[cached], truths[cached], left)) is not None:
            running.append((entry, run))
        say(f"{entry.rival.name}: {entry.why or f'ready after {entry.setup_seconds:.0f} s, error {entry.error:.1e}'}")
    for done in range(-1, rounds):  # the first round warms up
        if done >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        if not take_turns(running, cases):
            break
        if done < 0:
            for entry, _ in running:
                entry.forget_times()
        elif done + 1 >= LEAST_ROUNDS:
            keep(entries)
    for entry, _ in running:
        if entry.why is None and len(entry.loops) < LEAST_ROUNDS:
            entry.why = "another contender's error cost all of them their device"
    return entries


def take_turns(running: Sequence[tuple[Entry, Trajectory]], cases: Mapping[bool, Case]) -> bool:
    """A trajectory of each; False where an error made the device of no use to anybody in this process."""
    for entry, run in running:
        if (
            entry.why is None
            and not take_turn(entry, cases[entry.rival.is_cached], run)
            and is_lost(cases[True].device)
        ):
            return False
    return True


def is_lost(device: torch.device) -> bool:
    """Whether all that anybody in this process does there fails from now on, as after an access to no memory."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def few(case: Case) -> Case:
    """The first samples, which do not depend on the others, where there are many: the truth takes long in float32."""
    return replace(case, samples=min(case.samples, JUDGED)) if not case.context else case


def take_turn(entry: Entry, case: Case, run: Trajectory) -> bool:
    """One trajectory of a contender, timed; whether it did well."""
    try:
        synchronize(case.device)
        note(entry, case, run())
    except Exception as error:  # whatever a rival or the memory may say; the others' times are not lost with it
        entry.why = words(error)
    return entry.why is None


def prepared(entry: Entry, case: Case, expected: Tensor, seconds: float) -> Trajectory | None:
    """A rival that ran once, and right or wrong by so much; None if it doesn't run, or takes longer than that."""
    absent = entry.rival.missing
    if absent:
        entry.why = f"needs {', '.join(absent)}"
        return None
    start, allocated = time.perf_counter(), allocated_bytes(case.device)
    try:
        with within(seconds):
            run = entry.rival.make(case)
            latents = run().latents
            synchronize(case.device)
    except Exception as error:  # whatever a rival, its compiler or the memory may say
        entry.why = words(error)
        if case.device.type == "cuda":  # a capture that failed leaves its stream the current one
            torch.cuda.set_stream(torch.cuda.default_stream())
        gc.collect()
        return None
    entry.setup_seconds = time.perf_counter() - start
    entry.error = relative_rms(latents[: len(expected)], expected)
    if case.device.type == "cuda":
        entry.peak_bytes = torch.cuda.max_memory_allocated() - allocated + weight_bytes(case.model)
    return run


def words(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def allocated_bytes(device: torch.device) -> int:
    """Now; from here on the peak is counted anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def needed_bytes(case: Case) -> int:
    """Weights, live caches, modulation, context, noise, a layer's activations: what our own loop can't do without."""
    shape, rows, itemsize = case.denoiser.shape, 2 * case.samples, case.dtype.itemsize
    caches = case.plan.cache_bytes(shape, rows, itemsize)
    vectors = 3 * len(shape.sites) + 2  # shift, scale, gate; of the head no gate
    modulation = vectors * len(case.plan) * case.conditions * shape.width * itemsize
    activations = ACTIVATIONS * rows * shape.slot_elements * itemsize
    return weight_bytes(case.model) + caches + modulation + context_bytes(case) + case.noise.nbytes + activations


def context_bytes(case: Case) -> int:
    """Of what is given besides latents, and of the text's keys and values where layers attend to it apart."""
    given = [one for one in case.context if one is not None]
    attending = sum(site.branch is Branch.CROSS_ATTN for site in case.plan.sites)
    text = math.prod(given[0].shape[:2]) if given else 0
    return sum(one.nbytes for one in given) + 2 * attending * text * case.denoiser.shape.width * case.dtype.itemsize


def truth(case: Case) -> Tensor:
    """The latents by the method's definition, in float32 or better, without TF32."""
    model = case.model if case.dtype == torch.float64 else deepcopy(case.model).float()
    with plain.float32_products("ieee"):
        return method(replace(case, model=model))().latents


def relative_rms(ours: Tensor, theirs: Tensor) -> float:
    """The size of the difference over the size of what was expected."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def note(entry: Entry, case: Case, run: Run) -> None:
    """Keep a trajectory's time, and the medians of its steps by type."""
    began = run.marks[0] if run.began is None else run.began
    entry.loops.append(seconds_between(began, run.marks[-1]))
    entry.hosts.append(run.host_seconds / len(case.plan))
    by_type: Mapping[str, list[float]] = defaultdict(list)
    done = 0
    lengths = run.steps or (1,) * len(case.plan)
    for (start, end), steps in zip(pairwise(run.marks), lengths, strict=True):
        name, *others = {step_type.name for step_type in case.types[done : done + steps]}
        if not others:
            by_type[name if steps == 1 else f"run of {steps} {name}"].append(seconds_between(start, end))
        done += steps
    for name, seconds in by_type.items():
        entry.steps[name].append(statistics.median(seconds))


def synchronize(device: torch.device) -> None:
    """Wait for the device to be idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
