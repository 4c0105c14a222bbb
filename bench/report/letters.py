"""The bundled model: the demo, its quality, what caching is worth on a CPU."""

import json
from statistics import mean

from bench.report.tables import ROOT, machine, read, table


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
            f"{m['fd_texture']:.4f} ± {m['spread']['fd_texture']:.4f}",
            f"{100 * m['recognised']:.1f}%",
            f"{m['paired_error']:.3f}",
        )
        for m in report["methods"]
    ]
    head = (
        "method",
        "GMACs",
        "measured",
        "by MACs",
        "Fréchet (semantic)",
        "texture",
        "recognised",
        "error vs no cache",
    )
    n = report["methods"][0]["n"]
    note = f"{n} samples a method, from one initial noise, interleaved; "
    note += f"± one standard error over samples. {report['machine']['torch_threads']} thread; {machine(report)}."
    return f"{table(head, rows)}\n\n{note}"


def float8() -> str:
    """How far float8 products take it from itself, beside what bfloat16 does."""
    report = read("float8-accuracy.json")
    rows = [
        (
            way["name"],
            *(
                f"{100 * figure:.2f}%"
                for figure in (way["eps_error_median"], way["eps_error"][0], way["eps_error"][-1])
            ),
            f"{way['picture_error']:.3f} ± {way['picture_error_stderr']:.3f}",
        )
        for way in report["ways"]
        if way["eps_error"]
    ]
    head = ("against float32", "noise, median step", "first step", "last step", "error of pictures")
    note = f"{report['samples']} samples, {report['steps']} steps, uncached, same noise. {machine(report)}."
    return f"{table(head, rows)}\n\n{note}"


def quality() -> str:
    """How good the bundled model is."""
    q = read("letters-quality.json")
    classifier = json.loads((ROOT / "bench" / "default_model" / "classifier.json").read_text())
    worst = min(q["recognised_by_letter"].items(), key=lambda item: item[1])
    return (
        f"Of {q['samples']:,} samples (50 DDPM steps, guidance 1.5) a classifier that reads "
        f"{100 * classifier['held_out_accuracy']:.1f}% of letters in faces it never saw recognises "
        f"{100 * q['recognised']:.1f}%; the worst letter is {worst[0]} with {100 * worst[1]:.1f}%. Contrast is "
        f"{q['contrast_ratio']:.3f} of the real data's; recall {q['recall']:.3f}, where two halves of real data have "
        f"{q['recall_between_real_halves']:.3f}."
    )


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


def retime() -> str:
    """How near a table that was moved to other steps comes to one that is calibrated there."""
    report = read("retime.json")
    positions = {"index": "index", "timestep": "timestep", "log_snr": "log-SNR"}
    rows = []
    for where, is_same in (("spaced alike", True), ("spaced otherwise", False)):
        moves = [row for row in report["rows"] if (row["from"][0] == row["to"][0]) == is_same]
        rows += [
            (
                f"{where}, by {said}",
                f"{100 * mean(row[name]['differing'] / row['to'][1] for row in moves):.0f}%",
                *(f"{mean(row[which]['mac_limit'] for row in moves):.2f}x" for which in (name, "calibrated")),
                *(f"{mean(row[which]['error'] for row in moves):.3f}" for which in (name, "calibrated")),
            )
            for name, said in positions.items()
        ]
    head = ("tables of 20 DDIM steps, moved", "steps of another type", "by MACs", "calibrated", "error", "calibrated")
    note = (
        f"Means over {len(report['rows'])} moves to 10, 12, 20 and 30 steps, evenly spaced or as squares; "
        f"{report['votes']} samples vote, {report['samples']} are drawn, one seed. {machine(report)}."
    )
    return f"{table(head, rows)}\n\n{note}"
