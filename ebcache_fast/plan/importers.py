"""Tables of other projects, read as a CacheTable or, where layers differ, as a Plan.

None of these files says which timesteps it is for, so every importer asks for them, in execution order. All
are checked as strictly as our own: a table of the wrong length, type or direction would still make pictures.
"""

import math
import os
import re
import reprlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np

from ebcache_fast.errors import TableError
from ebcache_fast.plan import COMPUTE, REUSE, Branch, Plan, Rule, StepPlan, StepType, branch_names
from ebcache_fast.plan.table import CacheTable, Provenance
from ebcache_fast.plan.table_file import naming, read_bytes, read_json
from ebcache_fast.plan.table_fit import LISTS, SMOOTHCACHE
from ebcache_fast.plan.table_schema import MAX_LAYERS

_RULES: dict[int, Rule] = {1: COMPUTE, 0: REUSE}
_BRANCHES = {
    "attn": Branch.SELF_ATTN,
    "mlp": Branch.MLP,
    "attn1": Branch.SELF_ATTN,  # the last three are diffusers' names
    "attn2": Branch.CROSS_ATTN,
    "ff": Branch.MLP,
}
_ROW_NAME = re.compile(r"(?P<branch>[a-z0-9]+)(-(?P<layer>[0-9]{1,4}))?")

Row = tuple[Rule, ...]  # what one branch does, step by step
RowKey = tuple[int | None, Branch]  # the layer it is for, None for all


def from_eb_npy(
    path: str | os.PathLike[str],
    timesteps: Iterable[float],
    order: str = "execution",
    eps_scale: float = 1.0,
    allow_amplify: bool = False,
) -> CacheTable:
    """EB-Cache's released ``.npy``: a 1-D array of one integer 0 to 3 per step (arXiv 2503.07120).

    The released code reads it by the descending step index, so that its last entry runs first and the cached
    steps fall on the low-noise half, against the paper's own thresholds. ``order="index"`` reproduces that.
    "execution" runs the first entry first: so read, the table is the rule it was made by (see the named table
    eb-cache-released-50), and agrees with schedules calibrated on the same model.

    Raises TableError for pickles, other shapes or types, codes above 3, a wrong length or unknown ``order``.
    """
    with naming(path):
        codes = _read_npy(Path(path))
        if (wrong := next((i for i, code in enumerate(codes) if not 0 <= code <= 3), None)) is not None:
            raise TableError(f"step_types[{wrong}]: expected an integer from 0 to 3, got {codes[wrong]}")
        orders = {"execution": codes, "index": codes[::-1]}
        if order not in orders:
            raise TableError(f"order: expected one of {', '.join(orders)}, got {order!r}")
        provenance = Provenance(by="EB-Cache (arXiv 2503.07120)", source=Path(path).name, options={"order": order})
        return CacheTable(timesteps, orders[order], eps_scale, made=provenance, allow_amplify=allow_amplify)


def from_smoothcache(
    path: str | os.PathLike[str],
    timesteps: Iterable[float],
    eps_scale: float = 1.0,
    allow_amplify: bool = False,
    depth: int | None = None,
    branches: tuple[Branch, ...] = (Branch.SELF_ATTN, Branch.MLP),
) -> CacheTable:
    """SmoothCache's JSON (arXiv 2411.10510): per branch a list of 1 (compute) and 0 (reuse), one per step.

    A branch without a list is computed in every step, on every model, as SmoothCache wraps none but the modules that
    it names: ``attn1`` alone gives SELF_ATTENTION steps. ``attn``, the original DiT's name, is its only attention, and
    self-attention where there is cross-attention too. A 0 before anything is stored is computed.
    With ``depth``, lists may be of single layers: the table is then for so many layers of ``branches`` alone, and does
    what `smoothcache_plan` says. Raises TableError for anything else.
    """
    timesteps = tuple(timesteps)
    with naming(path):
        rows = _read_rows(Path(path), len(timesteps))
        if depth is None and any(layer is not None for layer, _ in rows):
            raise TableError(
                "it has lists for single layers, so the table has to be for a model of known sizes; give its depth, or "
                "for a Plan use smoothcache_plan"
            )
        types = {step_type.reuses: step_type for step_type in StepType}
        reused = (
            frozenset(branch for (_, branch), row in rows.items() if row[i] is REUSE) for i in range(len(timesteps))
        )
        lists = branch_names(branch for _, branch in rows)
        provenance = Provenance(by=SMOOTHCACHE, source=Path(path).name, options={LISTS: lists})
        if depth is not None:
            steps = _steps_of_rows(rows, len(timesteps), depth, branches)
            step_types = [step.step_type for step in steps]
            return CacheTable(
                timesteps, step_types, eps_scale, made=provenance, allow_amplify=allow_amplify, step_plans=steps
            )
        return CacheTable(
            timesteps,
            [types[branches_reused] for branches_reused in reused],
            eps_scale,
            made=provenance,
            allow_amplify=allow_amplify,
        )


