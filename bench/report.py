"""Write every figure of the README from the committed results: no number in it is typed by hand.

    python -m bench.report

Each part of README.md between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced by what the function of that name
makes of bench/results/*.json; plots go to docs/ (needs the ``plots`` extra).
"""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
Answers = dict[str, list[dict[str, Any]]]


def read(name: str) -> dict[str, Any]:
    """One committed result."""
    return dict(json.loads((RESULTS / name).read_text()))


def answers() -> Answers:
    """The paper's questions with all their answers, one entry a setting and seed."""
    grouped: Answers = defaultdict(list)
    for entry in read("letters-paper-questions.json")["answers"]:
        grouped[entry["question"]].append(entry)
    return grouped


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def sample_count(entries: Sequence[dict[str, Any]]) -> str:
    """What stands behind a table, in a line."""
    if len(entries) == 1:
        return f"One seed of {entries[0]['samples']} samples a method."
    return f"{len(entries)} seeds of {entries[0]['samples']} samples a method; ± is the standard deviation over seeds."


def machine(report: dict[str, Any]) -> str:
    """On what it was measured, in a line."""
    m = report["machine"]
    return f"{m['gpu'] or str(m['cpus']) + ' CPU cores, no GPU'}; torch {m['torch']}, Python {m['python']}"


def demo() -> str:
    """What the demo printed."""
    report = read("demo.json")
    rows = [
        (
            m["name"],
            f"{m['macs'] / 1e9:.2f}",
            f"{m['speedup']:.2f}x",
            f"{m['mac_limit']:.2f}x",
            f"{m['fd_semantic']:.2f} ± {m['spread']['fd_semantic']:.2f}",
            f"{100 * m['recognised']:.1f}%",
            f"{m['paired_error']:.3f}",
        )
        for m in report["methods"]
    ]
    head = ("method", "GMACs", "measured", "by MACs", "Fréchet (semantic)", "recognised", "error vs no cache")
    n = report["methods"][0]["n"]
    note = f"{n} samples a method, same noise, interleaved; ± one standard error over samples. {machine(report)}."
    return f"{table(head, rows)}\n\n{note}"


def quality() -> str:
    """How good the bundled model is."""
    q = read("letters-quality.json")
    worst = min(q["recognised_by_letter"].items(), key=lambda item: item[1])
    return (
        f"Of {q['samples']:,} samples (50 DDPM steps, guidance 1.5) a classifier that reads "
        f"{100 * read_classifier()['held_out_accuracy']:.1f}% of letters in faces it never saw recognises "
        f"{100 * q['recognised']:.1f}%; the worst letter is {worst[0]} with {100 * worst[1]:.1f}%. Contrast is "
        f"{q['contrast_ratio']:.3f} of the real data's; recall {q['recall']:.3f}, where two halves of real data have "
        f"{q['recall_between_real_halves']:.3f}."
    )


def read_classifier() -> dict[str, Any]:
    """The classifier's test on held-out faces."""
    return dict(json.loads((ROOT / "bench" / "default_model" / "classifier.json").read_text()))


