"""What a profiled run shows: the ranges around its parts, and the time of each dispatch. Its results stay the same."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, CPU, NO
from fake_graphs import FakeGraphs
from tiny import tiny_dit
from torch import Tensor, nn

from ebcache_fast.apps import profile as profile_job
from ebcache_fast.apps import profiling
from ebcache_fast.apps.profile import profile_into
from ebcache_fast.apps.profiling import Probe, ProfiledEngine, Recorder, annotated, time_run, trace_run
from ebcache_fast.apps.timeline import Timeline
from ebcache_fast.engine.graphs import Graphs, no_graphs
from ebcache_fast.errors import InputError, JobError
from ebcache_fast.ops import operations as ops
from ebcache_fast.plan import StepType
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.sampling import sample

TABLE = CacheTable([999, 700, 400, 200, 0], [NO, ATTN_MLP, ATTN_MLP, ATTENTION, NO])
DISPATCHES = ["NO_CACHE", "ATTN_MLP", "ATTENTION", "NO_CACHE"]
NORM, EMBED, HEAD = "gated_residual_norm_modulate", "embedding / embed_norm_modulate", "head / head_update"


def run(
    model: nn.Module, probe: Probe, make_graphs: Callable[[torch.device], Graphs | None] = no_graphs
) -> Callable[[], Tensor]:
    """The same run over and over, on one engine."""
    engine = ProfiledEngine(model, probe, make_graphs=make_graphs)
    return lambda: sample(model, [1, 3], table=TABLE, engine=engine)


def recorded(once: Callable[[], Tensor], probe: Probe) -> list[str]:
    """The ranges of one run."""
    recorder = Recorder()
    probe.around = recorder
    once()
    return recorder.paths


def by_dispatch(paths: list[str]) -> list[list[str]]:
    """The ranges inside of each dispatch, without its own name before them."""
    found: list[list[str]] = []
    for path in paths:
        first, _, rest = path.partition(" / ")
        if first in StepType.__members__:
            found.append([]) if not rest else found[-1].append(rest)
    return found


def test_ranges_of_an_eager_run() -> None:
    """Step type, part of the layer, operation, each inside the one before."""
    probe = Probe()
    paths = recorded(run(tiny_dit(), probe), probe)
    assert [path for path in paths if "/" not in path] == ["modulation", *DISPATCHES]
    full, summed, half, _ = by_dispatch(paths)
    assert full == [
        *("embedding", EMBED, "layer 0 attention"),
        *(NORM, "layer 0 MLP"),
        *(NORM, "layer 1 attention"),
        *(NORM, "layer 1 MLP"),
        *("head", HEAD),
    ]
    assert summed == ["gated_sum", "run_update"]
    assert [name for name in half if "layer" in name] == ["layer 0 MLP", "layer 1 MLP"]


def test_ranges_of_ends_with_hooks() -> None:
    """They run as modules, in ranges of the same names."""
    model, probe = tiny_dit(), Probe()
    model.x_embedder.proj.register_forward_hook(lambda *_: None)
    full = by_dispatch(recorded(run(model, probe), probe))[0]
    assert (full[0], full[-1]) == ("embedding", "head")


def test_a_replay_has_the_range_of_its_type_alone() -> None:
    probe, graphs = Probe(), FakeGraphs()
    once = run(tiny_dit(), probe, lambda _: graphs)
    expected = once()  # captures
    replays = graphs.replays
    assert recorded(once, probe) == ["modulation", *DISPATCHES]
    assert graphs.replays - replays == len(DISPATCHES)
    assert torch.equal(once(), expected)


def test_a_whole_trajectory_is_one_range() -> None:
    probe, graphs = Probe(), FakeGraphs()
    options = profiling.EngineOptions(whole_trajectory=True)
    engine = ProfiledEngine(tiny_dit(), probe, options, make_graphs=lambda _: graphs)
    paths = recorded(lambda: sample(engine.model, [1], table=TABLE, engine=engine), probe)
    assert paths[-1] == "trajectory"


def test_results_stay_the_same() -> None:
    model, probe = tiny_dit(), Probe(Recorder())
    assert torch.equal(run(model, probe)(), sample(model, [1, 3], table=TABLE))


def test_new_weights_are_seen_through_the_probe_as_well() -> None:
    model, probe = tiny_dit(), Probe()
    once = run(model, probe)
    before = recorded(once, probe)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert recorded(once, probe) == before


def test_operations_that_are_not_there_stay_away() -> None:
    recorder = Recorder()
    found = annotated(ops.TORCH, recorder)
    assert found.implementations() == ops.TORCH.implementations()
    assert recorder.paths == []


def test_a_range_ends_with_an_error() -> None:
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError), recorder("a"), recorder("b"):
        raise ZeroDivisionError
    with recorder("c"):
        pass
    assert recorder.paths == ["a", "a / b", "c"]


# ------------------------------------------------------------------------------------------------------- time


def test_dispatches_are_timed() -> None:
    probe, graphs = Probe(), FakeGraphs()
    for once, replayed in (run(tiny_dit(), probe), False), (run(tiny_dit(), probe, lambda _: graphs), True):
        once()
        spans = time_run(once, probe, CPU)
        assert [span.step_types for span in spans] == [("NO_CACHE",), ("ATTN_MLP",) * 2, ("ATTENTION",), ("NO_CACHE",)]
        assert {span.replayed for span in spans} == {replayed}
        ends = [span.start + span.cost for span in spans]
        assert spans[0].start == 0
        assert all(span.cost > 0 for span in spans)
        assert all(end <= span.start for end, span in zip(ends, spans[1:], strict=False))


def test_the_time_is_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by a quarter of a second whenever somebody looks."""
    seconds = iter(range(100))
    monkeypatch.setattr(profiling, "perf_counter", lambda: next(seconds) / 4)
    probe = Probe()
    spans = time_run(run(tiny_dit(), probe), probe, CPU)
    assert [(span.start, span.cost) for span in spans] == [(500.0 * i, 250.0) for i in range(4)]


