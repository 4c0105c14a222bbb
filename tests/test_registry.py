"""Rules by name: what may take a name, what files may make of it, and other packages' entry points."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from ebcache_fast.errors import TableError
from ebcache_fast.plan import COMPUTE, REUSE, Branch, StepPlan, layered, registry
from ebcache_fast.plan.emitter import Emitter
from ebcache_fast.plan.registry import BUILT_IN, RuleRegistry
from ebcache_fast.plan.rules import Compute, Tokens
from ebcache_fast.plan.sites import Site
from ebcache_fast.plan.table_schema import Layers
from ebcache_fast.plan.table_steps import spelt, steps_of
from ebcache_fast.policies.registry import PolicyRegistry


@dataclass(frozen=True)
class Mine:
    """A rule of somebody else's."""

    name: str
    times: int = 2
    runs_branch = True

    def __post_init__(self) -> None:
        if self.times > 9:
            raise ValueError("too\nmany")

    def check(self, site: Site) -> None:
        """Any site will do."""

    def emit(self, site: int, emitter: Emitter) -> None:
        COMPUTE.emit(site, emitter)


def known() -> RuleRegistry:
    rules = RuleRegistry()
    rules.register("mine")(Mine)
    return rules


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The entry points that are installed, in place of those that are."""
    found: list[Any] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == "ebcache_fast.policies" else [])
    return found


@dataclass
class Plugin:
    """An entry point that does something where it is loaded."""

    name: str
    does: Any
    loaded: int = 0
    value: str = "package.module"

    def load(self) -> None:
        self.loaded += 1
        self.does()


@pytest.mark.parametrize("rule", [Compute(), Compute(2), REUSE, Tokens(5), Mine("x"), Mine("", 3)])
def test_a_rule_comes_back_from_its_name_and_arguments(rule: Any) -> None:
    name, arguments = known().describe(rule)
    assert known().make(name, arguments) == rule


def test_arguments_that_are_the_default_are_left_out() -> None:
    assert known().describe(Mine("x")) == ("mine", {"name": "x"})
    assert known().make("mine", {"name": "x", "times": 2}) == Mine("x")
    assert RuleRegistry().describe(COMPUTE) == ("compute", {})


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        (
            "their",
            {},
            r"rule 'their' is unknown: expected one of compute, .*, mine, reuse, .*; install the package",
        ),
        ("mine", {}, "rule 'mine': expected the arguments 'name', 'times', got no argument; leave out none but"),
        (
            "mine",
            {"name": "x", "time": 1},
            "rule 'mine': expected the arguments 'name', 'times', got .*, 'time'",
        ),
        ("mine", {"name": 1}, "rule 'mine': name: expected a string, got 1"),
        ("mine", {"name": "x", "times": "1"}, "rule 'mine': times: expected an integer, got '1'"),
        ("mine", {"name": "x", "times": True}, "rule 'mine': times: expected an integer, got True"),
        ("mine", {"name": "x", "times": 1.0}, "rule 'mine': times: expected an integer, got 1.0"),
        ("mine", {"name": "x", "times": 2**63}, "rule 'mine': times: expected an integer, got an integer beyond 64"),
        ("mine", {"name": "x", "times": 10}, "rule 'mine': ValueError: too$"),
    ],
)
@pytest.mark.usefixtures("plugins")
def test_what_no_rule_can_be_made_of(name: str, arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(TableError, match=f"^{problem}"):
        known().make(name, arguments)


def test_rules_that_no_file_can_hold_are_refused_when_they_are_written() -> None:
    with pytest.raises(TableError, match=r"^rule test_registry\.Mine has no name, expected one of .*register_rule"):
        RuleRegistry().describe(Mine("x"))
    with pytest.raises(TableError, match=r"^rule 'mine': times: expected an integer, got True"):
        known().describe(Mine("x", True))


def test_names_that_are_taken_or_no_names_are_refused() -> None:
    rules = known()
    for name in BUILT_IN:
        with pytest.raises(TableError, match=f"^rule '{name}': the name is taken by .*; register .*Mine under another"):
            rules.register(name)(Mine)
    for name in ("", "Mine", "1st", "a b", "a*", "x" * 41):
        with pytest.raises(TableError, match="expected a name of a-z"):
            rules.register(name)(Mine)


@pytest.mark.parametrize("name", [Mine, Compute, None, 3, b"mine"], ids=repr)
def test_what_has_no_name_is_not_taken_for_one(name: Any) -> None:
    """As a decorator that is written without its name hands it over."""
    with pytest.raises(TableError, match=r'^rule .*: expected its name, a string; write register_rule\("name"\)$'):
        RuleRegistry().register(name)
    with pytest.raises(TableError, match=r'; write register_policy\("name"\)$'):
        PolicyRegistry().register(name)


def test_of_many_names_a_dozen_is_listed() -> None:
    rules = known()
    for i in range(100):
        rules._things[f"x{i}"] = Mine
    with pytest.raises(TableError, match=r"'their' is unknown: expected one of compute, .* and 99 more; install"):
        rules.make("their", {})


def test_a_module_that_is_run_again_keeps_its_names() -> None:
    rules, code = RuleRegistry(), compile(SOURCE, "their.py", "exec")
    for _ in range(2):
        space: dict[str, Any] = {"__name__": "their"}
        exec(code, space)
        rules.register("their")(space["Their"])
        assert type(rules.make("their", {})) is space["Their"]
    exec(compile(SOURCE, "other.py", "exec"), space)
    with pytest.raises(TableError, match=r"the name is taken by their\.Their"):
        rules.register("their")(space["Their"])


SOURCE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Their:
    runs_branch = True
    def check(self, site): pass
    def emit(self, site, emitter): pass
"""


