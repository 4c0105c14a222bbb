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
