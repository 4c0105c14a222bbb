"""The steps of a table whose sites differ, as its file spells them.

``sites`` counts layers that run the same branches, ``kinds`` names each rule with its arguments once, and ``steps`` has
a row of kinds for each step, one for each site in the order in which the model runs them::

    c                  every site
    c*4 r c            4 sites, then one, then one
    (r c)*28           28 times r c
    c + k              every site; and what k says of a span of sites

A row has one spelling: from left to right the repeated pattern of up to `LONGEST` kinds that covers most sites, the
shortest of those, else a single kind; then the rules over spans, in order. Any other is refused, with the right one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, cast

from ebcache_fast.errors import TableError
from ebcache_fast.plan import Branch, Rule, Site, StepPlan, StepType, shown
from ebcache_fast.plan.registry import RULES, AnyRule, RuleRegistry
from ebcache_fast.plan.spans import SpanRule
from ebcache_fast.plan.table_file import Rows, key_shown, naming
from ebcache_fast.plan.table_schema import AnyTableFile, Layers, SitedTableFile, TableFile
from ebcache_fast.plan.timesteps import some_of

LONGEST = 12  # kinds of a pattern: four layers of three branches
MAX_RULES = 2**22  # of a table, each row counted once: a wrong file must not fill the memory

_KIND, _TIMES = "[a-z][a-z0-9_]{0,39}", r"\*([1-9][0-9]{0,6})"
_ITEM = rf"({_KIND})(?:{_TIMES})?|\(({_KIND}(?: {_KIND})*)\){_TIMES}"
_ITEMS = re.compile(_ITEM)
_ROW = re.compile(rf"((?:{_ITEM})(?: (?:{_ITEM}))*)(?: \+ (?P<spans>{_KIND}(?: {_KIND})*))?")


def spelt(steps: Sequence[StepPlan], registry: RuleRegistry = RULES) -> dict[str, Any]:
    """The keys ``sites``, ``kinds`` and ``steps`` of the file; TableError for a rule or sites that it can't hold."""
    kinds: dict[AnyRule, str] = {}
    count = Counter[str]()
    distinct = dict.fromkeys(steps)
    rules: Iterable[AnyRule] = chain.from_iterable((*step.rules, *step.spans) for step in distinct)
    for rule in dict.fromkeys(rules):
        letter = registry.describe(rule)[0][0]
        count[letter] += 1
        kinds[rule] = letter if count[letter] == 1 else f"{letter}{count[letter]}"
    rows = {
        step: " + ".join(filter(None, (_row([kinds[rule] for rule in step.rules]), _spans(step, kinds))))
        for step in distinct
    }
    named = {name: registry.describe(rule) for rule, name in kinds.items()}
    return {
        "sites": [layers.model_dump(mode="json") for layers in _layers(steps[0].sites)],
        "kinds": {name: {"rule": rule, **arguments} for name, (rule, arguments) in named.items()},
        "steps": Rows(rows[step] for step in steps),
    }


def arguments_of(document: dict[str, Any]) -> dict[str, Any]:
    """The arguments of CacheTable in a JSON object of either version; TableError where it is neither."""
    schema = document.get("schema")
    if type(schema) is int and schema > 2:
        raise TableError(f"schema: expected 1 or 2, got {shown(schema)}; install the ebcache_fast that wrote the file")
    file: AnyTableFile
    does: dict[str, Any]
    if type(schema) is int and schema == 2:
        file = sited = SitedTableFile(**document)
        steps = steps_of(sited.sites, sited.kinds, sited.steps)
        does = {
            "step_types": [step.step_type for step in steps],
            "step_plans": steps,
            "corrections": sited.corrections,
        }
    else:
        file = typed = TableFile(**document)
        does = {"step_types": [StepType[name] for name in typed.step_types]}
    return {
        "timesteps": file.timesteps,
        "eps_scale": file.eps_scale,
        "sampler": file.sampler,
        "model": file.model,
        "made": file.made,
        "allow_amplify": file.allow_amplify,
        **does,
    }


def steps_of(
    layers: Iterable[Layers],
    kinds: Mapping[str, Mapping[str, object]],
    rows: Sequence[str],
    registry: RuleRegistry = RULES,
) -> tuple[StepPlan, ...]:
    """The steps that these keys of the file spell; TableError, naming what is wrong, for what `spelt` never wrote."""
    sites = _sites(tuple(layers))
    if len(set(rows)) * len(sites) > MAX_RULES:
        raise TableError(f"steps: expected at most {MAX_RULES} rules, got {len(set(rows))} rows of {len(sites)} sites")
    rules = _rules(kinds, registry)
    plans: dict[str, StepPlan] = {}
    used: set[str] = set()
    for i, row in enumerate(rows):
        if row not in plans:
            with naming(f"steps[{i}]"):
                names, spans = _names(row, rules, len(sites))
                plans[row] = StepPlan(sites, *_split(rules, names, spans))
            used.update(names, spans)
    if unused := next((name for name in rules if name not in used), None):
        raise TableError(f"kinds.{unused}: no step has it; leave it out")
    return tuple(map(plans.__getitem__, rows))


