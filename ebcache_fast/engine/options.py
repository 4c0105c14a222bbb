"""Options of an engine."""

from dataclasses import InitVar, dataclass
from numbers import Integral

from ebcache_fast.errors import InputError
from ebcache_fast.former import warn
from ebcache_fast.models import Denoiser
from ebcache_fast.models.float8 import check_float8
from ebcache_fast.plan import shown


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine; none of them but fp8 changes a result.

    strict: what would be counted as a fallback raises instead: CaptureError or TrajectoryError.
    whole_trajectory: our own loop is one graph, instead of one for each kind of step.
    pdl: programmatic dependent launch, a kernel is launched while the one before still runs; from compute capability
    9.0.
    fp8: QKV's and fc1's products in float8, which rounds what they multiply to 4 bits; see `Float8Branches`. On a GPU,
    of a DiT of the original layout in bfloat16, from compute capability 8.9; a CPU gains nothing by it.
    release: a drop-in keeps no memory between runs; see `ebcache_fast.enable`.
    max_cache_bytes: the caches of all trajectories together take so much at most, None means as much as there is; one
    that would take more raises InputError before it takes any.
    max_graphs: beyond so many, steps run eagerly. max_trajectories: so many at a time, each in memory of its own.
    dependent_launch: former name of pdl.
    Raises InputError for a limit below 1 or that is no whole number, and for a switch that is neither True nor False.
    """

    strict: bool = False
    whole_trajectory: bool = False
    pdl: bool = False
    fp8: bool = False
    max_graphs: int = 64
    max_trajectories: int = 4
    release: bool = False
    max_cache_bytes: int | None = None
    dependent_launch: InitVar[bool | None] = None

    def __post_init__(self, dependent_launch: bool | None) -> None:
        for name in ("strict", "whole_trajectory", "pdl", "fp8", "release"):
            _check_switch(name, getattr(self, name))
        if dependent_launch is not None:
            warn("EngineOptions(dependent_launch=...)", "pdl=...", stacklevel=4)
            _check_switch("dependent_launch", dependent_launch)
            if self.pdl and not dependent_launch:
                raise InputError("pdl=True contradicts dependent_launch=False, its former name; pass pdl alone")
            object.__setattr__(self, "pdl", dependent_launch)
        _check_limit("max_graphs", self.max_graphs, "the default")
        _check_limit("max_trajectories", self.max_trajectories, "the default")
        if self.max_cache_bytes is not None:
            _check_limit("max_cache_bytes", self.max_cache_bytes, "no limit")

    def check(self, denoiser: Denoiser) -> None:
        """Raise InputError where a model, or the device that it lies on, can't be run so."""
        if self.fp8:
            check_float8(denoiser)


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name}={shown(value)} is neither True nor False; pass one of them, or leave it out")


def _check_limit(name: str, value: object, without: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name}={shown(value)} is no whole number of 1 or more; leave it out for {without}")