def test_what_is_no_rule_gets_no_name() -> None:
    class Plain:
        runs_branch = True
        check = emit = Mine.emit

    class Bare:
        """Nothing."""

    @dataclass
    class Thawed(Plain):
        """It could change under a graph's key."""

    @dataclass(frozen=True)
    class Real(Plain):
        share: float

    for thing in (Plain, Thawed, dataclass(frozen=True)(Bare), None, 3):
        with pytest.raises(TableError, match=r"^rule 'it': expected a frozen dataclass with check, emit, runs_branch"):
            RuleRegistry().register("it")(thing)  # type: ignore[type-var]
    with pytest.raises(TableError, match=r"^rule 'it': expected arguments of int or str, .*got share"):
        RuleRegistry().register("it")(Real)


def test_a_table_holds_rules_of_others() -> None:
    rules, sites = known(), layered(2, (Branch.MLP,))
    steps = (StepPlan(sites, (Mine("x", 3), Mine("x"))), StepPlan(sites, (Mine("y"), COMPUTE)))
    keys = spelt(steps, rules)
    assert keys["kinds"]["m"] == {"rule": "mine", "name": "x", "times": 3}
    assert keys["steps"] == ["m m2", "m3 c"]
    layers = [Layers(**each) for each in keys["sites"]]
    assert steps_of(layers, keys["kinds"], keys["steps"], rules) == steps
    with pytest.raises(TableError, match=r"^kinds\.m: rule 'mine' is unknown"):
        steps_of(layers, keys["kinds"], keys["steps"], RuleRegistry())


def test_many_kinds_are_not_each_compared_with_all_others() -> None:
    compared = 0

    @dataclass(frozen=True, eq=False)
    class Counted(Mine):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return isinstance(other, Counted) and self.name == other.name

        def __hash__(self) -> int:
            return hash(self.name)

    rules, sites = known(), layered(300, (Branch.MLP,))
    rules.register("counted")(Counted)
    keys = spelt((StepPlan(sites, tuple(Counted(f"{i}") for i in range(300))),), rules)
    assert [*keys["kinds"]] == ["c", *(f"c{i}" for i in range(2, 301))]
    layers, compared = [Layers(**each) for each in keys["sites"]], 0
    steps_of(layers, keys["kinds"], keys["steps"], rules)
    assert compared < 10 * 300
    with pytest.raises(TableError, match=r"kind q is unknown: expected one of c, c2, .*, c12 and 288 more; name it"):
        steps_of(layers, keys["kinds"], ["q"], rules)
    with pytest.raises(TableError, match=r"^kinds\.z: expected another rule than c7 is; name each rule once"):
        steps_of(layers, {**keys["kinds"], "z": keys["kinds"]["c7"]}, keys["steps"], rules)


# Entry points


def test_entry_points_are_loaded_once_and_not_before_they_are_needed(plugins: list[Any]) -> None:
    rules = RuleRegistry()
    plugin = Plugin("mine", lambda: rules.register("mine")(Mine))
    plugins.append(plugin)
    assert rules.make("reuse", {}) == REUSE
    assert plugin.loaded == 0
    assert rules.make("mine", {"name": "x"}) == Mine("x")
    for _ in range(2):
        with pytest.raises(TableError, match=r"^rule 'other' is unknown: "):
            rules.make("other", {})
    assert plugin.loaded == 1


def fail() -> None:
    raise RuntimeError("no\nluck")


def leave() -> None:
    raise SystemExit(3)


@pytest.mark.parametrize(("does", "problem"), [(fail, "RuntimeError: no"), (leave, "SystemExit: 3")])
def test_a_plug_in_that_fails_is_one_line_that_names_it(does: Any, problem: str, plugins: list[Any]) -> None:
    """And those beside it go on."""
    rules = RuleRegistry()
    plugins += [Plugin("broken", does), Plugin("mine", lambda: rules.register("mine")(Mine))]
    with pytest.raises(TableError) as caught:
        rules.make("other", {})
    assert str(caught.value).endswith(
        f"; the entry point 'broken' of ebcache_fast.policies (package.module) failed: {problem}"
    )
    assert "\n" not in str(caught.value)
    assert rules.make("mine", {"name": "x"}) == Mine("x")


def test_a_plug_in_that_takes_a_taken_name_is_named(plugins: list[Any]) -> None:
    rules = RuleRegistry()
    plugins.append(Plugin("greedy", lambda: rules.register("reuse")(Mine)))
    with pytest.raises(TableError, match=r"entry point 'greedy' .* failed: TableError: rule 'reuse': the name is"):
        rules.make("other", {})
    assert rules.make("reuse", {}) == REUSE


def test_an_entry_point_of_a_module_that_is_gone_is_named(plugins: list[Any]) -> None:
    plugins.append(EntryPoint("gone", "nobody_s.policies", "ebcache_fast.policies"))
    with pytest.raises(TableError, match=r"'gone' of ebcache_fast\.policies \(nobody_s\.policies\) failed: ModuleNot"):
        RuleRegistry().make("other", {})
