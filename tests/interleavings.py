"""Runs that take turns on one machine, each step of which must have the bits of the same run alone.

Several models of different dtypes, each in our own loop and behind its own forward at once, over fake graphs. What
takes turns: steps, new runs, cancels, steps left out, failing replays, weights that change, other tables.
"""

from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from fake_graphs import FakeGraphs
from fake_runs import (
    SMALLEST,
    Job,
    bits,
    call,
    calls,
    eager_states,
    enable_over,
    engine_of,
    labels_of,
    no_graphs,
    over,
    plan_of,
    sampling,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from tiny import tiny_dit

from ebcache_fast import stats
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.trajectory import Trajectory
from ebcache_fast.errors import TrajectoryError
from ebcache_fast.models import DiT
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops import reference
from ebcache_fast.plan import Plan, StepType

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
OPERATIONS = replace(ops.TORCH, linear_gelu=reference.linear_gelu, attention=reference.attention)  # few and large
STEPS = 30  # events an example, at most
VERSIONS = 3  # of the weights
AT_ONCE = 3  # trajectories that an engine, or a drop-in, has memory for


# A plan's step types after the first, by number; the first three share memory and graphs.
WORDS = st.sampled_from(["222222222222222", "220222022202022", "002220222022220"]) | st.text("0123", max_size=15)
CHOICES = st.tuples(
    WORDS,
    st.sampled_from([(1,), (3,), (0,), (4, 1)]),  # labels
    st.sampled_from([1.0, 1.5, 4.0]),  # guidance scale
    st.sampled_from(["ddpm", "ddim"]),
    st.integers(0, 1),  # seed
)
Choice = tuple[str, tuple[int, ...], float, str, int]
SOME = st.lists(CHOICES, min_size=1, max_size=4)
KINDS, PLACES = st.integers(0, len(DTYPES) - 1), st.integers(0, 11)
ORDERS = st.lists(PLACES, min_size=4, max_size=32)


@lru_cache(4096)
def plan(word: str) -> Plan:
    """The plan for a word."""
    return plan_of([StepType(int(digit)) for digit in "0" + word], depth=1)


def job(choice: Choice, plan_of_all: Plan | None = None) -> Job:
    """The job for a choice."""
    word, labels, scale, sampler, seed = choice
    return Job(plan_of_all or plan(word), labels, scale, sampler=sampler, seed=seed)


@lru_cache(4096)
def weights(kind: int, version: int) -> DiT:
    """A model that nobody but the runs alone may touch."""
    return tiny_dit(version, DTYPES[kind], **SMALLEST, depth=1)


@lru_cache(4096)
def alone(kind: int, version: int, job: Job) -> list[bytes]:
    """The latents after each launch of our own loop, from an engine of its own."""
    return bits(eager_states(weights(kind, version), job, OPERATIONS))


@lru_cache(4096)
def answers_alone(kind: int, version: int, job: Job, start: int) -> list[bytes]:
    """The answers from step ``start`` on of a model that was just enabled."""
    model = tiny_dit(version, DTYPES[kind], **SMALLEST, depth=1)
    return bits(calls(enable_over(no_graphs, model, job.plan, OPERATIONS), job, start))


class Own:
    """A run of our own loop."""

    may_stray = True

    def __init__(self, subject: "Subject", job: Job) -> None:
        self.subject, self._expected = subject, alone(subject.kind, subject.version, job)
        self._end = ExitStack()
        self._trajectory: Trajectory = self._end.enter_context(sampling(subject.engine, job))
        self._launches = 0

    def step(self) -> bool:
        """One launch; whether the run goes on after it."""
        try:
            steps = self._trajectory.advance()
        except torch.OutOfMemoryError:  # the machine's
            self.cancel()
            return False
        if steps == 0:
            assert self._launches == len(self._expected)
            self.cancel()
            return False
        assert bits([self._trajectory.x]) == [self._expected[self._launches]]
        self._launches += 1
        return True

    def cancel(self) -> None:
        """End it, wherever it is."""
        self._end.close()


class Loop:
    """Somebody's own loop around a model's forward. ``start``: the last step that had to compute everything."""

    def __init__(self, subject: "Subject", job: Job) -> None:
        self.subject, self.job = subject, job
        self.next_step = 0
        self.start: int | None = None
        self.labels = labels_of(job)  # by which the drop-in tells it from others
        self.may_stray = not subject.trusts

    def step(self) -> bool:
        """One call; whether the run goes on after it."""
        subject = self.subject
        is_held = self in subject.held
        if subject.trusts and self.next_step > 0 and not (is_held and self.start == 0):
            return subject.refuses(self) if is_held else False
        subject.hold(self)
        if self.start is None or not is_held:
            self.start = self.next_step
        try:
            answer = call(subject.model, self.job, self.next_step, self.labels)
        except torch.OutOfMemoryError:  # the machine's; the call may be made again
            if subject.trusts or self.start == self.next_step:  # of what was to be filled nothing is kept
                del subject.held[self]
            return not subject.trusts
        expected = answers_alone(subject.kind, subject.version, self.job, self.start)
        assert bits([answer]) == [expected[self.next_step - self.start]]
        self.next_step += 1
        if self.next_step < len(self.job.plan):
            return True
        del subject.held[self]
        return False

    def leave_out(self) -> None:
        """Go on after the next step."""
        self.next_step, self.start = self.next_step + 1, None

    def cancel(self) -> None:
        """Nobody tells a model that a loop around it has ended."""


class Subject:
    """One model, with an engine for our own loop and another behind its forward."""

    def __init__(self, kind: int) -> None:
        self.kind, self.version = kind, 0
        self.model, self.graphs = tiny_dit(0, DTYPES[kind], **SMALLEST, depth=1), FakeGraphs()
        self.operations = self.graphs.wrap(OPERATIONS)
        self.engine = Engine(self.model, EngineOptions(max_trajectories=AT_ONCE), self.operations, over(self.graphs))
        self.live: list[Own | Loop] = []
        self.enable(plan("22"), trusts=False)

    def enable(self, plan: Plan, *, trusts: bool) -> None:
        """Put a plan behind the model's forward; loops around it end."""
        self.plan, self.trusts = plan, trusts
        self.held: OrderedDict[Loop, None] = OrderedDict()  # as the drop-in holds them
        self.live = [run for run in self.live if isinstance(run, Own)]
        options = {"in_order": trusts, "max_trajectories": AT_ONCE}
        enable_over(over(self.graphs), self.model, plan, self.operations, **options)

    def begin(self, job: Job) -> None:
        """Our own loop; at the limit, an error."""
        if sum(isinstance(run, Own) for run in self.live) == AT_ONCE:
            with pytest.raises(TrajectoryError):
                Own(self, job)
        else:
            self.live.append(Own(self, job))

    def begin_loop(self, job: Job) -> None:
        """A loop around the model, perhaps of the labels of others."""
        self.live.append(Loop(self, job))

    def hold(self, loop: Loop) -> None:
        """Do what the drop-in does at a call: the loop called longest ago gives way to a new one."""
        if loop not in self.held and len(self.held) == AT_ONCE:
            self.held.popitem(last=False)
        self.held[loop] = None
        self.held.move_to_end(loop)

    def refuses(self, loop: Loop) -> bool:
        """A loop that trusts its order is told that the weights changed."""
        with pytest.raises(TrajectoryError, match="weights changed"):
            call(self.model, loop.job, loop.next_step, loop.labels)
        del self.held[loop]
        return False

    @torch.no_grad()
    def change(self, version: int, *, moved: bool) -> None:
        """Other weights, in place or elsewhere; loops around the model go on."""
        for run in [run for run in self.live if isinstance(run, Own)]:
            run.cancel()
            self.live.remove(run)
        source = weights(self.kind, version).state_dict()
        self.model.load_state_dict({name: value.clone() for name, value in source.items()}, assign=moved)
        self.version = version
        for loop in self.live:
            loop.start = None


class Machine(RuleBasedStateMachine):
    """What happens to the runs, and after each event a few steps of theirs, in any order.

    ``turns`` counts steps of a run while others are in progress.
    """

    turns = 0

    def __init__(self) -> None:
        super().__init__()
        self._subjects: dict[int, Subject] = {}

    def _subject(self, kind: int) -> Subject:
        if kind not in self._subjects:
            self._subjects[kind] = Subject(kind)
        return self._subjects[kind]

    @property
    def live(self) -> list[Own | Loop]:
        """All runs in progress."""
        return [run for subject in self._subjects.values() for run in subject.live]

    def _take_turns(self, order: list[int]) -> None:
        for place in order:
            if live := self.live:
                type(self).turns += len(live) > 1
                run = live[place % len(live)]
                if not run.step():
                    run.subject.live.remove(run)

    @rule(kind=KINDS, choices=SOME, order=ORDERS)
    def begin(self, kind: int, choices: list[Choice], order: list[int]) -> None:
        for choice in choices:
            self._subject(kind).begin(job(choice))
        self._take_turns(order)

    @rule(kind=KINDS, choices=SOME, order=ORDERS)
    def begin_loops(self, kind: int, choices: list[Choice], order: list[int]) -> None:
        subject = self._subject(kind)
        for choice in choices:
            subject.begin_loop(job(choice, subject.plan))
        self._take_turns(order)

    @precondition(lambda self: self.live)
    @rule(place=PLACES, order=ORDERS)
    def cancel(self, place: int, order: list[int]) -> None:
        run = self.live[place % len(self.live)]
        if run.may_stray:
            run.cancel()
            run.subject.live.remove(run)
        self._take_turns(order)

    @precondition(lambda self: self.live)
    @rule(place=PLACES, order=ORDERS)
    def leave_out(self, place: int, order: list[int]) -> None:
        run = self.live[place % len(self.live)]
        if isinstance(run, Loop) and run.may_stray and 0 < run.next_step < len(run.job.plan) - 1:
            run.leave_out()
        self._take_turns(order)

    @rule(kind=KINDS, nodes=st.integers(0, 40), order=ORDERS)
    def fail(self, kind: int, nodes: int, order: list[int]) -> None:
        graphs = self._subject(kind).graphs
        graphs.fail_replay_at = graphs.replayed + nodes
        self._take_turns(order)

    @rule(kind=KINDS, version=st.integers(0, VERSIONS - 1), moved=st.booleans(), order=ORDERS)
    def change(self, kind: int, version: int, moved: bool, order: list[int]) -> None:
        self._subject(kind).change(version, moved=moved)
        self._take_turns(order)

    @rule(kind=KINDS, word=WORDS, trusts=st.booleans(), order=ORDERS)
    def enable(self, kind: int, word: str, trusts: bool, order: list[int]) -> None:
        self._subject(kind).enable(plan(word), trusts=trusts)
        self._take_turns(order)

    def teardown(self) -> None:
        for run in self.live:
            run.cancel()
        for subject in self._subjects.values():
            for engine in (subject.engine, engine_of(subject.model)):
                assert dict(engine.stats.eager) == {}
            assert dict(stats(subject.model).originals) == {}
