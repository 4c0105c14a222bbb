"""Fit of a Cache Table to a model: by the sizes it is bound to, and by what the project it came from meant."""

from collections.abc import Iterable

from ebcache_fast.errors import TableError
from ebcache_fast.plan import Branch, ModelShape, Site, StepType, branch_names
from ebcache_fast.plan.sites import described
from ebcache_fast.plan.table_schema import Provenance

SMOOTHCACHE = "SmoothCache (arXiv 2411.10510)"  # as `Provenance.by` names it
INDIFFERENT = frozenset({"in_channels"})  # what a model is given beside latents, as image-to-video is, meets no branch
LISTS = "lists"  # the option of its provenance that says which branches the schedule had lists for


def check_sizes(model: tuple[tuple[str, int], ...] | None, shape: ModelShape) -> None:
    """Raise TableError, naming what differs, unless a table bound to ``model`` is for this shape; None fits any.

    What comes before the blocks does not matter to reuse: a text-to-video table serves image-to-video.
    """
    actual = dict(shape.sizes)
    wanted = actual if model is None else dict(model)
    differing = [
        f"{name} {wanted.get(name)}, not {actual.get(name)}"
        for name in sorted((wanted.keys() | actual.keys()) - INDIFFERENT)
        if wanted.get(name) != actual.get(name)
    ]
    if differing:
        raise TableError(f"model: the table is for {'; '.join(differing)}; use a table made for this model")


def check_sites(sites: tuple[Site, ...], shape: ModelShape) -> None:
    """Raise TableError, naming what differs, unless a table that has rules for these sites is for this shape."""
    if sites != shape.sites:
        raise TableError(
            f"sites: the table is for {described(sites)}, not {described(shape.sites)}; use a table made for this model"
        )


def check_origin(
    provenance: Provenance | None, step_types: Iterable[StepType | None], branches: tuple[Branch, ...]
) -> None:
    """Raise TableError where an imported schedule lists a branch that the model lacks, or can't say which it lists.

    Tables that the first version imported do not know whether ATTENTION, of a model with cross-attention, was meant
    to reuse that too.
    """
    if provenance is None or provenance.by != SMOOTHCACHE:
        return
    if LISTS in provenance.options:
        listed = str(provenance.options[LISTS]).split(" + ")
        if lacking := [name for name in listed if name not in (branch.name for branch in branches)]:
            raise TableError(
                f"made.options.{LISTS}: the schedule has lists for {' + '.join(lacking)}, got a model of "
                f"{branch_names(branches)}; use a schedule of this model"
            )
    elif Branch.CROSS_ATTN in branches and {StepType.ATTENTION, StepType.ATTN_MLP}.intersection(step_types):
        raise TableError(
            f"made: {provenance.by} {provenance.source!r} was imported before step types told SELF_ATTN from "
            "CROSS_ATTN, and this model has both; import the schedule again"
        )
