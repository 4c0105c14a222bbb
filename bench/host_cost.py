"""What one step costs the host, outside of the replay of its graph and of the fingerprint of the weights.

    python -m bench.host_cost [--rounds 40] [--out FILE]

On a CPU, with graphs whose replay does nothing: a model of DiT-XL/2's 28 layers and tiny width, in our own loop and
behind `ebcache_fast.enable`. The three ways take turns, a run of 50 steps each; a round's figure is the median of its
steps but the first and the last, which begin and end the run, and what is told are the median and the quartiles of the
rounds. The drop-in's tensor operations (reading x, t and y, copying x in and the output out) are part of its figure: on
a CPU they run at once, where a GPU's host would only launch them.

The fingerprint is timed within each call and subtracted. It takes far longer than the step, and steps after it are
slower than the same steps back to back with a fingerprint that was made before, which are told beside it.

It writes bench/results/host-cost.json.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ebcache_fast import enabled
from ebcache_fast.apps.report import machine
from ebcache_fast.dropin import cached_forward, eligibility
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.graphs import Graph
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.module_watch import ModuleState, Watch
from ebcache_fast.models import DiT
from ebcache_fast.plan import Branch, Plan, StepType, layered
from ebcache_fast.samplers import make_sampler, trajectory_noise

OUT = Path(__file__).resolve().parent / "results" / "host-cost.json"
LAYERS, STEPS, TARGET_US, CFG_SCALE = 28, 50, 50.0, 1.5
LATENTS = 4, 8, 8
TURN = (StepType.NO_CACHE, StepType.ATTENTION, StepType.ATTN_MLP)  # no step joins a run: each is a dispatch
OWN_LOOP, DEFAULT, IN_ORDER = "our own loop", "drop-in", "drop-in, in_order=True"


class Step(NamedTuple):
    """Seconds of one step on the host."""

    whole: float
    fingerprint: float = 0.0


Run = Callable[[], Iterator[Step]]  # of all steps in order


class EmptyGraphs:
    """A graph backend that captures nothing, and whose graphs do nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capture(self, body: Callable[[], None], static: Sequence[Tensor]) -> Graph:
        return self

    def replay(self) -> None:
        pass


EmptyEngine = partial(Engine, make_graphs=EmptyGraphs)


class TimedWatch(Watch):
    """A `Watch`, and how long its last look took."""

    seconds = 0.0

    def look(self) -> ModuleState:
        start = time.perf_counter()
        found = super().look()
        self.seconds = time.perf_counter() - start
        return found


class KnowingWatch(Watch):
    """A `Watch` that looked once, and knows from then on."""

    seconds = 0.0

    def look(self) -> ModuleState:
        return self._seen or super().look()


def make_model() -> tuple[nn.Module, Plan]:
    """Many layers, and next to nothing in them; a plan of single steps for it."""
    sizes = {"input_size": LATENTS[1], "patch_size": 4, "in_channels": LATENTS[0], "num_classes": 5}
    model = DiT(hidden_size=16, depth=LAYERS, num_heads=2, **sizes).eval().requires_grad_(False)
    types = [TURN[i % len(TURN)] for i in range(STEPS)]
    timesteps = make_sampler("ddpm", STEPS).timesteps
    return model, Plan.from_types(types, timesteps, layered(LAYERS, (Branch.SELF_ATTN, Branch.MLP)))


def own_loop(engine: Engine, plan: Plan) -> Iterator[Step]:
    """`Trajectory.advance`, as `ebcache_fast.sample` calls it."""
    noise = trajectory_noise(0, range(1), STEPS, LATENTS)
    rows = torch.tensor(make_sampler("ddpm", STEPS).rows)
    with engine.sampling(plan, torch.tensor([1]), Guidance(CFG_SCALE), rows, noise) as trajectory:
        for _ in plan.steps:
            start = time.perf_counter()
            trajectory.advance()
            yield Step(time.perf_counter() - start)


@torch.no_grad()
def calls(model: nn.Module, plan: Plan, watch: TimedWatch | KnowingWatch) -> Iterator[Step]:
    """One guided call of the enabled model a step."""
    x, y = torch.randn(2, *LATENTS), torch.tensor([1, 5])
    for t in plan.timesteps:
        step = torch.tensor([t, t])
        start = time.perf_counter()
        model.forward_with_cfg(x, step, y, CFG_SCALE)
        yield Step(time.perf_counter() - start, watch.seconds)


@contextmanager
def dropped_in(watch: type[TimedWatch] | type[KnowingWatch], *, in_order: bool) -> Iterator[Run]:
    """Runs of an enabled model of its own, looked at by ``watch``."""
    model, plan = make_model()
    with patch.object(eligibility, "Watch", watch), enabled(model, plan, in_order=in_order):
        looking = vars(model)[cached_forward.ATTRIBUTE].eligibility._watch

        def run() -> Iterator[Step]:
            with patch.object(cached_forward, "Engine", EmptyEngine):
                yield from calls(model, plan, looking)

        yield run


def our_own() -> AbstractContextManager[Run]:
    """Runs of our own loop."""
    model, plan = make_model()
    return nullcontext(partial(own_loop, EmptyEngine(model), plan))


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Microseconds a step, by way: without the fingerprint, the fingerprint's own, and without one to make at all."""
    with (
        our_own() as own,
        dropped_in(TimedWatch, in_order=False) as default,
        dropped_in(TimedWatch, in_order=True) as in_order,
        dropped_in(KnowingWatch, in_order=False) as default_warm,
        dropped_in(KnowingWatch, in_order=True) as in_order_warm,
    ):
        runs = own, default, in_order, default_warm, in_order_warm
        turns = [[list(run())[1:-1] for run in runs] for _ in range(rounds + 1)]
    loop, default_steps, in_order_steps, default_known, in_order_known = zip(*turns[1:], strict=True)  # 1st: warm-up
    return {
        OWN_LOOP: {"step_us": summary(loop)},
        DEFAULT: figures(default_steps, default_known),
        IN_ORDER: figures(in_order_steps, in_order_known),
    }


def figures(rounds: Sequence[Sequence[Step]], known: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """Of a drop-in, by rounds: with its fingerprint, and with one that was known."""
    fingerprints = [[Step(step.fingerprint) for step in steps] for steps in rounds]
    return {
        "step_us": summary(rounds),
        "fingerprint_us": summary(fingerprints),
        "step_us_with_known_fingerprint": summary(known),
    }


def summary(rounds: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """Of the rounds' medians, in microseconds, the fingerprint's part subtracted."""
    medians = [statistics.median(step.whole - step.fingerprint for step in steps) * 1e6 for steps in rounds]
    low, median, high = statistics.quantiles(medians, n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high], "least": min(medians)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    load = os.getloadavg()
    found = measure(args.rounds)
    for name, told in found.items():
        print(f"{name}:", ", ".join(f"{key} {value['median']:.1f}" for key, value in told.items()))
    report = {
        "layers": LAYERS, "steps": STEPS, "rounds": args.rounds, "target_us": TARGET_US, "ways": found,
        "included": "all that the host does from the call to its return, the drop-in's tensor operations too",
        "not_included": "the replay; the fingerprint of the weights; the first and the last step of a run",
        "machine": machine(), "load_average": {"start": load, "end": os.getloadavg()},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    main()
