"""The default calibration beside rivals at equal cost, from bench.ahead."""

from bench.report.tables import machine, read, table


def ahead() -> str:
    """A row for each method of each budget."""
    report = read("ahead.json")
    rows = []
    for row in report["rows"]:
        low, high = row["paired_error_spread"]
        is_uncached = row["method"] == "uncached"
        name = "no cache" if is_uncached else row["method"]
        run = f"{row['setting'].replace('-', ' ').upper()}, {row['mac_limit']:.2f}x, {name}"
        rows.append(
            [
                f"**{run}**" if name == "path" else run,
                f"{row['computed']}",
                "0" if is_uncached else f"{row['paired_error']:.3f} [{low:.3f}, {high:.3f}]",
                f"{row['semantic']:.2f}",
                f"{row['texture']:.4f}",
                f"{100 * row['recognised']:.1f}%",
            ]
        )
    head = ["run, limit by MACs, method", "computed", "error vs no cache", "semantic", "texture", "recognised"]
    about = f"{report['samples']} samples of each of {len(report['seeds'])} seeds."
    return f"{table(head, rows)}\n\n{about} {machine(report)}."


def forecast_step() -> str:
    """A row for each model and order, from bench.forecast_step."""
    report = read("forecast-step.json")
    rows = []
    for model, steps in report["models"].items():
        for name, figures in steps.items():
            if name == "ATTN_MLP":
                continue
            low, high = figures["ratio_quartiles"]
            rows.append(
                [
                    f"width of {model}, {name}",
                    f"{figures['ratio']:.2f} [{low:.2f}, {high:.2f}]",
                    f"{figures['cache_ratio']:.3f}",
                    f"{figures['launches']['own loop']} and {figures['launches']['drop-in']}",
                ]
            )
    head = ["step", "time", "cache", "launches, in our own loop and behind another"]
    about = f"Shares of those of an ATTN_MLP step, depth {report['depth']}, 256 tokens, one guided sample; medians of "
    return f"{table(head, rows)}\n\n{about}{report['rounds']} interleaved rounds [quartiles]. {machine(report)}."


def transfer() -> str:
    """A row for each table and place, from bench.transfer."""
    report = read("transfer.json")
    rows = [
        [
            f"{row['table'].replace('-', ' ')}, {row['sampler']} {row['steps']}, guidance {row['scale']:g}",
            f"{row['computed']}",
            f"{row['path']:.3f}",
            f"{row['fora']:.3f}",
            "" if row["found_here"] is None else f"{row['found_here']:.3f}",
        ]
        for row in report["rows"]
    ]
    head = ["table, run at", "computed", "error", "FORA's", "of a table found there"]
    about = f"{report['samples']} samples of another seed than the 52 that tables were found on."
    return f"{table(head, rows)}\n\n{about} {machine(report)}."