def _layers(sites: tuple[Site, ...]) -> list[Layers]:
    """Sites as counts of layers; TableError for layers that are not counted from 0."""
    by_layer = [(layer, tuple(s.branch.name for s in group)) for layer, group in groupby(sites, lambda s: s.layer)]
    if [layer for layer, _ in by_layer] != list(range(len(by_layer))):
        raise TableError(f"sites: expected layers in order from 0, got {shown([layer for layer, _ in by_layer])}")
    alike = [(names, len(list(group))) for names, group in groupby(names for _, names in by_layer)]
    return [Layers.model_validate({"layers": count, "branches": names}) for names, count in alike]


def _sites(layers: tuple[Layers, ...]) -> tuple[Site, ...]:
    found: list[Site] = []
    depth = 0
    for i, some in enumerate(layers):
        if len(set(some.branches)) != len(some.branches) or not some.branches:
            raise TableError(f"sites[{i}].branches: expected one or more, each once, got {list(some.branches)}")
        if i and layers[i - 1].branches == some.branches:
            raise TableError(f"sites[{i}]: expected other branches than the layers before; count them together")
        found += [Site(depth + n, Branch[name]) for n in range(some.layers) for name in some.branches]
        depth += some.layers
        if len(found) > MAX_RULES:
            raise TableError(f"sites: expected at most {MAX_RULES}, got more")
    if not found:
        raise TableError("sites: expected one or more layers, got none")
    return tuple(found)


def _rules(kinds: Mapping[str, Mapping[str, object]], registry: RuleRegistry) -> dict[str, AnyRule]:
    rules: dict[str, AnyRule] = {}
    names: dict[AnyRule, str] = {}
    for name, spelling in kinds.items():
        with naming(f"kinds.{key_shown(name)}"):
            if re.fullmatch(_KIND, name) is None:
                raise TableError("expected a name of a-z, 0-9 and _ that begins with a letter")
            if not isinstance(spelling.get("rule"), str):
                raise TableError(f"rule: expected the name of a rule, got {shown(spelling.get('rule'))}")
            arguments = {argument: value for argument, value in spelling.items() if argument != "rule"}
            rules[name] = registry.make(str(spelling["rule"]), arguments)
            if (same := names.setdefault(rules[name], name)) != name:
                raise TableError(f"expected another rule than {same} is; name each rule once")
    return rules


def _names(row: str, rules: Mapping[str, AnyRule], sites: int) -> tuple[list[str], list[str]]:
    """The kind of each site, and those of spans."""
    if (match := _ROW.fullmatch(row)) is None:
        raise TableError(f"expected kinds such as c, c*4 r or (r c)*28, got {shown(row)}")
    spans, row = (match["spans"] or "").split(), match[1]
    parts = [(m[1] or m[3], int(m[2] or m[4] or 1)) for m in _ITEMS.finditer(row)]
    patterns = [(names.split(" "), times) for names, times in parts]
    for name in chain(chain.from_iterable(names for names, _ in patterns), spans):
        if name not in rules:
            raise TableError(f"kind {name} is unknown: expected one of {some_of(rules)}; name it in kinds")
    if row in rules:
        return [row] * sites, spans
    if (count := sum(len(names) * times for names, times in patterns)) != sites:
        raise TableError(f"expected {sites} kinds, one for each site, got {count}")
    names = [name for pattern, times in patterns for name in pattern * times]
    if row != (right := _row(names)):
        raise TableError(f"expected the spelling {shown(right)}, got {shown(row)}")
    return names, spans


def _split(
    rules: Mapping[str, AnyRule], names: Iterable[str], spans: Iterable[str]
) -> tuple[tuple[Rule, ...], tuple[SpanRule, ...]]:
    """The rules of these names; TableError for one of spans where one of sites stands, or the other way round."""
    for name in names:
        if not hasattr(rules[name], "emit"):
            raise TableError(f"kind {name} is for spans of sites; write it after the sites' kinds and a +")
    for name in spans:
        if not hasattr(rules[name], "enter"):
            raise TableError(f"kind {name} is for single sites, expected one for spans after the +")
    return tuple(cast(Rule, rules[name]) for name in names), tuple(cast(SpanRule, rules[name]) for name in spans)


def _spans(step: StepPlan, kinds: Mapping[AnyRule, str]) -> str:
    return " ".join(kinds[span] for span in step.spans)


def _row(names: Sequence[str]) -> str:
    """The one spelling of a row."""
    if len(set(names)) == 1:
        return names[0]
    items, start = [], 0
    while start < len(names):
        times = {length: _times(names, start, length) for length in range(1, LONGEST + 1)}
        length = max(times, key=lambda size: (size * times[size] if times[size] > 1 else 0, -size))
        pattern = " ".join(names[start : start + length])
        repeated = pattern if length == 1 else f"({pattern})"
        items.append(f"{repeated}*{times[length]}" if times[length] > 1 else pattern)
        start += length * times[length]
    return " ".join(items)


def _times(names: Sequence[str], start: int, length: int) -> int:
    """Number of times that the pattern of ``length`` kinds at ``start`` stands there, one after another."""
    pattern, times = names[start : start + length], 1
    while names[start + times * length : start + (times + 1) * length] == pattern:
        times += 1
    return times
