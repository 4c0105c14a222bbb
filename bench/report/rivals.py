"""Ourselves beside the rivals on a GPU, and which targets hold."""

from collections.abc import Sequence
from typing import Any

from bench import targets
from bench.report import tables
from bench.report.tables import DOCS, read, table

TYPES = ("NO_CACHE", "ATTENTION", "ATTN_MLP")


def rivals() -> str:
    """A table of every race, a plot of all, and the targets; docs/rivals.png."""
    paths = (path for kind in ("rivals", "switches") for path in sorted(tables.RESULTS.glob(f"h200-{kind}-*.json")))
    found = [read(path.name) for path in paths] + text_models()
    if not found:
        return "Not measured yet."
    plot([(title(one), one) for one in found])
    parts = [race(one) for one in found]
    parts.append("![Milliseconds a run of every contender](docs/rivals.png)")
    return "\n\n".join([*parts, reached(targets.judge(targets.Results(tables.RESULTS)))])


def text_models() -> list[dict[str, Any]]:
    """The races of `bench.text_steps` that took place."""
    if not (tables.RESULTS / targets.TEXT_STEPS).exists():
        return []
    return [one for one in read(targets.TEXT_STEPS)["models"] if not one["why"]]


def title(found: dict[str, Any]) -> str:
    return f"{found['model']}, B={found['samples']}, {found['steps']} steps, table {found['table']!r}"


def race(found: dict[str, Any]) -> str:
    """Every contender of one case: a run, how many times the first one's that is, a step of each type."""
    ran = [one for one in found["contenders"] if not one["why"]]
    first = ran[0]["loop_ms"]["median"]
    rows = []
    for one in ran:
        low, high = one["loop_ms"]["quartiles"]
        loop = one["loop_ms"]["median"]
        steps = (f"{one['step_ms'][name]['median']:.3f}" if name in one["step_ms"] else "-" for name in TYPES)
        rows.append(
            (
                f"{one['name']}: {one['what']}",
                f"{loop:.2f} [{low:.2f}, {high:.2f}]",
                f"{loop / first:.2f}",
                *steps,
                f"{one['error']:.1e}",
            )
        )
    floor = found["floor_ms"]
    least = (f"{floor[name]:.3f}" if name in floor else "-" for name in TYPES)
    rows.append(("the least, by bytes and products", f"{floor['run']:.2f}", f"{floor['run'] / first:.2f}", *least, "-"))
    head = (title(found), "ms a run [quartiles]", "times the first", *(f"ms {name}" for name in TYPES), "error")
    gpu, versions = found["telemetry"]["start"]["gpu"], found["telemetry"]["start"]["versions"]
    note = (
        f"Guided, {found['dtype']}, {ran[0]['rounds']} interleaved rounds, medians; the error is the latents' relative "
        f"RMS against the method in float32. {gpu.get('name', 'unknown GPU')}, torch {versions['torch']}, triton "
        f"{versions['triton']}, commit {str(versions['commit'])[:10]}."
    )
    absent = [f"{one['name']} ({one['why']})" for one in found["contenders"] if one["why"]]
    return "\n\n".join([table(head, rows), note + (f" Did not run: {'; '.join(absent)}." if absent else "")])


def reached(judged: Sequence[targets.Judged]) -> str:
    """Every target, whether it holds or not."""
    rows = [
        (
            one.name,
            f"{'≤' if one.at_most else '≥'} {one.target:g} {one.unit}".rstrip(),
            "not measured" if one.measured is None else f"{one.measured:.3g}",
            {True: "yes", False: "no", None: "-"}[one.met],
        )
        for one in judged
    ]
    return table(("target", "limit", "measured", "met"), rows)


def plot(races: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """docs/rivals.png: a bar a contender, ours above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(races), 1, figsize=(9, 3.6 * len(races)), constrained_layout=True, squeeze=False)
    for (name, found), (ax,) in zip(races, axes, strict=True):
        ran = [one for one in found["contenders"] if not one["why"]][::-1]
        ours = [one["name"].startswith("ebcache_fast") for one in ran]
        loops = [one["loop_ms"]["median"] for one in ran]
        bars = ax.barh([one["name"] for one in ran], loops, color=["#1f4e79" if mine else "#b8b8b8" for mine in ours])
        ax.bar_label(bars, labels=[f" {loop:.1f}" for loop in loops], fontsize=8)
        ax.set(title=name, xlabel="ms a run", xlim=(0, 1.12 * max(loops)))
        ax.spines[["top", "right"]].set_visible(False)
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / "rivals.png", dpi=110)
