"""The paper's questions, answered on the bundled model."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.report.tables import DOCS, read, table

Answers = dict[str, list[dict[str, Any]]]


def answers() -> Answers:
    """The paper's questions with all their answers, one entry a setting and seed."""
    grouped: Answers = defaultdict(list)
    for entry in read("letters-paper-questions.json")["answers"]:
        grouped[entry["question"]].append(entry)
    return grouped


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def sample_count(entries: Sequence[dict[str, Any]]) -> str:
    """What stands behind a table, in a line."""
    if len(entries) == 1:
        return f"One seed of {entries[0]['samples']} samples a method."
    return f"{len(entries)} seeds of {entries[0]['samples']} samples a method; ± is the standard deviation over seeds."


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
    return f"{table(head, rows)}\n\n![Predicted noise and SNR along the trajectory](exposure.png)"


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
