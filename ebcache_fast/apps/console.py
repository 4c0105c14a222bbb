"""Output of the commands: progress bars, tables of results, a table's steps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ebcache_fast._version import __version__
from ebcache_fast.apps.bundled import default_device
from ebcache_fast.apps.compare import Result
from ebcache_fast.apps.timeline import STEP_NAMES, Timeline
from ebcache_fast.calibration.target import TOLERANCE
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops.fallback import Fallback
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.plan.sites import described
from ebcache_fast.plan.table import CacheTable, named_tables

if TYPE_CHECKING:
    from tqdm import tqdm

STYLES = {
    "NO_CACHE": "bold blue",
    "ATTENTION": "yellow",
    "MLP": "magenta",
    "ATTN_MLP": "green",
    "SELF_ATTENTION": "bright_yellow",
    "CROSS_ATTENTION": "red",
    "SELF_ATTN_MLP": "bright_green",
    "CROSS_ATTN_MLP": "cyan",
    "KEEP": "blue",
    "FORECAST": "bright_cyan",
    "MIXED": "white",
}
SIGNS = {
    "NO_CACHE": "#",
    "ATTENTION": "a",
    "MLP": "m",
    "ATTN_MLP": ".",
    "SELF_ATTENTION": "s",
    "CROSS_ATTENTION": "c",
    "SELF_ATTN_MLP": "S",
    "CROSS_ATTN_MLP": "C",
    "KEEP": "K",
    "FORECAST": "f",
    "MIXED": "x",
}
SHORT = {
    "NO_CACHE": "NO",
    "ATTENTION": "ATT",
    "MLP": "MLP",
    "ATTN_MLP": "A+M",
    "SELF_ATTENTION": "SELF",
    "CROSS_ATTENTION": "CROSS",
    "SELF_ATTN_MLP": "S+M",
    "CROSS_ATTN_MLP": "C+M",
    "KEEP": "KEEP",
    "FORECAST": "FORE",
    "MIXED": "mixed",
}


@contextmanager
def progress_bar() -> Iterator["tqdm[Any]"]:
    """A bar in sample-steps; give it its length with ``reset(total)``, advance it with ``update(n)``.

    Nothing is drawn where stderr is no terminal.
    """
    from tqdm import tqdm

    with tqdm(total=0, unit=" sample-steps", unit_scale=True, dynamic_ncols=True, leave=False, disable=None) as bar:
        yield bar


def set_total(bar: "tqdm[Any]", to_come: int) -> None:
    """Let the bar end after so many more, so that it shows the time left."""
    bar.total = bar.n + to_come
    bar.refresh()


def print_results(results: Sequence[Result]) -> None:
    """Print a line for each method: its steps, cost, time and quality; errors are one standard error.

    An error against another noise, or at other timesteps, than the first method's says so.
    """
    from rich.console import Console
    from rich.table import Table

    n = len(results[0].per_sample["paired_error"])
    grid = Table(title=f"{n} samples a method, each from one initial noise; ± is one standard error over samples")
    columns = ["method", "steps", "GMACs", "seconds", "speed-up", "by MACs"]
    if results[0].scores is not None:
        columns += ["FD semantic", "FD texture", "recognised", "contrast"]
    for name in (*columns, "error vs first"):
        grid.add_column(name, justify="left" if name in ("method", "steps") else "right")
    for r in results:
        grid.add_row(
            r.name,
            count_steps(r.step_types),
            f"{r.macs / 1e9:.2f}",
            f"{r.seconds:.1f}",
            f"{r.speedup:.2f}x",
            f"{r.mac_limit:.2f}x",
            *_score_cells(r),
            f"{r.paired_error:.3f}" + (f" ({r.noise})" if r.noise != "same" else ""),
        )
    Console(width=160).print(grid)


def _score_cells(result: Result) -> list[str]:
    """The judge's scores as cells of the table; none without a judge."""
    if (s := result.scores) is None:
        return []
    return [
        f"{s.fd_semantic:.2f} ± {result.spread['fd_semantic']:.2f}",
        f"{s.fd_texture:.4f} ± {result.spread['fd_texture']:.4f}",
        f"{s.recognised:.1%}",
        f"{s.contrast:.3f}",
    ]