def test_a_probe_is_clear_after_a_failure(tmp_path: Path) -> None:
    probe = Probe()

    def fails() -> None:
        raise InputError("no")

    for profiled in (
        lambda: time_run(fails, probe, CPU),
        lambda: trace_run(fails, probe, CPU, tmp_path / "trace.json"),
    ):
        with pytest.raises(InputError):
            profiled()
        assert probe == Probe()
    assert list(tmp_path.iterdir()) == []


class Card:
    """Stands in for torch.cuda: notes what is asked of it."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        self.seen.append(name)
        yield

    @contextmanager
    def profile(self) -> Iterator[None]:
        self.seen.append("start")
        yield
        self.seen.append("stop")

    def synchronize(self, device: torch.device) -> None:
        self.seen.append("wait")

    def event(self, device: torch.device) -> Any:
        self.seen.append("event")
        return profiling.HostEvent()


def test_a_gpu_is_profiled_between_start_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    monkeypatch.setattr(torch.cuda.nvtx, "range", card.range)
    monkeypatch.setattr(torch.cuda.profiler, "profile", card.profile)
    monkeypatch.setattr(torch.cuda, "synchronize", card.synchronize)
    monkeypatch.setattr(profiling, "_cuda_event", card.event)
    probe, graphs = Probe(), FakeGraphs()
    once = run(tiny_dit(), probe, lambda _: graphs)
    once()
    assert card.seen == []
    assert len(time_run(once, probe, torch.device("cuda"))) == len(DISPATCHES)
    each = [word for name in DISPATCHES for word in (name, "event", "event")]
    assert card.seen == ["wait", "start", "modulation", *each, "wait", "stop"]


# ------------------------------------------------------------------------------------------------------- files


def test_the_job(tmp_path: Path) -> None:
    model = tiny_dit(dtype=torch.float32)
    timeline, written = profile_into(tmp_path / "out", model, [0, 1], TABLE, {"model": "tiny", "table": "mine"})
    assert [path.name for path in written] == ["timeline.json", "timeline.png", "trace.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in written]
    assert Timeline.load(written[0]) == timeline
    assert timeline.step_types == tuple(step_type.name for step_type in TABLE.step_types)
    assert timeline.about.items() >= {"model": "tiny", "table": "mine", "samples": 2, "dtype": "torch.float32"}.items()
    events = json.loads(written[2].read_text())["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [name for name in ranges if name in StepType.__members__] == DISPATCHES
    assert {"layer 1 MLP", "gated_sum", "embedding"} <= set(ranges)


@pytest.mark.parametrize("folder", ["plain", 'of "quotes" and ü', "back\\slash"])
def test_a_trace_says_the_name_of_its_file(folder: str, tmp_path: Path) -> None:
    path = tmp_path / folder / "mine.json"
    path.parent.mkdir()
    trace_run(lambda: torch.ones(2) + 1, Probe(), CPU, path)
    assert json.loads(path.read_text())["traceName"] == str(path)
    assert [each.name for each in path.parent.iterdir()] == ["mine.json"]


def test_a_trace_that_the_profiler_could_not_finish_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_: object, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", half)
    with pytest.raises(JobError, match=r"trace\.json: can't be written: the profiler could not write all of it"):
        trace_run(lambda: torch.ones(2) + 1, Probe(), CPU, tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("eager", [False, True])
def test_one_run_is_timed_after_one_that_warms_up(eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[AbstractContextManager[object]] = []
    graphs = FakeGraphs()

    def counted(*args: Any, **arguments: Any) -> Tensor:
        runs.append(arguments["engine"]._probe.watch)
        return sample(*args, **arguments)

    monkeypatch.setattr(profile_job, "sample", counted)
    monkeypatch.setattr(profile_job, "cuda_graphs", lambda _: graphs)
    timeline, written = profile_into(tmp_path, tiny_dit(), [0], TABLE, {}, eager=eager, trace=False)
    assert [isinstance(watch, profiling.Stopwatch) for watch in runs] == [False, True]
    assert {span.replayed for span in timeline.spans} == {not eager}
    assert len(written) == 2


def test_an_unwritable_folder_is_found_before_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_job, "sample", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    with pytest.raises(JobError):
        profile_into(tmp_path / "file", tiny_dit(), [0], TABLE, {})


@pytest.mark.gpu
def test_the_job_on_a_gpu(tmp_path: Path) -> None:
    model = tiny_dit(dtype=torch.float32).cuda()
    for eager in (False, True):
        timeline, _ = profile_into(tmp_path, model, [0, 1], TABLE, {}, eager=eager)
        assert {span.replayed for span in timeline.spans} == {not eager}
        assert all(span.cost > 0 for span in timeline.spans)
