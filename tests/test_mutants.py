"""Mutation tests of the kernels: their operators and machinery on toys, and a random sample of the real mutants."""

import ast
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from constants import ROOT

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT)  # bench is not installed
    from bench.mutants.__main__ import EXPLANATIONS, everywhere, main
    from bench.mutants.campaign import Outcome, Pace, outcome_of
    from bench.mutants.errors import MutationError
    from bench.mutants.explained import read_explanations, stale
    from bench.mutants.find import Mutant, anywhere, find, in_launchers
    from bench.mutants.tree import copy_tree, find_tests
    from bench.mutants.worker import Run

# ---------------------------------------------------------------------------------------------- operators


def mutants_of(line: str) -> list[Mutant]:
    """The mutants of a kernel of one statement."""
    return find("kernels/x.py", f"@triton.jit\ndef kernel(a, b, c):\n    {line}\n")


EXPECTED: dict[tuple[str, str], set[str]] = {
    ("drop_mask", "x = tl.load(p, mask=m, other=0.0)"): {"x = tl.load(p, mask=True, other=0.0)"},
    ("drop_mask", "tl.store(p, x, m & n)"): {"tl.store(p, x, True)"},
    ("drop_mask", "x = load(p, m)"): set(),  # a helper of this name
    ("drop_operand", "m = a & b"): {"m = a", "m = b"},
    ("drop_operand", "x = p + i * s"): {"x = p", "x = i * s", "x = p + i", "x = p + s"},
    ("drop_operand", "x = a - b"): {"x = a"},
    ("drop_operand", "x = a and b and c"): {"x = a and b", "x = a and c", "x = b and c"},
    ("swap_arithmetic", "x = a - b * c"): {"x = a + b * c", "x = a - (b + c)", "x = a - b // c"},
    ("swap_arithmetic", "x = (a + b)[:, None]"): {"x = (a - b)[:, None]", "x = (a * b)[:, None]"},
    ("swap_arithmetic", "x = a % b"): {"x = a // b"},
    ("swap_arithmetic", "x = a // b"): {"x = a * b", "x = a % b"},
    ("swap_arithmetic", "x = a & b"): {"x = a | b"},
    ("swap_arithmetic", "acc -= x"): {"acc += x"},
    ("swap_factors", "x = p + i * s + j * t"): {"x = p * s + i + j * t", "x = p + i * t + j * s"},
    ("swap_factors", "x = i * s + j * t"): {"x = i * t + j * s"},
    ("swap_factors", "x = a + b"): set(),
    ("swap_broadcast", "x = r[:, None] + c[0]"): {"x = r[None, :] + c[0]"},
    ("change_comparison", "x = a <= b < c"): {"x = a < b < c", "x = a <= b <= c"},
    ("change_comparison", "x = a is None"): {"x = a is not None"},
    ("reset_accumulator", "acc += x * y"): {"acc = x * y"},
    ("drop_statement", "acc *= x"): {"pass"},
    ("drop_statement", "tl.store(p, x)"): {"pass"},
    ("keep_stale", "a.b = c"): {"pass"},
    ("keep_stale", "a[b] = c"): {"pass"},
    ("keep_stale", "del a[b]"): {"pass"},
    ("keep_stale", "a = c"): set(),
    ("change_integer", "x = tl.full((b,), 2, d)"): {"x = tl.full((b,), 3, d)", "x = tl.full((b,), 1, d)"},
    ("change_integer", "x: tl.constexpr[8] = 4"): {"x: tl.constexpr[8] = 5", "x: tl.constexpr[8] = 3"},
    ("change_integer", "x = True"): set(),
    ("change_float", "x = a * 0.5"): {"x = a * 0.25", "x = a * 0.505"},
    ("change_float", "x = tl.load(p, m, other=0.0)"): {"x = tl.load(p, m, other=1.0)"},
    ("change_float", "x = float('-inf')"): {"x = 0.0"},
    ("flip_boolean", "x = f(a, keep_dims=True)"): {"x = f(a, keep_dims=False)"},
    ("negate_condition", "x = a if not b else c"): {"x = a if b else c"},
    ("negate_condition", "if A > 0: x = 1"): {"if not A > 0: x = 1"},
    ("swap_logic", "x = a and b"): {"x = a or b"},
    ("drop_minus", "x = a * -b"): {"x = a * b"},
    ("swap_extremum", "x = min(a, tl.maximum(b, c))"): {"x = max(a, tl.maximum(b, c))", "x = min(a, tl.minimum(b, c))"},
    ("drop_dot_accumulator", "acc = tl.dot(a, b, acc)"): {"acc = tl.dot(a, b, None)"},
    ("drop_dot_accumulator", "acc = tl.dot(a, b, acc=acc)"): {"acc = tl.dot(a, b, acc=None)"},
    ("swap_axis", "x = tl.sum(a, axis=1)"): {"x = tl.sum(a, axis=0)"},
    ("swap_axis", "x = tl.max(a, 0)"): {"x = tl.max(a, 1)"},
    ("swap_reduction", "x = tl.sum(a)"): {"x = tl.max(a)"},
    ("drop_cast", "x = (a + b).to(tl.float32) * c"): {"x = (a + b) * c"},
    ("drop_cast", "tl.store(p, x.to(p.dtype.element_ty))"): {"tl.store(p, x)"},
    ("drop_cast", "x = tl.cast(a, tl.int64) * b"): {"x = a * b"},
    ("narrow_dtype", "x = tl.zeros((b,), tl.float32)"): {"x = tl.zeros((b,), tl.float16)"},
    ("narrow_dtype", "x = a.to(tl.int64)"): {"x = a.to(tl.int32)"},
    ("drop_transpose", "x = tl.dot(a, b.T)"): {"x = tl.dot(a, b)"},
    ("drop_choice", "x = tl.where(m, a - b, 0.0)"): {"x = a - b", "x = 0.0"},
    ("drop_function", "x = tl.exp(a + b) * c"): {"x = (a + b) * c"},
    ("round_down", "x = tl.cdiv(a, b) * c"): {"x = a // b * c", "x = (a // b) * c"},
    ("shorten_loop", "for k in range(n): pass"): {"for k in range(1, n): pass", "for k in range(n - 1): pass"},
    ("shorten_loop", "for k in tl.range(0, n, B): pass"): {
        "for k in tl.range(0 + B, n, B): pass",
        "for k in tl.range(0, n - B, B): pass",
    },
}  # fmt: skip