def kernels() -> str:
    """Registers and shared memory of the kernels at DiT-XL/2's shapes, by architecture."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for entry in json.loads((RESULTS / "kernel-resources.json").read_text()):
        name, _, size = entry["case"].partition(" / ")
        if size == "DiT-XL/2 256 px, B=1, bfloat16":
            found[name][entry["arch"]] = entry
    archs = sorted({arch for entries in found.values() for arch in entries})
    rows = [
        (name, *(f"{e['registers']}, {e['shared_bytes'] / 1024:.0f} KB" for e in map(entries.__getitem__, archs)))
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
    note = f"{report['layers']} layers, one guided sample; as a CUDA graph, each is one launch for the host."
    return f"{table(('a step', 'launches'), [before, *after])}\n\n{note}"


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
                f"{figures['step_us']['median']:.0f}",
                f"{weights['median']:.0f}" if weights else "-",
            )
        )
    load = f"Load {report['load_average']['start'][0]:.1f} to {report['load_average']['end'][0]:.1f}"
    note = f"{report['layers']} layers, {report['rounds']} interleaved rounds, medians. {load}; {machine(report)}."
    head = ("µs a step on the host", "fingerprint known before", "fingerprint subtracted", "the fingerprint")
    return f"{table(head, rows)}\n\n{note}"


def precision() -> str:
    """Whether sampling in bfloat16 changes an answer."""
    entries = answers()["precision"]
    rows = [
        (
            dtype,
            spread([e["figures"][dtype]["fd_semantic"] for e in entries]),
            spread([e["figures"][dtype]["fd_texture"] for e in entries], 4),
            spread([100 * e["figures"][dtype]["recognised"] for e in entries], 1),
        )
        for dtype in ("bfloat16", "float32")
    ]
    return table(("20 steps, no cache", "Fréchet semantic", "texture", "recognised %"), rows)


def cpu() -> str:
    """How much of the allowed speed-up the wall clock shows."""
    report = read("cpu-speedup.json")
    rows = [
        (
            m["name"],
            f"{m['median_seconds_a_batch']:.2f}",
            f"{m['speedup']:.2f}x [{m['speedup_quartiles'][0]:.2f}, {m['speedup_quartiles'][1]:.2f}]",
            f"{m['mac_limit']:.2f}x",
            f"{m['share_of_limit']:.2f}",
        )
        for m in report["methods"]
    ]
    head = ("method", "seconds a batch", "speed-up [quartiles]", "by MACs", "share had")
    note = f"Batches of {report['batch']}, {report['rounds']} interleaved rounds, medians. {machine(report)}."
    return f"{table(head, rows)}\n\n{note}"


def equal_cost() -> str:
    """EB-Cache, FORA and fewer steps at equal cost."""
    parts = []
    settings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    by_steps = sorted(
        answers()["equal_cost"], key=lambda e: (e["setting"]["sampler"] != "ddpm", -e["setting"]["steps"])
    )
    for entry in by_steps:
        settings[f"{entry['setting']['sampler'].upper()}, {entry['setting']['steps']} steps"].append(entry)
    for setting, entries in settings.items():
        rows = []
        for method in entries[0]["figures"]:
            figures = [entry["figures"][method] for entry in entries]
            rows.append(
                (
                    method.rpartition(" (")[0],
                    f"{figures[0]['mac_limit']:.2f}x",
                    spread([f["fd_semantic"] for f in figures]),
                    spread([f["fd_texture"] for f in figures], 4),
                    spread([100 * f["recognised"] for f in figures], 1),
                    spread([f["contrast"] for f in figures], 3),
                    spread([f["paired_error"] for f in figures], 3),
                )
            )
        head = (setting, "by MACs", "Fréchet semantic", "texture", "recognised %", "contrast", "error vs no cache")
        parts.append(f"{table(head, rows)}\n\n{sample_count(entries)}")
    return "\n\n".join(parts)


def scale() -> str:
    """Both distances by the factor b on eps."""
    settings: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for entry in answers()["scale"]:
        s = entry["setting"]
        label = f"guidance {s['cfg_scale']:g}" + (", EB-Cache 1.5x" if s["table"] else "")
        settings[label, s["eps_scale"]].append(entry)
    columns = sorted({b for _, b in settings})
    rows = []
    for label in dict.fromkeys(label for label, _ in settings):
        for key, name, digits in (("fd_semantic", "semantic", 2), ("fd_texture", "texture", 4)):
            cells = (spread([e["figures"][key] for e in settings[label, b]], digits) for b in columns)
            rows.append((f"{label}, {name}", *cells))
    return table(("Fréchet distance by b", *(f"{b:g}" for b in columns)), rows)


def gating() -> str:
    """Cached before the gate against after it."""
    settings: dict[tuple[int, bool], list[dict[str, Any]]] = defaultdict(list)
    for entry in answers()["gating"]:
        settings[entry["setting"]["interval"], entry["setting"]["gated"]].append(entry["figures"])
    rows = [
        (
            f"FORA N={interval}, {'after' if gated else 'before'} the gate",
            spread([f["fd_semantic"] for f in figures]),
            spread([f["fd_texture"] for f in figures], 4),
            spread([f["paired_error"] for f in figures], 3),
        )
        for (interval, gated), figures in sorted(settings.items())
    ]
    return table(("cached", "Fréchet semantic", "texture", "error vs no cache"), rows)


def exposure() -> str:
    """Norm and SNR along the trajectory: a plot, and the figures at its end."""
    grouped = answers()
    real = mean_curve([entry["figures"]["eps_norm"] for entry in grouped["real_norm"]])
    curves = {
        n: {
            key: mean_curve([e["figures"][key] for e in grouped["exposure"] if e["setting"]["interval"] == n])
            for key in ("eps_norm", "snr")
        }
        for n in (1, 2, 3)
    }
    plot_exposure(real, curves)
    rows = []
    for n, curve in curves.items():
        ratio = [a / b for a, b in zip(curve["eps_norm"], real, strict=True)]
        snr = [a / b for a, b in zip(curve["snr"], curves[1]["snr"], strict=True)]
        picks = (9, 24, 39, 47, 49)
        name = "no cache" if n == 1 else f"FORA N={n}"
        rows.append((name, *(f"{ratio[i]:.3f} / {snr[i]:.3f}" for i in picks)))
    head = ("eps norm over that on real data / SNR over no cache's", "step 10", "25", "40", "48", "50")
    return f"{table(head, rows)}\n\n![Predicted noise and SNR along the trajectory](docs/exposure.png)"


def similarity() -> str:
    """Attention against MLP: cosine between consecutive steps."""
    entries = answers()["similarity"]
    means = {}
    for branch in ("self_attn", "mlp"):
        steps = mean_curve([[statistics.fmean(layers) for layers in e["figures"][branch]] for e in entries])
        means[branch] = [statistics.fmean(steps[a:b]) for a, b in ((0, 16), (16, 33), (33, 49), (0, 49))]
    names = {"self_attn": "attention", "mlp": "MLP"}
    rows = [(names[branch], *(f"{value:.4f}" for value in values)) for branch, values in means.items()]
    return table(("mean cosine between steps", "first third", "second", "last", "all"), rows)


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean over seeds, step by step."""
    return [statistics.fmean(column) for column in zip(*curves, strict=True)]