def smoothcache_plan(
    path: str | os.PathLike[str],
    timesteps: Iterable[float],
    depth: int,
    eps_scale: float = 1.0,
    branches: tuple[Branch, ...] = (Branch.SELF_ATTN, Branch.MLP),
) -> Plan:
    """SmoothCache's JSON with lists for single layers (``attn-3``), or for all, on a model of ``depth`` layers.

    A layer's own list goes before the one for all; a layer that has neither is computed in every step, and so is a 0
    before anything is stored. ``branches`` is what a layer of the model runs, in order.
    Raises TableError for anything else, and for lists of a layer or branch that the model lacks.
    """
    timesteps = tuple(timesteps)
    with naming(path):
        rows = _read_rows(Path(path), len(timesteps))
        return Plan(_steps_of_rows(rows, len(timesteps), depth, branches), timesteps, eps_scale)


def eps_scale_from_adm(lam: float) -> float:
    """b of Epsilon Scaling's lambda, which divides eps (Ning et al., ADM-ES, arXiv 2308.15321): 1/lambda."""
    return _reciprocal("lam", lam)


def eps_scale_from_eb_delta(delta: float) -> float:
    """b of ``delta`` in EB-Cache's released code, which divides eps by it: 1/delta.

    The paper multiplies. The release's 0.965 hence amplifies by 1.036, which a CacheTable holds only with
    ``allow_amplify``; what the paper describes is ``eps_scale=0.965``.
    """
    return _reciprocal("delta", delta)


def _reciprocal(name: str, value: float) -> float:
    if not (0 < value < math.inf and 1 / value < math.inf):
        raise TableError(f"{name}: expected a finite number above 0, got {value!r}; 1 scales nothing")
    return 1 / value


def _read_npy(path: Path) -> list[int]:
    raw = read_bytes(path)
    try:
        array = np.lib.format.read_array(BytesIO(raw), allow_pickle=False)
    except Exception as error:  # numpy's header parser raises a dozen kinds on foreign bytes
        reason = str(error).partition("\n")[0]
        raise TableError(f"expected a .npy array, saved without pickle: {reason}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TableError(f"expected a 1-D array of integers 0 to 3, got {array.dtype} of shape {array.shape}")
    return [int(code) for code in array]


def _read_rows(path: Path, steps: int) -> dict[RowKey, Row]:
    rows: dict[RowKey, Row] = {}
    for name, flags in read_json(path).items():
        key = _row_key(name)
        if key in rows:
            raise TableError(f"{name}: the branch has a list already, under diffusers' or the original name")
        rows[key] = _row(name, flags, steps)
    if not rows:
        raise TableError("expected a list per branch, got none")
    return rows


def _steps_of_rows(
    rows: dict[RowKey, Row], count: int, depth: int, branches: tuple[Branch, ...]
) -> tuple[StepPlan, ...]:
    if not 1 <= depth <= MAX_LAYERS:
        raise TableError(f"depth: expected 1 to {MAX_LAYERS}, got {depth}; give the number of the model's layers")
    for layer, branch in rows:
        if branch not in branches or (layer is not None and layer >= depth):
            where = "all layers" if layer is None else f"layer {layer}"
            raise TableError(
                f"{branch.name}: expected lists for {branch_names(branches)} of layers 0 to {depth - 1}, got one "
                f"for {where}; give the depth and branches of the file's model"
            )
    computed: Row = (COMPUTE,) * count
    slots = [[rows.get((n, b)) or rows.get((None, b), computed) for b in branches] for n in range(depth)]
    return tuple(StepPlan.by_layer(branches, [[row[i] for row in layer] for layer in slots]) for i in range(count))


def _row_key(name: str) -> RowKey:
    match = _ROW_NAME.fullmatch(name)
    if match is None or match["branch"] not in _BRANCHES:
        raise TableError(f"{name!r}: expected one of {', '.join(_BRANCHES)}, alone or with a layer as in attn-3")
    return None if match["layer"] is None else int(match["layer"]), _BRANCHES[match["branch"]]


def _row(name: str, flags: object, steps: int) -> Row:
    if not isinstance(flags, list) or any(type(flag) is not int or flag not in _RULES for flag in flags):
        raise TableError(f"{name}: expected a list of 1 (compute) and 0 (reuse), got {reprlib.repr(flags)}")
    if len(flags) != steps:
        raise TableError(f"{name}: expected {steps}, one per timestep, got {len(flags)}")
    return (COMPUTE, *(_RULES[flag] for flag in flags[1:]))  # at first there is nothing to reuse


def eps_scale_of(eps_scale: float | None, adm_lambda: float | None = None, eb_delta: float | None = None) -> float:
    """The factor b from whichever of three conventions names it, 1 if none does; TableError for more than one."""
    factors = [value for value in (eps_scale, adm_lambda, eb_delta) if value is not None]
    if len(factors) > 1:
        raise TableError("eps_scale, adm_lambda and eb_delta all mean b; give one of them")
    if adm_lambda is not None:
        return eps_scale_from_adm(adm_lambda)
    if eb_delta is not None:
        return eps_scale_from_eb_delta(eb_delta)
    return 1.0 if eps_scale is None else eps_scale