@pytest.mark.parametrize(("operator", "line"), EXPECTED)
def test_operator(operator: str, line: str) -> None:
    found = {mutant.after for mutant in mutants_of(line) if mutant.operator == operator}
    expected = EXPECTED[operator, line]
    assert {ast.dump(ast.parse(after)) for after in found} == {ast.dump(ast.parse(after)) for after in expected}


def test_every_operator_is_tested() -> None:
    from bench.mutants.find import OPERATORS

    assert {operator for operator, _ in EXPECTED} == {operator.__name__ for operator in OPERATORS}


@pytest.mark.parametrize(
    "line",
    [
        "tl.static_assert(BLOCK > 0 and BLOCK % 8 == 0)",
        "x = tl.multiple_of(a, 16)",
        "x = f(a, num_warps=4, num_stages=3)",
        "x = f'{a + 1}'",
        "'''1 + 1'''",
    ],
)
def test_what_bears_on_speed_alone_is_left_as_it_is(line: str) -> None:
    assert mutants_of(line) == []


SOURCE = '''"""Größe: positions are in bytes."""

import triton


@triton.jit
def _kernel(x, size: tl.constexpr = 3):
    """Adds 1 + 1."""
    keep = x < size  # größer
    x = tl.load(
        x + 1,
        mask=keep,
    )
    y = "größer", x + 1
    y = "größer", x + 1


@triton.jit(do_not_specialize=["n"])
def _other(n):
    return n + 1


def launcher(n):
    if n < 1:
        raise ValueError(f"{n + 1}")
    _kernel[(n,)](n, num_warps=4)
'''


