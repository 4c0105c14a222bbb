"""The engine: its launches, its kernels, what it costs the host, the steps of a run."""

from collections import defaultdict
from typing import Any

from bench.report import tables
from bench.report.tables import DOCS, machine, read, table


def kernels() -> str:
    """Registers and shared memory of the kernels at DiT-XL/2's shapes, by architecture."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for entry in read("kernel-resources.json"):
        name, _, size = entry["case"].partition(" / ")
        if size == "DiT-XL/2 256 px, B=1, bfloat16":
            found[name][entry["arch"]] = entry
    archs = sorted({arch for entries in found.values() for arch in entries})
    rows = [
        (name, *(f"{e['registers']}, {e['shared_bytes'] / 1024:.0f} KB" if e else "-" for e in map(entries.get, archs)))
        for name, entries in found.items()
    ]
    head = ("registers a thread, shared memory", *(f"sm_{arch}" for arch in archs))
    versions = {e["triton"] for entries in found.values() for e in entries.values()}
    spilled = sum(e["spill_bytes"] for entries in found.values() for e in entries.values())
    what = "DiT-XL/2 at 256 px, batch 1 with guidance, bfloat16"
    note = f"{what}; {spilled or 'no'} bytes spilled. Triton {', '.join(sorted(versions))}."
    return f"{table(head, rows)}\n\n{note}"


def launches() -> str:
    """How many launches a step costs, before and after."""
    report = read("launches.json")
    forward, sampler = (report["before"][part]["launches"] for part in ("forward", "sampler"))
    before = ("plain loop: the model's forward + an eager DDPM step", f"{forward} + {sampler}")
    after = ((name, str(counted["launches"])) for name, counted in report["after"].items())
    named = report["tables"]
    means = ", ".join(f"{counts['a_step']:.0f}" for counts in named.values())
    by_table = (f"a step in the mean, by table: {', '.join(f'`{name}`' for name in named)}", means)
    note = f"{report['layers']} layers, one guided sample; as a CUDA graph, each is one launch for the host."
    return f"{table(('a step', 'launches'), [before, *after, by_table])}\n\n{note}"


def host_cost() -> str:
    """What a step costs the host."""
    report = read("host-cost.json")
    rows = []
    for name, figures in report["ways"].items():
        known = figures.get("step_us_with_known_fingerprint", figures["step_us"])
        weights = figures.get("fingerprint_us")
        low, high = known["quartiles"]
        rows.append(
            (
                name,
                f"{known['median']:.0f} [{low:.0f}, {high:.0f}]",
                f"{known['least']:.0f}",
                f"{figures['step_us']['median']:.0f}",
                f"{weights['median']:.0f}" if weights else "-",
            )
        )
    load = f"Load {report['load_average']['start'][0]:.1f} to {report['load_average']['end'][0]:.1f}"
    note = f"{report['layers']} layers, {report['rounds']} interleaved rounds, medians. {load}; {machine(report)}."
    head = ("µs a step on the host", "fingerprint known", "the least", "fingerprint subtracted", "the fingerprint")
    return f"{table(head, rows)}\n\n{note}"


def timeline() -> str:
    """docs/timeline.png: the steps of a run, as measured where a profile was kept, else as its plan says."""
    from ebcache_fast.apps.bundled import BUNDLED, shape_of
    from ebcache_fast.apps.pictures import save_picture
    from ebcache_fast.apps.timeline import Timeline
    from ebcache_fast.apps.timeline_picture import draw_timeline
    from ebcache_fast.plan.table import CacheTable

    name, measured, shape = "letters-ddpm-50-1.5x", tables.RESULTS / "timeline.json", shape_of(BUNDLED, 256, 1000)
    if measured.exists():
        run = Timeline.load(measured)
    else:
        run = Timeline.of_plan(CacheTable.named(name).plan(shape), shape, model=BUNDLED, table=name)
    save_picture(draw_timeline(run, f"{len(run.step_types)} steps, and what each costs"), DOCS / "timeline.png")
    return "![The steps of a run in order, and the same steps as long as they take](timeline.png)"
