"""What the README and docs/ promise is there: their commands, their code, their options, their files."""

import ast
import builtins
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from constants import ROOT
from diffusers_tiny import tiny_cogvideox, tiny_cogvideox_2b, tiny_pipeline, tiny_pixart, tiny_pixart_sigma
from tiny import tiny_dit
from torch import nn

from ebcache_fast import models, stats
from ebcache_fast.apps import cli
from ebcache_fast.apps.method_spec import Setting, parse_method
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.sampling import sample

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def everywhere(language: str) -> list[str]:
    """Those of all pages."""
    return blocks(language, "\n".join(PAGES.values()))


def test_the_two_commands_and_ci_are_the_same() -> None:
    commands = blocks("")[0].splitlines()
    assert commands == [
        "pip install -c constraints.txt -e . && ebcache-fast demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
    ci = (ROOT / ".ci" / "run").read_text()
    stages = dict(re.findall(r"^(demo|tests)=\"(.*)\"$", ci, re.MULTILINE))
    assert list(stages.values()) == commands
    for name in stages:
        assert re.search(rf'^stage {name} "\${name}"$', ci, re.MULTILINE)
    assert (ROOT / "constraints.txt").is_file()


def test_the_first_screen_has_all_it_needs() -> None:
    """What it is, the picture, the commands and the code, before the first heading."""
    first = README.split("\n## ")[0]
    assert len(first.splitlines()) < 50
    assert re.search(r"!\[.+\]\(docs/demo\.png\)", first)
    assert all(block in first for block in (blocks("")[0], blocks("python")[0]))
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 7


def test_the_first_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for a tiny model in the big one's place, and on the CPU."""
    sizes = {"patch_size": 8, "num_classes": 1000}
    trained = tiny_dit(4, torch.float32, input_size=32, **sizes)
    torch.save({"ema": trained.state_dict()}, tmp_path / "DiT-XL-2-256x256.pt")
    factory = partial(models.DiT, hidden_size=16, depth=2, num_heads=2, **sizes)
    monkeypatch.setitem(models.DIT_MODELS, "DiT-XL/2", factory)
    monkeypatch.setattr(nn.Module, "cuda", lambda self: self)
    monkeypatch.chdir(tmp_path)

    names: dict[str, object] = {}
    exec(blocks("python")[0], names)

    table = CacheTable.named("eb-cache-released-50")
    expected = sample(trained, [207, 360], table=table.retime(table.timesteps), sampler="ddim", cfg_scale=4.0)
    assert expected.shape == (2, 4, 32, 32)
    assert expected.isfinite().all()
    assert torch.equal(names["latents"], expected)


def test_the_other_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, but for a tiny model, whose branches cost too little for 2.5x, and for its latents and labels."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"model": tiny_dit(dtype=torch.float32, depth=1)}
    (graphs,), (loop,), (tables,) = (
        [block for block in everywhere("python") if word in block]
        for word in ("Engine(", "forward_with_cfg", "StepType")
    )
    few = tables.replace("steps=50", "samples=4, steps=6").replace("speedup=2.5", "speedup=1.2")
    tiny = loop.replace("torch.randn(4, 4, 32, 32)", "torch.randn(4, 4, 8, 8)").replace(
        "207, 360, 1000, 1000", "1, 2, 5, 5"
    )
    assert few != tables
    assert tiny.count("8, 8") == tiny.count("1, 2, 5, 5") == 1
    (several,) = (block for block in everywhere("python") if "TableSet" in block)
    for block in (few, several, graphs, tiny):
        exec(block, names)
    assert CacheTable.load("mine.json") == names["table"]
    assert sum(names["engine"].stats.steps.values()) == 18  # type: ignore[attr-defined]
    assert capsys.readouterr().out.count("Stats(steps=") == 2


def test_the_method_of_one_s_own_can_be_compared(tmp_path: Path) -> None:
    (policy,) = (block for block in everywhere("python") if "def policy" in block)
    (tmp_path / "mine.py").write_text(policy)
    shape = models.as_denoiser(tiny_dit()).shape
    method = parse_method(f"{tmp_path / 'mine.py'}:policy", Setting(shape, 10, "ddim"))
    assert 1 < method.plan.mac_limit(shape) < 2.5


def tiny_sigma() -> Any:
    """Of 256 x 256 pixels, the smallest that the pipeline has aspect ratios for."""
    pipe = tiny_pixart_sigma()
    pipe.transformer = tiny_pixart(sample_size=32)
    pipe.vae_scale_factor = 8
    return pipe


def tiny_video() -> Any:
    pipe = tiny_cogvideox_2b()
    pipe.transformer = tiny_cogvideox(max_text_seq_length=226)  # as the pipeline pads prompts
    return pipe


PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "DiTPipeline": (tiny_pipeline, {"NO_CACHE": 34, "ATTN_MLP": 16}),
    "PixArtSigmaPipeline": (tiny_sigma, {}),
    "CogVideoXPipeline": (tiny_video, {}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_pipelines_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for a tiny pipeline in the big one's place, on the CPU, in fewer steps."""
    diffusers = pytest.importorskip("diffusers")
    make, steps = PIPELINES[name]
    (block,) = (one for one in blocks("python") if f"import {name}" in one)
    assert len([line for line in block.splitlines() if line and "import" not in line]) <= 5
    pipe = make()
    monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(type(pipe), "to", lambda self, device: self)
    monkeypatch.chdir(tmp_path)
    names = {} if "import torch" in block else {"torch": torch}
    exec(block if steps else re.sub(r"steps=(20|50)", "steps=8", block), names)
    counted = stats(pipe)
    assert not counted.originals
    assert counted.steps == steps if steps else counted.hits > 0


GIVEN = {"model", "table"}  # what docs/ takes as made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_in_code_comes_from_that_page(page: Path) -> None:
    """Whoever copies the blocks of a page, in order, has every name."""
    known = {*dir(builtins), *(GIVEN if page.parent.name == "docs" else ())}
    for block in blocks("python", PAGES[page]):
        nodes = list(ast.walk(ast.parse(block)))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        known |= {
            alias.asname or alias.name.partition(".")[0] for node in nodes for alias in getattr(node, "names", [])
        }
        known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        assert {node.id for node in names} <= known, block


def test_every_block_of_code_is_one_of_these() -> None:
    assert len(everywhere("python")) == 9


COMMAND_ROWS: Mapping[str, str] = dict(re.findall(r"^\| `ebcache-fast (\S+)(.*?)` \|", README, re.MULTILINE))
FUNCTIONS: Mapping[str, str] = {"table": "table-show", **{name: name for name in cli.COMMANDS}}


def test_every_command_has_its_row() -> None:
    assert {name.partition("-")[0] for name in cli.COMMANDS} == COMMAND_ROWS.keys()
    verbs = {name.partition("-")[2] for name in cli.COMMANDS if name.startswith("table-")}
    assert set(COMMAND_ROWS["table"].strip().split(r"\|")) == verbs


@pytest.mark.parametrize("command", COMMAND_ROWS)
def test_every_option_in_the_table_of_commands_exists(command: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `ebcache-fast {command}"))
    known = inspect.signature(cli.COMMANDS[FUNCTIONS[command]]).parameters
    options = re.findall(r"--([a-z-]+)", row)
    assert {option.replace("-", "_") for option in options} <= known.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_it_points_to_is_there(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    paths = [page.parent / path for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose)]
    paths += [ROOT / path for path in re.findall(r"`((?:bench|docs|\.ci)/[\w./-]*)`", prose)]
    assert [path for path in paths if not path.exists()] == []


def test_every_file_that_contributing_names_is_there() -> None:
    """Named as in ``kernels/NAME.py``, in full, or from the package's or the tests' folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {name for name in re.findall(r"`([\w./]+\.(?:py|txt|md))`", text) if "NAME" not in name}
    folders = (ROOT, ROOT / "ebcache_fast", ROOT / "kernels", ROOT / "tests")
    assert len(named) > 25
    assert {name for name in named if not any((folder / name).exists() for folder in folders)} == set()


def test_every_page_is_pointed_to() -> None:
    assert {path.name for path in PAGES} - set(re.findall(r"\(docs/(\w+\.md)\)", README)) == {"README.md"}


def test_the_readme_is_a_page_or_two() -> None:
    assert len(README.splitlines()) < 260


def test_the_kernels_to_profile_exist() -> None:
    named = set(re.findall(r"\b(_\w*kernel)\b", PAGES[ROOT / "docs" / "profiling.md"]))
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert len(named) > 5
    assert named <= set(re.findall(r"^def (_\w*kernel)\(", source, re.MULTILINE))