def test_only_bodies_of_jit_functions_are_mutated() -> None:
    assert {mutant.function for mutant in find("x.py", SOURCE)} == {"_kernel", "_other"}
    assert not any("size: tl" in mutant.before or '"""' in mutant.before for mutant in find("x.py", SOURCE))
    plain = find("x.py", SOURCE, in_launchers)
    assert {mutant.function for mutant in plain} == {"launcher"}
    assert {mutant.after for mutant in plain} == {
        *("if n <= 1:", "if n < 2:", "if n < 0:", "if not n < 1:"),
        "pass",  # for the error, and for the launch
    }


def test_one_mutant_changes_one_place() -> None:
    for mutant in find("x.py", SOURCE) + find("x.py", SOURCE, in_launchers):
        mutated = mutant.applied(SOURCE)
        ast.parse(mutated)
        assert mutated[: mutant.start - 20] == SOURCE[: mutant.start - 20]
        assert mutated.endswith(SOURCE.encode()[mutant.end :].decode())
        assert mutated != SOURCE


def test_ids_and_keys_are_each_mutants_own() -> None:
    found = find("x.py", SOURCE)
    assert len({mutant.id for mutant in found}) == len({mutant.key for mutant in found}) == len(found)


def test_a_key_outlives_moved_lines() -> None:
    moved = find("x.py", SOURCE.replace("import triton\n", "import torch\nimport triton\n"))
    assert [mutant.key for mutant in moved] == [mutant.key for mutant in find("x.py", SOURCE)]
    assert [mutant.id for mutant in moved] != [mutant.id for mutant in find("x.py", SOURCE)]


# -------------------------------------------------------------------------------------------- explanations


@pytest.mark.parametrize(
    ("text", "message"),
    [("kernels/x.py::f | drop_mask#0 | why", "is not file"), ("a | b | c | d\na | b | c | e", "explained twice")],
)
def test_bad_explanations(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "e.txt").write_text(text)
    with pytest.raises(MutationError, match=message):
        read_explanations(tmp_path / "e.txt")


def test_explanations_may_hold_the_separator(tmp_path: Path) -> None:
    mutant = next(mutant for mutant in mutants_of("m = a | b") if mutant.operator == "swap_arithmetic")
    (tmp_path / "e.txt").write_text(f"# why\n\n{mutant.key} | neither is ever true\n")
    assert read_explanations(tmp_path / "e.txt") == {mutant.key: "neither is ever true"}


def test_explanations_of_the_kernels_fit_them() -> None:
    everything = everywhere(ROOT)
    assert stale(read_explanations(ROOT / EXPLANATIONS), everything) == []


# ------------------------------------------------------------------------------------------------ machinery