def print_table(table: CacheTable) -> None:
    """Print a Cache Table: its strip of steps, what it is for, where it comes from."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    names = table.type_names
    used = [name for name in STEP_NAMES if name in names]
    if console.color_system is None or console.no_color:  # a file, a pipe, NO_COLOR: blocks would all be the same
        strip, signs = Text("".join(SIGNS[name] for name in names)), SIGNS
    else:
        strip, signs = Text.assemble(*(("█", STYLES[name]) for name in names)), {}
    counts = (f"{signs.get(name, '')} {name} {names.count(name)}".strip() for name in used)
    console.print(strip)
    console.print(Text("  ".join(counts)))
    first, last = table.timesteps[0], table.timesteps[-1]
    lines = [f"{len(table)} steps, timesteps {first} to {last}, eps_scale {table.eps_scale:g}"]
    lines += [f"sampler: {table.sampler.name}"] if table.sampler else []
    lines += ["model: " + ", ".join(f"{k} {v}" for k, v in table.model)] if table.model else ["model: any"]
    if table.step_plans is not None:
        lines.append(f"sites: {described(table.step_plans[0].sites)}")
    if table.made is not None:
        lines.append(f"made by {table.made.by} from {table.made.source}")
        lines += [f"  {name} = {value}" for name, value in table.made.options.items()]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    runs = [(name, len(list(group))) for name, group in groupby(names)]
    line = " ".join(f"{SHORT[name]}x{length}" for name, length in runs)
    console.print(line, markup=False, soft_wrap=True)


def print_calibration(table: CacheTable) -> None:
    """Print the cost of a calibration and, where it had a target, how near it came."""
    options = {} if table.made is None else table.made.options
    if "target_speedup" in options:
        target, reached = float(str(options["target_speedup"])), float(str(options["speedup"]))
        away = abs(reached - target) > TOLERANCE * target
        near = f", not {target:g}x: no table of these rules is nearer" if away else f", where {target:g}x was asked for"
        print(f"speed-up by MACs: {reached:.2f}x{near}")
    print(f"cost: {options['samplings']} uncached samplings by MACs, {options['samplings_a_sample']} for each sample")


def count_steps(step_types: Sequence[str]) -> str:
    """Number of steps of each type, in order of appearance, for people: "34 NO + 16 A+M"."""
    kinds = dict.fromkeys(step_types)
    return " + ".join(f"{list(step_types).count(kind)} {SHORT[kind]}" for kind in kinds)


def print_costs(plan: Plan, shape: ModelShape) -> None:
    """Print a plan's costs on a model: multiply-accumulates, allowed speed-up, cache memory."""
    counts = count_steps([step.type_name for step in plan.steps])
    gibibytes = plan.cache_bytes(shape, rows=2, itemsize=2) / 2**30
    print(f"fits: {len(plan)} steps, {counts}")
    print(f"{plan.macs(shape) / 1e12:.3f} T multiply-accumulates a sample (one guidance branch; FLOPs are twice that)")
    print(f"speed-up that this allows over no caching: {plan.mac_limit(shape):.2f}x")
    print(f"cache for one guided sample in bfloat16: {gibibytes:.3f} GiB in {len(plan.memory.live)} live slots")


def print_timeline(timeline: Timeline) -> None:
    """Print the time by type of step, the time between dispatches, and how they ran."""
    from rich.console import Console
    from rich.table import Table

    about = timeline.about
    print(f"one run of {about['samples']} samples, model {about['model']}, table {about['table']}")
    grid = Table()
    for name in ("step type", "steps", "median ms", "total ms", "share"):
        grid.add_column(name, justify="left" if name == "step type" else "right")
    for cost in timeline.by_type():
        share = f"{cost.total / timeline.end:.1%}"
        grid.add_row(cost.step_type, f"{cost.steps}", f"{cost.median:.3f}", f"{cost.total:.2f}", share)
    grid.add_row("between", "", "", f"{timeline.between:.2f}", f"{timeline.between / timeline.end:.1%}")
    Console(width=160).print(grid)
    replays = sum(span.replayed for span in timeline.spans)
    eager = len(timeline.spans) - replays
    print(f"{timeline.end:.2f} ms on {about['device']}: {replays} CUDA graph replays, {eager} eager dispatches")


def print_info() -> None:
    """Print versions, devices, the backend of each operation, and the tables that come with the package."""
    import importlib.util
    import platform

    import torch

    found = importlib.util.find_spec("triton")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, so everything runs on the CPU"
    print(f"ebcache_fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"Triton: {'installed' if found else 'not installed'}; GPU: {device}; {torch.get_num_threads()} CPU threads")
    where = default_device()
    for dtype in (torch.bfloat16, torch.float32):
        reason = ops.why_torch(where, dtype)
        print(f"operations on {where}, {dtype}" + (f" (torch, because of {reason}):" if reason else ":"))
        for operation, runs_it in Fallback.tried(where, dtype).implementations().items():
            print(f"  {operation}: {runs_it}")
    print("tables: " + ", ".join(named_tables()))
