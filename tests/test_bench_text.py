"""The steps of PixArt and CogVideoX beside diffusers': all compute the method, and are told as they should be."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from constants import CPU
from depth import deep
from tiny import relative_error
from torch._dynamo.utils import counters
from torch.nn import functional as F

from bench import targets, text_cases, text_steps
from bench.report import rivals as told
from bench.report import tables
from bench.rivals import layouts, race
from bench.rivals.case import Case
from bench.rivals.rival import Rival
from bench.rivals.roster import OURS, TEXT_RIVALS
from bench.step_cases import EVERY_KIND
from ebcache_fast.plan import Branch, StepType

pytest.importorskip("diffusers")

H200 = 139 * text_steps.GIB
NAMES = ("pixart-1024", "cogvideox-2b")


@cache
def case_of(name: str) -> Case:
    return text_cases.case_of(text_cases.MODELS[name], CPU, tiny=True)


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


@pytest.mark.parametrize(
    "rival", [(deep if "compile" in one.what else pytest.param)(one, id=one.name) for one in TEXT_RIVALS]
)
def test_every_rival_computes_the_method_again_and_again(rival: Rival, case: Case) -> None:
    if rival.missing:
        pytest.skip(f"needs {', '.join(rival.missing)}")
    case = case if rival.is_cached else case.uncached()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    modules = dict(case.model.named_modules())
    torch.compiler.reset()  # what other tests compiled may have left a limit reached, and code that is skipped
    counters.clear()
    run = rival.make(case)
    first, second = run(), run()
    assert torch.equal(first.latents, second.latents)
    error = relative_error(first.latents, race.truth(case))
    assert 1e-3 < error < 3 if rival.is_another else error < 2e-6
    assert sum(first.steps or [1] * (len(first.marks) - 1)) == len(case.plan)
    assert counters["stats"]["unique_graphs"] == 2 * (rival.name == "P3")  # of the first layer, of all others
    assert dict(case.model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


def test_the_method_reuses_what_the_step_types_say(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step but the ATTENTION and ATTN_MLP ones attends, PixArt's to the text as well."""
    attend, attended = F.scaled_dot_product_attention, list[None]()

    def counting(*args: Any, **options: Any) -> Any:
        attended.append(None)
        return attend(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    cached = layouts.method(case)().latents
    assert len(attended) == EVERY_KIND.count(StepType.NO_CACHE) * sum(
        site.branch is not Branch.MLP for site in case.plan.sites
    )
    assert relative_error(cached, layouts.method(case.uncached())().latents) > 1e-3


def test_nothing_random_is_zero_or_without_effect(case: Case) -> None:
    """Neither a weight nor the prompt: another one means another picture."""
    assert all(parameter.ne(0).all() for parameter in case.model.parameters())
    given: Any = case.context
    swapped = given._replace(text=given.text.flip(0))
    other = Case(case.model, case.plan, 1, case.cfg_scale, swapped, case.sampler_name, case.guided_channels)
    assert relative_error(layouts.method(other)().latents, layouts.method(case)().latents) > 1e-3


@pytest.mark.parametrize(
    ("name", "tokens", "width", "slots", "vectors", "text"),
    [
        ("pixart-1024", 64**2, 1152, 3 * 28, 9 * 28 + 2, 300 * (4096 + 2 * 28 * 1152) * 2 + 300 * 8),
        ("cogvideox-2b", 226 + 13 * 30 * 45, 1920, 2 * 30, 2 * (6 * 30 + 2), 226 * 4096 * 2),
    ],
)
def test_memory_at_full_size_is_what_was_counted_by_hand(
    name: str, tokens: int, width: int, slots: int, vectors: int, text: int
) -> None:
    model = text_cases.MODELS[name]
    whole = text_cases.case_of(model, text_cases.META)
    weights = race.weight_bytes(whole.model)
    stream = 2 * tokens * width * 2  # rows, tokens, channels, bytes
    latents = math.prod(whole.denoiser.latent_shape) * 4
    needed = weights + (slots + 10) * stream + 8 * vectors * width * 2 + 2 * text + latents
    most = weights + len(TEXT_RIVALS) * (needed - weights)
    assert text_cases.most_bytes(model, TEXT_RIVALS) == (needed, most)
    assert most < H200
    assert whole.dtype == torch.bfloat16


# ------------------------------------------------------------------------------- the command and what is told of it


def dry_run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Few contenders, tiny."""
    status = text_steps.main(["--dry-run", "--rounds", "2", "--out", str(out), "--only", OURS, "P2", *arguments])
    return status, dict(json.loads(out.read_text()))


def test_a_dry_run_is_told_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were a GPU's; one model that does not run costs the others nothing."""
    pytest.importorskip("matplotlib")
    right = text_cases.case_of

    def failing(model: text_cases.TextModel, device: torch.device, *, tiny: bool = False) -> Case:
        if model.label == "PixArt-Sigma 2048":
            raise RuntimeError("out of\nluck")
        return right(model, device, tiny=tiny)

    monkeypatch.setattr(text_steps, "case_of", failing)
    status, found = dry_run(tmp_path / targets.TEXT_STEPS)
    assert (status, found["dry_run"]) == (1, True)
    small, lost, video = found["models"]
    assert (small["why"], lost["why"], video["why"]) == (None, "RuntimeError: out of", None)
    ours, plain = video["contenders"]
    assert list(ours["step_ms"]) == ["NO_CACHE", "ATTENTION", "ATTN_MLP", "run of 3 ATTN_MLP"]
    assert list(plain["step_ms"]) == ["NO_CACHE"]
    assert set(video["floor_ms"]) == {*ours["step_ms"], "run"}
    assert video["telemetry"]["start"]["versions"]["torch"] == torch.__version__
    measured = {one.name: one.measured for one in targets.judge(targets.Results(tmp_path)) if one.measured is not None}
    assert measured == {
        "PixArt-Sigma 1024, B=1: NO_CACHE": small["contenders"][0]["step_ms"]["NO_CACHE"]["median"],
        "CogVideoX-2B, B=1: NO_CACHE": ours["step_ms"]["NO_CACHE"]["median"],
        "CogVideoX-2B, B=1: ATTENTION": ours["step_ms"]["ATTENTION"]["median"],
    }
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(told, "DOCS", tmp_path)
    text = told.rivals()
    assert "| CogVideoX-2B, B=1, 8 steps, table 'every kind' |" in text
    assert "2048, B=1, 8 steps" not in text


def test_without_a_gpu_or_diffusers_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert text_steps.main([]) == 0
    assert "no GPU" in capsys.readouterr().out
    monkeypatch.setattr(text_steps, "find_spec", lambda _: None)
    assert text_steps.main(["--dry-run"]) == 1
    assert "carry the wheels" in capsys.readouterr().out


def test_who_competes_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert text_steps.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(TEXT_RIVALS) + len(text_cases.MODELS)
    with pytest.raises(SystemExit):
        text_steps.main(["--rounds", "1"])
    assert "--rounds 1 is below 2" in capsys.readouterr().err