TOTAL = """from ebcache_fast.kernels._jit import jit


@jit
def total(values, start):
    for value in values:
        start += value
    return start
"""
COUNTDOWN = """from ebcache_fast.kernels._jit import jit


@jit
def countdown(n):
    while n > 0:
        n -= 1
    return n
"""
TESTS = {
    "total": "from ebcache_fast.kernels.total import total\n\n\ndef test_total():\n    assert total([2, 3], 1) == 6\n",
    "countdown": (
        "from ebcache_fast.kernels.countdown import countdown\n\n\n"
        "def test_countdown():\n    assert countdown(3) == 0\n"
    ),
}
SURVIVOR = "kernels/total.py::total | swap_arithmetic#1 | start += value"  # 1 * 2 * 3 is 1 + 2 + 3


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A tree laid out like this one, with kernels that need no Triton, of which one has a poor test."""
    root = tmp_path / "toy"
    for folder in ("kernels", "ebcache_fast", "tests", "bench/results"):
        (root / folder).mkdir(parents=True)
    (root / "ebcache_fast" / "__init__.py").touch()
    (root / "ebcache_fast" / "kernels").symlink_to("../kernels")
    (root / "kernels" / "_jit.py").write_text("def jit(function):\n    return function\n")
    (root / "kernels" / "total.py").write_text(TOTAL)
    (root / "kernels" / "countdown.py").write_text(COUNTDOWN)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    for name, text in TESTS.items():
        (root / "tests" / f"test_kernels_{name}.py").write_text(text)
    return root


Command = Callable[..., tuple[int, str, dict[str, str]]]


@pytest.fixture
def command(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command on the toy; gives the exit status, what was printed, and the verdicts by key."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")  # is not for the tests of mutants
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds, and the toy needs none

    def run(*arguments: str) -> tuple[int, str, dict[str, str]]:
        out = tmp_path / "out.json"
        status = main(["--root", str(toy), "--slack", "0.5", "--out", str(out), *arguments])
        rows = json.loads(out.read_text())["mutants"] if out.exists() else []
        printed = capsys.readouterr()
        return status, printed.out + printed.err, {row["key"]: row["verdict"] for row in rows}

    return run


def test_killed_survived_and_timed_out(toy: Path, command: Command) -> None:
    before = {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()}
    status, printed, verdicts = command()
    assert status == 1
    assert {key for key, verdict in verdicts.items() if verdict == "survived"} == {SURVIVOR}
    assert {key for key, verdict in verdicts.items() if verdict == "timeout"} == {
        f"kernels/countdown.py::countdown | {which}"
        for which in (
            "swap_arithmetic#0 | n -= 1",
            "reset_accumulator#0 | n -= 1",
            "drop_statement#0 | n -= 1",
            "change_integer#1 | n -= 1",
        )
    }
    assert set(verdicts.values()) == {"killed", "survived", "timeout"}
    assert "- start += value\n  + start *= value" in printed
    assert f"to explain: {SURVIVOR}" in printed
    assert {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()} == before


def test_an_explained_survivor_passes(toy: Path, command: Command) -> None:
    (toy / EXPLANATIONS).write_text(f"{SURVIVOR} | the sum is all that is asked of it\n")
    status, _, verdicts = command("--only", "kernels/total.py", "--jobs", "2")
    assert status == 0
    assert verdicts[SURVIVOR] == "explained"
    assert sorted(verdicts.values()) == ["explained", "killed", "killed", "killed"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SURVIVOR.replace("#1", "#0"), "killed: remove the explanation"),
        (SURVIVOR.replace("start", "begin"), "no such mutant: remove or mend the explanation"),
    ],
)
def test_wrong_explanations_fail(toy: Path, command: Command, wrong: str, message: str) -> None:
    (toy / EXPLANATIONS).write_text(f"{SURVIVOR} | so\n{wrong} | so\n")
    status, printed, _ = command("--only", "kernels/total.py")
    assert status == 1
    assert f"{message}\n{wrong}\n" in printed


def test_a_sample_is_of_what_is_not_explained_and_repeats(toy: Path, command: Command) -> None:
    (toy / EXPLANATIONS).write_text(f"{SURVIVOR} | so\n")
    arguments = ("--only", "kernels/total.py", "--list", "--sample")
    _, listed, _ = command(*arguments, "9")
    assert listed.count("\n  - ") == 3
    samples = [command(*arguments, "1", "--seed", str(seed))[1] for seed in (0, 0, 1, 2, 3, 4)]
    assert samples[0] == samples[1]
    assert len(set(samples)) > 1


def test_plain_functions_on_request(toy: Path, command: Command) -> None:
    (toy / "kernels" / "total.py").write_text(f"{TOTAL}\n\ndef launcher(n):\n    total([n], n % 2)\n")
    without, added = (command("--list", "--only", "kernels/total.py", *more)[1] for more in ((), ("--launchers",)))
    assert "n % 2" not in without
    assert "- total([n], n % 2)\n  + total([n], n // 2)" in added
    assert added.startswith(without.rstrip())


def test_an_unknown_file_is_an_error(command: Command) -> None:
    status, printed, _ = command("--only", "kernels/none.py")
    assert status == 2
    assert "--only kernels/none.py is none of kernels/_jit.py, kernels/countdown.py" in printed


def test_tests_that_fail_unmutated_are_an_error(toy: Path, command: Command) -> None:
    (toy / "tests" / "test_kernels_total.py").write_text(TESTS["total"].replace("== 6", "== 7"))
    status, printed, _ = command("--only", "kernels/total.py")
    assert status == 2
    assert "test_kernels_total.py::test_total does not pass unmutated" in printed


def test_tests_of_other_kernels_are_an_error(toy: Path, command: Command) -> None:
    (toy / "tests" / "test_kernels_total.py").write_text("def test_total():\n    pass\n")
    status, printed, _ = command("--only", "kernels/total.py")
    assert status == 2
    assert "can be imported although kernels/total.py can't" in printed


def test_tests_that_can_not_be_imported_are_an_error(toy: Path, command: Command) -> None:
    (toy / "tests" / "test_kernels_total.py").write_text("import nothing_of_this_name\n")
    status, printed, _ = command("--only", "kernels/total.py")
    assert status == 2
    assert "can't be collected" in printed


def test_the_copys_link_leads_to_the_copy(toy: Path, tmp_path: Path) -> None:
    copy = copy_tree(toy, tmp_path / "copy")
    assert (copy / "ebcache_fast" / "kernels").resolve() == (copy / "kernels").resolve()
    assert not (copy / "bench" / "results").exists()


def test_compiled_files_are_held_against_the_source(toy: Path, tmp_path: Path) -> None:
    """By their times, `a += b` would pass for `a -= b` of the same second."""
    compiled = [*copy_tree(toy, tmp_path / "copy").rglob("*.pyc")]
    assert compiled
    assert {path.read_bytes()[4:8] for path in compiled} == {bytes([0b11, 0, 0, 0])}  # PEP 552: by hash, and checked


def test_which_tests_a_file_has(toy: Path) -> None:
    assert find_tests(toy, "kernels/total.py") == ("tests/test_kernels_total.py",)
    assert find_tests(toy, "kernels/_jit.py") == tuple(
        f"tests/test_kernels_{name}.py" for name in ("countdown", "total")
    )
    (toy / "kernels" / "lonely.py").touch()
    with pytest.raises(MutationError, match=r"lonely\.py has no test"):
        find_tests(toy, "kernels/lonely.py")


def test_a_kernel_has_its_cases_of_what_holds_for_all(toy: Path, command: Command) -> None:
    (toy / "tests" / "test_kernels.py").write_text(
        "import pytest\nfrom ebcache_fast.kernels.countdown import countdown\n"
        "from ebcache_fast.kernels.total import total\n\n\n"
        "@pytest.mark.parametrize('name', ['countdown.countdown', 'total.total'])\n"
        "def test_all(name):\n"
        "    assert countdown(1) == 0 if name.startswith('count') else total([2, 2, 3], 1) == 8\n"
    )
    own = ("tests/test_kernels_total.py", "tests/test_kernels.py", "-k", "test_kernels_total or [total.")
    assert find_tests(toy, "kernels/total.py") == own
    status, printed, verdicts = command("--only", "kernels/total.py")
    assert (status, set(verdicts.values())) == (0, {"killed"})
    assert "countdown" not in printed


def test_the_engine_has_the_tests_that_run_it_over_no_kernels(toy: Path) -> None:
    engine = toy / "ebcache_fast" / "engine"
    engine.mkdir()
    (engine / "clock.py").touch()
    imports = {
        "a": "ebcache_fast.engine.engine",
        "b": "ebcache_fast.dropin.enable",
        "clock": "torch",
        "other": "ebcache_fast.plan",
    }
    for name, module in imports.items():
        (toy / "tests" / f"test_{name}.py").write_text(f"import {module}")
    (toy / "tests" / "test_slow.py").write_text("from ebcache_fast import kernels\nimport ebcache_fast.dropin.enable")
    assert find_tests(toy, "ebcache_fast/engine/clock.py") == tuple(
        f"tests/test_{name}.py" for name in ("clock", "a", "b")
    )


def test_methods_have_mutants_under_their_class() -> None:
    (one, _) = find("x.py", "class A:\n    def f(self):\n        return 1\n", anywhere)
    assert one.function == "A.f"


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("from ebcache_fast.kernels import launch, lonely", True),
        ("import ebcache_fast.kernels.lonely", True),
        ("from .lonely import f", True),
        ("from . import lonely", True),
        ("from ebcache_fast.errors import lonely", False),
    ],
)
def test_helpers_have_the_find_tests_what_imports_them(toy: Path, statement: str, seen: bool) -> None:
    (toy / "kernels" / "lonely.py").touch()
    (toy / "kernels" / "_between.py").write_text(f"def f():\n    {statement}\n")
    (toy / "kernels" / "total.py").write_text("from ebcache_fast.kernels import _between\n")
    if seen:
        assert find_tests(toy, "kernels/lonely.py") == ("tests/test_kernels_total.py",)
    else:
        with pytest.raises(MutationError):
            find_tests(toy, "kernels/lonely.py")


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0, "survived"),
        (1, "killed"),
        (2, "killed"),
        (-11, "killed"),
        (-14, "timeout"),
        (-27, "timeout"),
        (3, "broken"),
        (5, "broken"),
    ],
)
def test_outcomes(status: int, outcome: str) -> None:
    assert outcome_of(Run(status, 0.0, "", None, {})) == Outcome(outcome)


def test_tests_that_killed_come_first_then_the_quickest() -> None:
    pace = Pace(slack=1.0, seconds={"a.py::slow": 3.0, "a.py::quick": 1.0, "a.py::killer": 2.0, "b.py::other": 0.0})
    mutant = mutants_of("x = 1")[0]
    pace.kills[mutant.file, mutant.function, "a.py::killer"] += 1
    assert [*pace.limits(["a.py"], mutant).items()] == [
        ("a.py::killer", 21.0),
        ("a.py::quick", 11.0),
        ("a.py::slow", 31.0),
    ]


# ------------------------------------------------------------------------------------- the real kernels and engine


# Of which every mutant was tried, and every survivor killed since, or explained.
CLEARED = {
    "kernels": (
        "_features",
        "_order",
        "_patches",
        "_stream",
        "attention",
        "embed",
        "gated_residual",
        "gated_sum",
        "head",
        "linear_gelu",
        "run",
        "tokens",
    ),
    "ebcache_fast/engine": ("cache", "clock", "order_guard", "runner", "step_scheduler", "workspace"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "sample"), [("kernels", 8), ("ebcache_fast/engine", 2)])
def test_a_sample_of_the_mutants_is_killed(folder: str, sample: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The seed is of the sources: one state of them always has one sample, a changed one another."""
    digest = sha256()
    for path in sorted([*ROOT.glob(f"{folder}/*.py"), *ROOT.glob("tests/test_kernels*.py")]):
        digest.update(path.read_bytes())
    seed = int.from_bytes(digest.digest()[:4])
    only = [word for name in CLEARED[folder] for word in ("--only", f"{folder}/{name}.py")]
    status = main(["--sample", str(sample), "--seed", str(seed), *only])
    assert status == 0, "\n".join((f"seed {seed}", *capsys.readouterr()))
