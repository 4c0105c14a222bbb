"""Rules by name, those of other packages too, so that a table's file can speak of them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cached_property
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

from ebcache_fast.errors import TableError
from ebcache_fast.plan.rules import Compute, Forecast, FullAndWindow, Reuse, Rule, SharedByGuidance, Tokens, Window
from ebcache_fast.plan.spans import ForecastSpan, KeepSpan, SkipSpan, SpanRule
from ebcache_fast.plan.timesteps import MAX_INT, shown, some_of

GROUP = "ebcache_fast.policies"  # of entry points; loading one registers what it has
NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
AnyRule = Rule | SpanRule
BUILT_IN: Mapping[str, type[Any]] = MappingProxyType(
    {
        "compute": Compute,
        "reuse": Reuse,
        "forecast": Forecast,
        "tokens": Tokens,
        "window": Window,
        "full_and_window": FullAndWindow,
        "shared_by_guidance": SharedByGuidance,
        "keep_span": KeepSpan,
        "skip_span": SkipSpan,
        "forecast_span": ForecastSpan,
    }
)
_OF_SITES = ("check", "emit", "runs_branch")
_OF_SPANS = ("check", "enter", "leave", "skips")

_Thing = TypeVar("_Thing")
_Given = TypeVar("_Given")


class Registry(Generic[_Thing]):
    """Things by the names that files and command lines call them by; a class of its own for each kind of things.

    It changes while other packages are imported, as decorators have no other place to leave what they find. Entry
    points of the group `GROUP` are loaded once, and not before a name is asked for that nothing has registered; one
    that fails is an error only then, so that a broken package can't spoil what needs nothing of it.
    """

    kind: ClassVar[str]

    def __init__(self, things: Mapping[str, _Thing]) -> None:
        self._things: dict[str, _Thing] = {}
        for name, thing in things.items():
            self.register(name)(thing)

    def register(self, name: str) -> Callable[[_Given], _Given]:
        """Decorate a thing of this kind to give it a name.

        Raises TableError for a name that is taken or malformed, and for what is no such thing.
        """
        if not isinstance(name, str):  # the thing itself, where the decorator was written without a name
            raise TableError(
                f'{self.kind} {shown(name)}: expected its name, a string; write register_{self.kind}("name")'
            )

        def registered(thing: _Given) -> _Given:
            if NAME.fullmatch(name) is None:
                raise TableError(
                    f"{self.kind} {shown(name)}: expected a name of a-z, 0-9, _ and - that begins with a letter"
                )
            self.check(name, thing)
            other = self._things.get(name)
            if other is not None and _origin(other) != _origin(thing):
                raise TableError(
                    f"{self.kind} {name!r}: the name is taken by {_path(other)}; register {_path(thing)} under another "
                    "one"
                )
            self._things[name] = thing  # type: ignore[assignment]
            return thing

        return registered

    def check(self, name: str, thing: object) -> None:
        """Raise TableError for what is no such thing."""
        raise NotImplementedError

    def find(self, name: str) -> _Thing:
        """The thing of this name; TableError, listing the known names, for any other."""
        if name not in self._things:
            problems = self.plugin_problems
        if name not in self._things:
            known = f"expected one of {some_of(sorted(self._things))}" if self._things else "none is registered"
            raise TableError(
                f"{self.kind} {shown(name)} is unknown: {known}; install the package that registers it"
                + "".join(f"; {problem}" for problem in problems)
            )
        return self._things[name]

    @cached_property
    def plugin_problems(self) -> tuple[str, ...]:
        """Failures of the entry points, a line each; they are loaded once, here."""
        problems = []
        for entry in entry_points(group=GROUP):
            try:
                entry.load()
            except (Exception, SystemExit) as error:  # whatever other people's modules raise
                problems.append(f"the entry point {entry.name!r} of {GROUP} ({entry.value}) failed: {_line(error)}")
        return tuple(problems)


class RuleRegistry(Registry[type[Any]]):
    """Rules of sites and of spans: frozen dataclasses of arguments that are int or str."""

    kind = "rule"

    def __init__(self) -> None:
        super().__init__(BUILT_IN)

    def check(self, name: str, thing: object) -> None:
        """Raise TableError for what is no frozen dataclass of a rule."""
        rule: Any = thing
        is_frozen = getattr(getattr(rule, "__dataclass_params__", None), "frozen", False)
        if not is_frozen or not any(
            all(hasattr(rule, member) for member in needed) for needed in (_OF_SITES, _OF_SPANS)
        ):
            raise TableError(
                f"rule {name!r}: expected a frozen dataclass with {', '.join(_OF_SITES)}, or of spans with "
                f"{', '.join(_OF_SPANS)}, got {shown(rule)}"
            )
        for argument, kind in argument_types(rule).items():
            if kind not in (int, str) or argument == "rule":
                raise TableError(
                    f"rule {name!r}: expected arguments of int or str, none of them called rule, got {argument}: {kind}"
                )

    def make(self, name: str, arguments: Mapping[str, object]) -> AnyRule:
        """The rule of a name with these arguments; TableError, saying what is known, for one that there is not."""
        rule = self.find(name)
        _check_arguments(name, arguments, rule)
        try:
            instance: AnyRule = rule(**arguments)
        except Exception as error:  # whatever other people's rules raise
            raise TableError(f"rule {name!r}: {_line(error)}") from error
        return instance

    def describe(self, rule: AnyRule) -> tuple[str, dict[str, int | str]]:
        """Name and arguments of a rule, of which `make` makes an equal one; TableError for one without a name."""
        name = next((name for name, known in self._things.items() if known is type(rule)), None)
        if name is None:
            kind = type(rule)
            raise TableError(
                f"rule {kind.__module__}.{kind.__qualname__} has no name, expected one of "
                f"{some_of(sorted(self._things))}; register it with register_rule(name)"
            )
        arguments = {argument: getattr(rule, argument) for argument in argument_types(type(rule))}
        _check_arguments(name, arguments, type(rule))
        defaults = _defaults(type(rule))
        return name, {key: value for key, value in arguments.items() if value != defaults.get(key, MISSING)}


def argument_types(rule: type[Any]) -> dict[str, type]:
    """The arguments of a rule's class, which are its fields, and their types."""
    hints = get_type_hints(rule)
    return {field.name: hints[field.name] for field in fields(rule)}


