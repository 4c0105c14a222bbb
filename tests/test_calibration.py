"""`calibrate`: one table for one call, resumable, and at the cost that was asked for."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import CLASSES, naive_timesteps, tiny_dit

from ebcache_fast.calibration.algorithm1 import Algorithm1, tally_batch
from ebcache_fast.calibration.search import calibrate
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.errors import EBCacheError, InputError, JobError
from ebcache_fast.models import DiT, DiTDenoiser
from ebcache_fast.plan import StepType
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.samplers import make_sampler, trajectory_noise
from ebcache_fast.sampling import sample

STEPS = 8
CALL = {
    "samples": 10,
    "steps": STEPS,
    "batch_size": 4,
    "seed": 7,
    "algorithm": Algorithm1(a=0.002, k=0.02, max_run=None),
}


@cache
def model() -> DiT:
    return tiny_dit(6)


@cache
def table() -> CacheTable:
    return calibrate(model(), **CALL)


def speedup(made: CacheTable) -> float:
    shape = DiTDenoiser(model()).shape
    return made.plan(shape).mac_limit(shape)


# ------------------------------------------------------------------------------------------------- the table


def test_votes_and_errors_are_those_of_all_samples_together() -> None:
    sampler, labels = make_sampler("ddpm", STEPS), torch.arange(10) % CLASSES
    noise = trajectory_noise(7, range(10), STEPS, (4, 8, 8), torch.float64)
    tally = tally_batch(DiTDenoiser(model()), labels, noise, sampler, Guidance(1.5), 1.0, CALL["algorithm"])
    made = table().made
    assert made is not None
    names = ("NO_CACHE", "ATTENTION", "ATTN_MLP")
    assert [made.votes[name] for name in names] == [tuple(column) for column in tally.votes.T.tolist()]
    for name in names[1:]:
        means = tally.mean_errors(StepType[name])
        assert made.errors[name][2:-1] == pytest.approx(means[2:-1], rel=1e-9)
        assert [made.errors[name][i] for i in (0, 1, -1)] == [None] * 3
    assert list(table().step_types) == tally.winners(None)
    assert len(set(table().step_types)) > 1  # a table worth testing


def test_the_table_says_what_it_is_for_and_how_it_was_made() -> None:
    made = table()
    assert made.timesteps == tuple(naive_timesteps(STEPS))
    assert dict(made.model or ()) == dict(DiTDenoiser(model()).shape.sizes)
    assert made.sampler is not None
    assert (made.sampler.name, made.sampler.steps, made.sampler.train_steps) == ("ddpm", STEPS, 1000)
    assert made.made is not None
    assert made.made.by == "ebcache_fast.calibrate"
    expected = {"a": 0.002, "k": 0.02, "samples": 10, "batch_size": 4, "seed": 7, "cfg_scale": 1.5}
    expected |= {"criterion": "vector", "norm": "rms", "compare_scaled": True, "max_run": None}
    assert expected.items() <= made.made.options.items()


def test_the_same_call_makes_the_same_table() -> None:
    assert calibrate(model(), **CALL) == table()
    assert calibrate(model(), **(CALL | {"seed": 8})) != table()


def test_the_file_keeps_errors_and_votes(tmp_path: Path) -> None:
    table().save(tmp_path / "table.json")
    loaded = CacheTable.load(tmp_path / "table.json")
    assert loaded == table()
    assert loaded.made == table().made


def test_the_table_can_be_sampled_with() -> None:
    assert bool(sample(model(), [1, 2], table=table()).isfinite().all())


def test_labels_are_taken_in_turn() -> None:
    repeated = [1, 3, 1, 3, 1, 3, 1, 3, 1, 3]
    assert calibrate(model(), **CALL, labels=[1, 3]) == calibrate(model(), **CALL, labels=repeated)
    assert calibrate(model(), **CALL, labels=torch.tensor([1, 3])) != table()


def test_a_model_whose_branches_do_nothing_has_errors_of_zero() -> None:
    fresh = DiT(input_size=8, patch_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=CLASSES)
    made = calibrate(fresh, method="algorithm1", samples=2, steps=5).made
    assert made is not None
    assert made.errors["ATTENTION"] == (None, None, 0.0, 0.0, None)


@pytest.mark.parametrize("b", [0.95, 1.05])
def test_the_table_carries_the_scale(b: float) -> None:
    made = calibrate(model(), method="algorithm1", samples=2, steps=5, eps_scale=b, allow_amplify=b > 1)
    assert (made.eps_scale, made.allow_amplify) == (b, b > 1)


# ------------------------------------------------------------------------------------------------ a target cost


FEW = CALL | {"samples": 3}


def test_a_target_keeps_the_ratio_of_the_thresholds() -> None:
    made = calibrate(model(), **FEW, target_speedup=1.3).made
    assert made is not None
    assert made.options["k"] / made.options["a"] == pytest.approx(10)


# --------------------------------------------------------------------------------------------------- resumption


def interrupted(path: Path, after: int, **changes: object) -> None:
    """Run the call until ``after`` steps of batches are done."""
    done: list[int] = []

    def stop(count: int) -> None:
        done.append(count)
        if len(done) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model(), **(CALL | changes), progress_file=path, on_step=stop)


@pytest.mark.parametrize("after", [1, STEPS, STEPS + 3, 2 * STEPS, 3 * STEPS - 1])
def test_an_interrupted_call_resumes_where_it_stopped(after: int, tmp_path: Path) -> None:
    path, heard = tmp_path / "progress.json", []
    interrupted(path, after)
    assert calibrate(model(), **CALL, progress_file=path, on_step=heard.append) == table()
    finished = (after - 1) // STEPS  # a batch whose last step is interrupted does not count
    assert heard == [4] * STEPS * (2 - finished) + [2] * STEPS
    assert [file.name for file in tmp_path.iterdir()] == ["progress.json"]


def test_a_finished_call_is_not_run_again(tmp_path: Path) -> None:
    path, heard = tmp_path / "progress.json", []
    for _ in range(2):
        assert calibrate(model(), **CALL, progress_file=path, on_step=heard.append) == table()
    assert len(heard) == 3 * STEPS


def test_a_search_resumes_too(tmp_path: Path) -> None:
    path, all_steps, rest = tmp_path / "progress.json", [], []
    tight = Algorithm1(a=0.0002, k=0.002, max_run=None)  # so that several thresholds are tried
    call = FEW | {"batch_size": 2, "target_speedup": 1.3, "algorithm": tight}
    expected = calibrate(model(), **call, on_step=all_steps.append)
    half = len(all_steps) // (2 * STEPS) * STEPS
    interrupted(path, half + 1, **call)
    resumed = calibrate(model(), **call, progress_file=path, on_step=rest.append)
    assert resumed == expected
    assert len(rest) == len(all_steps) - half


OTHER_CALLS: dict[str, tuple[dict[str, object], str]] = {
    "seed": ({"seed": 8}, "seed 7, not 8"),
    "samples": ({"samples": 12}, "samples 10, not 12"),
    "batch size": ({"batch_size": 5}, "batch_size 4, not 5"),
    "sampler": ({"sampler": "ddim"}, "sampler 'ddpm', not 'ddim'"),
    "steps": ({"steps": 9}, "steps 8, not 9"),
    "guidance": ({"cfg_scale": 2.0}, "cfg_scale 1.5, not 2.0"),
    "guided channels": ({"guided_channels": 4}, "guided_channels 3, not 4"),
    "scale": ({"eps_scale": 0.9}, "eps_scale 1.0, not 0.9"),
    "criterion": ({"algorithm": Algorithm1(max_run=None, criterion="norm")}, "criterion 'vector', not 'norm'"),
    "labels": ({"labels": [2]}, r"labels_crc32 \d+, not \d+"),
}


@pytest.mark.parametrize(("changes", "difference"), OTHER_CALLS.values(), ids=OTHER_CALLS)
def test_another_calls_file_is_refused_and_the_difference_named(changes: dict, difference: str, tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    interrupted(path, STEPS + 1)
    before = path.read_bytes()
    with pytest.raises(JobError, match=f"{path} belongs to a calibration with .*{difference}") as caught:
        calibrate(model(), **(CALL | changes), progress_file=path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "difference"),
    [(lambda: tiny_dit(6, num_heads=4), "num_heads 2, not 4"), (lambda: tiny_dit(60), "weights_crc32")],
    ids=["sizes", "weights"],
)
def test_another_models_file_is_refused(other: Callable[[], DiT], difference: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "progress.json", STEPS + 1)
    with pytest.raises(JobError, match=difference):
        calibrate(other(), **CALL, progress_file=tmp_path / "progress.json")


def test_other_thresholds_share_a_file(tmp_path: Path) -> None:
    interrupted(tmp_path / "progress.json", STEPS + 1)
    looser = CALL | {"algorithm": Algorithm1(a=1.0, k=0, max_run=None)}
    assert calibrate(model(), **looser, progress_file=tmp_path / "progress.json") == calibrate(model(), **looser)


DAMAGE: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: "calibration",
    "not text": lambda text: b"\xff\xfe\x00",
    "a list": lambda text: "[]",
    "nested too deep": lambda text: "[" * 100_000,
    "no call": lambda text: text.replace('"call"', '"cell"'),
    "no tallies": lambda text: text.replace('"tallies"', '"rallies"'),
    "no votes": lambda text: text.replace('"votes"', '"notes"'),
    "votes of words": lambda text: text.replace('"votes": [[4', '"votes": [["four"'),
    "votes beyond 64 bits": lambda text: text.replace('"votes": [[4', f'"votes": [[{10**30}'),
    "a vote too many": lambda text: text.replace('"votes": [[4', '"votes": [[5'),
    "votes below zero": lambda text: text.replace('"votes": [[4, 0, 0]', '"votes": [[5, -1, 0]'),
    "a row missing": lambda text: text.replace('"votes": [[4, 0, 0], ', '"votes": ['),
    "a ragged row": lambda text: text.replace('"votes": [[4, 0, 0], ', '"votes": [[4, 0], '),
    "errors of nothing": lambda text: text.replace('"errors": [[0.0', '"errors": [[null'),
    "errors below zero": lambda text: text.replace('"errors": [[0.0', '"errors": [[-0.5'),
    "errors without end": lambda text: text.replace('"errors": [[0.0', '"errors": [[1e999'),
    "samples without end": lambda text: text.replace('"samples": 4', '"samples": 1e999'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_one_typed_line(damage: Callable[[str], str | bytes], tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    interrupted(path, STEPS + 1)
    good = path.read_text()
    bad = damage(good)
    assert bad != good
    path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    with pytest.raises(JobError, match=str(path)) as caught:
        calibrate(model(), **CALL, progress_file=path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_written_is_one_typed_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    for place in (tmp_path / "missing" / "progress.json", tmp_path / "file" / "progress.json", tmp_path):
        with pytest.raises(JobError, match=str(place)) as caught:
            calibrate(model(), **CALL, progress_file=place)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no samples": ({"samples": 0}, "samples=0"),
    "no batch": ({"batch_size": 0}, "batch_size=0"),
    "amplified": ({"eps_scale": 1.05}, "eps_scale=1.05.*allow_amplify"),
    "scale nan": ({"eps_scale": math.nan}, "eps_scale=nan"),
    "label": ({"labels": [CLASSES]}, "label 5 is outside"),
    "no label": ({"labels": []}, "at least one"),
    "sampler": ({"sampler": "euler"}, "'euler' is unknown"),
    "steps": ({"steps": 0}, "steps=0"),
    "guidance": ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_typed_line(changes: dict, message: str) -> None:
    with pytest.raises(EBCacheError, match=message) as caught:
        calibrate(model(), **(CALL | changes))
    assert type(caught.value) is InputError
    assert "\n" not in str(caught.value)


def test_votes_in_float8_are_of_float8_and_say_so(tmp_path: Path) -> None:
    """Errors of another precision, near those without; and the one's votes are not counted on for the other's."""
    model, progress = tiny_dit(dtype=torch.float32), tmp_path / "progress.json"
    made = {
        fp8: calibrate(
            model, method="algorithm1", samples=2, steps=6, fp8=fp8, progress_file=progress if fp8 else None
        ).made
        for fp8 in (False, True)
    }
    plain, rounded = (torch.tensor(made[fp8].errors["ATTN_MLP"][2:5]) for fp8 in (False, True))
    assert not torch.equal(plain, rounded)
    torch.testing.assert_close(plain, rounded, rtol=0.2, atol=0)
    assert made[True].options["fp8"] is True
    assert "fp8" not in made[False].options
    with pytest.raises(JobError, match="belongs to a calibration with"):
        calibrate(model, method="algorithm1", samples=2, steps=6, progress_file=progress)
