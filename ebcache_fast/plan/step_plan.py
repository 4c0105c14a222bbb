"""StepType, the steps that treat all layers alike, and `StepPlan`, a rule for each site."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Self

from ebcache_fast.errors import TableError
from ebcache_fast.former import warn
from ebcache_fast.plan.rules import COMPUTE, REUSE, Rule
from ebcache_fast.plan.sites import Branch, Site, branch_names, layered
from ebcache_fast.plan.spans import SpanRule
from ebcache_fast.plan.timesteps import shown


class StepType(IntEnum):
    """The steps that treat all layers alike; 0 to 3 as in EB-Cache's released tables (arXiv 2503.07120).

    ATTENTION and ATTN_MLP mean whatever attention a model has. The types after MLP tell self-attention from
    cross-attention, so that every set of branches has a type.
    """

    NO_CACHE = 0
    ATTENTION = 1
    ATTN_MLP = 2
    MLP = 3
    SELF_ATTENTION = 4
    CROSS_ATTENTION = 5
    SELF_ATTN_MLP = 6
    CROSS_ATTN_MLP = 7

    @property
    def reuses(self) -> frozenset[Branch]:
        """The branches that such a step reuses in every layer."""
        return _REUSES[self]

    def fits(self, branches: tuple[Branch, ...]) -> bool:
        """True if layers of these branches have all that it speaks of, as layers of any branches have of 0 to 3."""
        return self <= StepType.MLP or self.reuses <= frozenset(branches)


_REUSES = {
    StepType.NO_CACHE: frozenset[Branch](),
    StepType.ATTENTION: frozenset({Branch.SELF_ATTN, Branch.CROSS_ATTN}),
    StepType.ATTN_MLP: frozenset(Branch),
    StepType.MLP: frozenset({Branch.MLP}),
    StepType.SELF_ATTENTION: frozenset({Branch.SELF_ATTN}),
    StepType.CROSS_ATTENTION: frozenset({Branch.CROSS_ATTN}),
    StepType.SELF_ATTN_MLP: frozenset({Branch.SELF_ATTN, Branch.MLP}),
    StepType.CROSS_ATTN_MLP: frozenset({Branch.CROSS_ATTN, Branch.MLP}),
}


@dataclass(frozen=True)
class StepPlan:
    """Rules of one step: one for each site, and rules over spans of them, of which some skip what is inside.

    Raises TableError without a site, for another number of rules than sites, for a rule at a site that can't take it,
    and for spans that leave the model, or overlap.
    """

    sites: tuple[Site, ...]
    rules: tuple[Rule, ...]
    spans: tuple[SpanRule, ...] = ()

    def __post_init__(self) -> None:
        for name in ("sites", "rules", "spans"):  # hashed
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise TableError(f"sites: expected one or more, each once, got {list(map(str, self.sites))}")
        if len(self.rules) != len(self.sites):
            raise TableError(f"rules: expected one per site, {len(self.sites)}, got {len(self.rules)}")
        for site, rule in zip(self.sites, self.rules, strict=True):
            if isinstance(rule, type) or not all(hasattr(rule, name) for name in ("check", "emit", "runs_branch")):
                raise TableError(f"{site}: expected a rule of sites, such as Compute(), got {shown(rule)}")
            rule.check(site)
        end = 0
        for span in self.spans:
            if isinstance(span, type) or not all(hasattr(span, name) for name in ("check", "enter", "leave", "skips")):
                raise TableError(f"spans: expected rules of spans, such as KeepSpan(0, 1), got {shown(span)}")
            whole = {type(span.first), type(span.last)} == {int}
            if not whole or not end <= span.first <= span.last < len(self.sites):
                raise TableError(
                    f"span {span.first!r} to {span.last!r}: expected sites from {end} to {len(self.sites) - 1}, in "
                    "order; let spans follow each other within the model"
                )
            span.check()
            end = span.last + 1

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.rules, self.spans))

    @classmethod
    def uniform(cls, step_type: StepType, sites: tuple[Site, ...]) -> Self:
        """The plan that treats the sites of all layers as ``step_type`` says.

        Raises TableError for a type that speaks of a branch which the layers lack.
        """
        branches = tuple(dict.fromkeys(site.branch for site in sites))
        if not step_type.fits(branches):
            raise TableError(
                f"step type {step_type.name}: expected layers with {branch_names(step_type.reuses)}, got layers of "
                f"{branch_names(branches)}; use a table made for this model"
            )
        return cls(sites, tuple(REUSE if site.branch in step_type.reuses else COMPUTE for site in sites))

    @classmethod
    def by_layer(cls, branches: tuple[Branch, ...], rows: Sequence[Sequence[Rule]]) -> Self:
        """The plan of layers that all run ``branches``, with a row of rules for each layer.

        Raises TableError without a layer or branch, for a repeated branch, or a row of another length.
        """
        if not branches or len(set(branches)) != len(branches):
            raise TableError(f"branches: expected one or more, each once, got {branches!r}")
        lengths = [len(row) for row in rows]
        if set(lengths) != {len(branches)}:
            raise TableError(f"rows: expected {len(branches)} rules per layer, got rows of {lengths}")
        return cls(layered(len(rows), branches), tuple(rule for row in rows for rule in row))

    @cached_property
    def step_type(self) -> StepType | None:
        """The step type this plan equals, the first that does; None where layers differ."""
        branches = tuple(dict.fromkeys(site.branch for site in self.sites))
        types = (step_type for step_type in StepType if step_type.fits(branches) and not self.spans)
        return next((alike for alike in types if StepPlan.uniform(alike, self.sites).rules == self.rules), None)

    @property
    def type_name(self) -> str:
        """Name of the plan's step type, else of what it does: "KEEP" everything it runs, "FORECAST", "MIXED"."""
        if self.step_type is not None:
            return self.step_type.name
        if not self.reused:
            return "KEEP"
        return "FORECAST" if self.computes_nothing else "MIXED"

    @cached_property
    def computed(self) -> tuple[Site, ...]:
        """The sites of which the branch runs, in order of execution."""
        return tuple(site for i, site in enumerate(self.sites) if self._runs(i))

    @cached_property
    def reused(self) -> tuple[Site, ...]:
        """The sites of which the branch does not run, in order of execution."""
        return tuple(site for i, site in enumerate(self.sites) if not self._runs(i))

    def _runs(self, site: int) -> bool:
        is_skipped = any(span.skips and span.first <= site <= span.last for span in self.spans)
        return self.rules[site].runs_branch and not is_skipped

    @property
    def computes_nothing(self) -> bool:
        """True if no branch runs, so that all layers collapse into one sum over gated slots."""
        return not self.computed

    def action(self, layer: int, branch: Branch) -> Rule:
        """`rule_at`, by its former name."""
        warn("StepPlan.action", "StepPlan.rule_at")
        return self.rule_at(layer, branch)

    def rule_at(self, layer: int, branch: Branch) -> Rule:
        """The rule of one site; ValueError where the model has no such site."""
        return self.rules[self.sites.index(Site(layer, branch))]
