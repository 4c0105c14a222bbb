"""``ebcache-fast table``: show a Cache Table, hold it against a model, import another project's, or export it."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def show_table(
    source: Positional[str],
    program: bool = False,
    model: str = "letters",
    image_size: int = 256,
    num_classes: int = 1000,
) -> None:
    """Print a Cache Table: its steps as a strip, what it is for, where it comes from.

    Args:
        source: a .json file of one table or several, or the name of one that comes with the package.
        program: also its distinct programs, what each step launches on a model, how often each runs and what it costs.
        model: of the programs: "letters", the bundled one, or an original DiT such as DiT-XL/2.
        image_size: 256 or 512, of a latent model.
        num_classes: of a latent model.
    """
    from ebcache_fast.apps import console
    from ebcache_fast.apps.bundled import shape_of
    from ebcache_fast.apps.method_spec import open_tables
    from ebcache_fast.apps.program_report import programs_shown

    for table in open_tables(source).tables:
        console.print_table(table)
        if program:
            print()
            print("\n".join(programs_shown(table.plan(shape := shape_of(model, image_size, num_classes)), shape)))


def check_table(
    source: Positional[str],
    model: str = "letters",
    image_size: int = 256,
    num_classes: int = 1000,
) -> None:
    """Hold a Cache Table against a model: whether it fits, and what it costs there.

    Args:
        source: a .json file of one table or several, or the name of one that comes with the package.
        model: "letters", the bundled one, or an original DiT such as DiT-XL/2.
        image_size: 256 or 512, of a latent model.
        num_classes: of a latent model.
    """
    from ebcache_fast.apps import console
    from ebcache_fast.apps.bundled import shape_of
    from ebcache_fast.apps.method_spec import open_tables

    shape = shape_of(model, image_size, num_classes)
    for table in open_tables(source).tables:
        console.print_costs(table.plan(shape), shape)


def import_table(
    source: Positional[Path],
    out: Path,
    kind: Literal["eb-npy", "smoothcache"] | None = None,
    order: Literal["execution", "index"] = "execution",
    steps: int = 50,
    spacing: Literal["even", "stride"] = "even",
    eps_scale: float | None = None,
    adm_lambda: float | None = None,
    eb_delta: float | None = None,
    allow_amplify: bool = False,
    model: str | None = None,
    depth: int | None = None,
    branches: tuple[Literal["self_attn", "cross_attn", "mlp"], ...] = ("self_attn", "mlp"),
) -> None:
    """Turn a schedule that another project released into a Cache Table.

    Args:
        source: EB-Cache's .npy, or SmoothCache's .json.
        out: file to write the table to, .json.
        kind: what the source is; without, its content says so.
        order: of an .npy: as executed, or by descending index, as the released code reads it.
        steps: how many.
        spacing: of the timesteps out of 1000: even, both ends kept, or stride, 0, k, 2k and so on.
        eps_scale: factor b on the predicted noise, in (0, 1].
        adm_lambda: instead, ADM-ES's lambda: b = 1 / lambda.
        eb_delta: instead, the delta of EB-Cache's released script: b = 1 / delta.
        allow_amplify: lets b exceed 1.
        model: whose layers a SmoothCache schedule's lists for single layers are of: letters or an original DiT.
        depth: of any other model, how many layers it has.
        branches: of any other model, what each layer runs, in order.
    """
    from ebcache_fast.apps import console
    from ebcache_fast.apps.bundled import shape_of
    from ebcache_fast.errors import InputError
    from ebcache_fast.plan import Branch
    from ebcache_fast.plan.importers import eps_scale_of, from_eb_npy, from_smoothcache
    from ebcache_fast.plan.table_file import is_npy
    from ebcache_fast.samplers.schedule import TRAIN_STEPS, ddim_timesteps, respaced_timesteps

    timesteps = (respaced_timesteps if spacing == "even" else ddim_timesteps)(TRAIN_STEPS, steps)
    b = eps_scale_of(eps_scale, adm_lambda, eb_delta)
    if model is not None and depth is not None:
        raise InputError(f"--model {model} says how many layers there are; leave out --depth {depth}")
    if kind == "eb-npy" or (kind is None and (is_npy(source) or source.suffix != ".json")):
        if model is not None or depth is not None:
            raise InputError(f"{source}: EB-Cache's .npy is for any model; leave out --model and --depth")
        table = from_eb_npy(source, timesteps, order, b, allow_amplify)
    else:
        sites = tuple(Branch(name) for name in branches)
        if model is not None:
            shape = shape_of(model, image_size=256, num_classes=1000)
            depth, sites = shape.depth, shape.branches
        table = from_smoothcache(source, timesteps, b, allow_amplify, depth, sites)
    table.save(out)
    console.print_table(table)
    print(out)


def export_table(source: Positional[str], kind: Literal["mask", "bins"] = "mask", out: Path | None = None) -> None:
    """Write which steps of a Cache Table compute, as cache-dit and what is built on it take it.

    Args:
        source: a .json file of one table, or the name of one that comes with the package.
        kind: mask, cache-dit's steps_computation_mask, 1 for a step that computes; or bins, its compute_bins and
            cache_bins, which SGLang and vLLM-Omni hand on.
        out: file to write the JSON to; without, it is printed.
    """
    import json

    from ebcache_fast.apps.method_spec import open_table
    from ebcache_fast.plan.exporters import bins, steps_mask
    from ebcache_fast.plan.files import replacing

    table = open_table(source)
    text = json.dumps(steps_mask(table) if kind == "mask" else bins(table)._asdict())
    if out is None:
        print(text)
        return
    with replacing(out) as partial:
        partial.write_text(text + "\n")
    print(out)