def _check_arguments(name: str, arguments: Mapping[str, object], rule: type[Any]) -> None:
    types = argument_types(rule)
    if not types.keys() - _defaults(rule).keys() <= arguments.keys() <= types.keys():
        raise TableError(
            f"rule {name!r}: expected {_listed(types)}, got {_listed(arguments)}; leave out none but what has a default"
        )
    for argument, value in arguments.items():
        if type(value) is not types[argument] or (isinstance(value, int) and abs(value) > MAX_INT):
            expected = "a string" if types[argument] is str else "an integer"
            raise TableError(f"rule {name!r}: {argument}: expected {expected}, got {shown(value)}")


def _defaults(rule: type[Any]) -> dict[str, object]:
    return {field.name: field.default for field in fields(rule) if field.default is not MISSING}


def _listed(arguments: Mapping[str, object]) -> str:
    return f"the arguments {', '.join(map(shown, sorted(arguments)))}" if arguments else "no argument"


def _origin(thing: Any) -> tuple[str, str]:
    """Identity of a thing that stays when its module is run again: its path, and its file outside of notebooks."""
    does = getattr(thing, "emit", None) or getattr(thing, "enter", None) or thing
    code = None if thing.__module__ == "__main__" else getattr(does, "__code__", None)
    return _path(thing), getattr(code, "co_filename", "")


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _line(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first:.200}"


RULES = RuleRegistry()
register_rule = RULES.register