def plot_exposure(real: list[float], curves: dict[int, dict[str, list[float]]]) -> None:
    """docs/exposure.png: the paper's figures 2 and 3 for the bundled model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    steps = range(1, len(real) + 1)
    for n, colour in ((1, "#1f4e79"), (2, "#e59f2e"), (3, "#c0392b")):
        label = "no cache" if n == 1 else f"FORA N={n}"
        ratio = [a / b for a, b in zip(curves[n]["eps_norm"], real, strict=True)]
        left.plot(steps, ratio, color=colour, label=label)
        snr = [a / b for a, b in zip(curves[n]["snr"], curves[1]["snr"], strict=True)]
        right.plot(steps, snr, color=colour, label=label)
    left.set(title="‖eps‖ in sampling over ‖eps‖ on noised real data", xlabel="executed step")
    right.set(title="SNR of the latents over that without caching", xlabel="executed step")
    for axes in (left, right):
        axes.axhline(1, color="#999999", linewidth=0.8)
        axes.legend(frameon=False)
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / "exposure.png", dpi=110)


def timeline() -> str:
    """docs/timeline.png: the steps of a run, as measured where a profile was kept, else as its plan says."""
    from ebcache_fast.cache_table import CacheTable
    from ebcache_fast.pictures import save_picture
    from ebcache_fast.presets import BUNDLED, shape_of
    from ebcache_fast.timeline import Timeline
    from ebcache_fast.timeline_picture import draw_timeline

    name, measured, shape = "letters-ddpm-50-1.5x", RESULTS / "timeline.json", shape_of(BUNDLED, 256, 1000)
    if measured.exists():
        run = Timeline.load(measured)
    else:
        run = Timeline.of_plan(CacheTable.named(name).plan(shape), shape, model=BUNDLED, table=name)
    save_picture(draw_timeline(run, f"{len(run.step_types)} steps, and what each costs"), DOCS / "timeline.png")
    return "![The steps of a run in order, and the same steps as long as they take](docs/timeline.png)"


PARTS: tuple[Callable[[], str], ...] = (
    demo,
    timeline,
    launches,
    kernels,
    host_cost,
    quality,
    cpu,
    precision,
    equal_cost,
    scale,
    gating,
    exposure,
    similarity,
)
NEEDS = {"exposure": {"exposure", "real_norm"}} | {
    p.__name__: {p.__name__} for p in (precision, equal_cost, scale, gating, similarity)
}


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    answered = {question for question, entries in answers().items() if entries}
    for part in PARTS:
        made = part() if NEEDS.get(part.__name__, set()) <= answered else "Not measured yet."
        pattern = re.compile(rf"(<!-- {part.__name__} -->\n)(?:.*?\n)?(<!-- /{part.__name__} -->)", re.DOTALL)
        text = pattern.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
    readme.write_text(text)


if __name__ == "__main__":
    main()
