"""Runs of equal labels or prompts that take turns on one model, held against each run alone.

What is begun, goes on, visits a timestep twice, is given up and begun again, with tensors that runs share, hold each
for itself, or make anew at each step. A call is what its run gets alone, or is counted and computed in full.
"""

import copy
from collections import Counter
from functools import cache
from typing import Any

import torch
from diffusers_kinds import DIT, SIGMA, TYPES, Kind, table_of, timesteps
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from tiny import relative_error
from torch import Tensor

from ebcache_fast import enable, stats
from ebcache_fast.dropin.decision import ALIKE, FRESH, GAVE_WAY

STEPS = len(TYPES)
RUNS = 4  # at a time
WAYS = ("shared", "shared", "made anew", "own")  # the first most often: what can't be told apart is hardest
KINDS = {"DiT": DIT, "PixArt": SIGMA}


@cache
def _pipeline(kind: Kind) -> Any:
    pipe = kind.pipeline()
    pipe.transformer.double()
    return pipe


@cache
def _call(kind: Kind, row: int) -> dict[str, Any]:
    """The arguments for a label, or a prompt, but for latents."""
    given = kind.call(kind.pipeline(), (row,))
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
        if name != "hidden_states"
    }


def own(call: dict[str, Any]) -> dict[str, Any]:
    """The same, in other tensors."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}


@torch.no_grad()
def ask(model: Any, call: dict[str, Any], t: int, seed: int) -> Tensor:
    """One call of the module, with latents of this seed."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given = call | dict(hidden_states=x, timestep=torch.full((1,), t), return_dict=False)
    out: Tensor = model(**given)[0]
    return out


class Run:
    """One run, and a model of its own that makes the same calls alone."""

    def __init__(self, machine: "Machine", row: int, way: str, call: dict[str, Any]) -> None:
        self.machine, self.row, self.way, self.call = machine, row, way, call
        self.alone, self.alone_call = copy.deepcopy(machine.fresh), own(call)
        self.next_step = 0
        self.comes_back = False  # it has visited a timestep twice

    def step(self, step: int) -> bool:
        """One call; whether the run goes on after it."""
        machine = self.machine
        t, seed = machine.ts[step], machine.calls
        machine.calls += 1
        call = own(self.call) if self.way == "made anew" else self.call
        before = machine.counted
        ours = ask(machine.model, call, t, seed)
        del call
        why = [*(machine.counted - before)]
        if why and why[0] in (GAVE_WAY, FRESH):
            self.alone = copy.deepcopy(machine.fresh)  # it goes on from here alone, too
        theirs = ask(self.alone, self.alone_call, t, seed)
        if why and why[0] == ALIKE:
            theirs = ask(machine.plain, self.call, t, seed)
        assert relative_error(ours, theirs) < 1e-12, (self.way, step, why)
        assert self.way != "own" or why != [ALIKE]
        self.comes_back |= step < self.next_step
        self.next_step = step + 1
        return self.next_step < STEPS


def machine_of(kind: Kind) -> type["Machine"]:
    """The machine for models of this kind."""
    return type(f"{kind.name} machine", (Machine,), {"kind": kind})


class Machine(RuleBasedStateMachine):
    """What happens to the runs. ``turns`` counts calls while others are in progress."""

    kind = DIT
    turns = 0
    alike = 0

    def __init__(self) -> None:
        super().__init__()
        pipe = copy.copy(_pipeline(self.kind))
        self.ts, self.plain = timesteps(pipe), pipe.transformer
        table = table_of(pipe)
        self.model, self.fresh = (enable(copy.deepcopy(self.plain), table, max_trajectories=n) for n in (RUNS - 1, 4))
        self.shared = [own(_call(self.kind, row)) for row in range(2)]
        self.live: list[Run] = []
        self.over: list[Run] = []
        self.calls = 0

    @property
    def counted(self) -> Counter[str]:
        """What was computed in full so far, by reason; nothing may be the model's own."""
        done = stats(self.model)
        assert not done.originals
        return Counter(done.refreshed)

    def _step(self, run: Run, step: int) -> None:
        type(self).turns += len(self.live) > 1
        if not run.step(step):
            self.live.remove(run)
            self.over += [run] * run.comes_back

    @precondition(lambda self: len(self.live) < RUNS)
    @rule(row=st.sampled_from((0, 0, 0, 1)), way=st.sampled_from(WAYS), steps=st.integers(1, 3))
    def begin(self, row: int, way: str, steps: int) -> None:
        call = self.shared[row] if way == "shared" else own(_call(self.kind, row))
        run = Run(self, row, way, call)
        self.live.append(run)
        for step in range(steps):
            self._step(run, step)

    @precondition(lambda self: any(run.next_step > 1 for run in self.live) and len(self.live) < RUNS)
    @rule(place=st.integers(0, RUNS - 1), visits_twice=st.booleans())
    def begin_behind(self, place: int, visits_twice: bool) -> None:
        """Another run of one's very tensors comes to stand just before it, which may visit its last step again."""
        far = [run for run in self.live if run.next_step > 1]
        first = far[place % len(far)]
        first.way = "shared" if first.way == "own" else first.way
        run = Run(self, first.row, first.way, first.call)
        self.live.append(run)
        for step in range(first.next_step - 1):
            self._step(run, step)
        if visits_twice:
            self._step(first, first.next_step - 1)

    @precondition(lambda self: self.live)
    @rule(order=st.lists(st.integers(0, RUNS - 1), min_size=1, max_size=8))
    def go_on(self, order: list[int]) -> None:
        for place in order:
            if self.live:
                run = self.live[place % len(self.live)]
                self._step(run, run.next_step)

    @precondition(lambda self: self.live)
    @rule(place=st.integers(0, RUNS - 1))
    def visit_twice(self, place: int) -> None:
        run = self.live[place % len(self.live)]
        if run.next_step == 1 and run.way == "own":
            run.way = "shared"  # by two runs that begin, as far as anybody can see
        self._step(run, run.next_step - 1)

    @precondition(lambda self: self.over)
    @rule()
    def visit_the_last_twice(self) -> None:
        self.over.pop().step(STEPS - 1)

    @precondition(lambda self: self.live)
    @rule(place=st.integers(0, RUNS - 1))
    def give_up(self, place: int) -> None:
        self.live.pop(place % len(self.live))

    @precondition(lambda self: self.live)
    @rule(place=st.integers(0, RUNS - 1))
    def begin_again(self, place: int) -> None:
        """Another run with the very tensors of one that is given up."""
        before = self.live.pop(place % len(self.live))
        run = Run(self, before.row, "shared" if before.way == "own" else before.way, before.call)
        self.live.append(run)
        self._step(run, 0)
