"""The command; see the package."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence

from bench.report import __doc__ as ABOUT
from bench.report import ahead, engine, letters, paper, rivals
from bench.report.tables import ROOT

OF_THE_PAPER = (paper.precision, paper.equal_cost, paper.scale, paper.gating, paper.exposure, paper.similarity)
PARTS: tuple[Callable[[], str], ...] = (
    letters.demo,
    letters.quality,
    letters.cpu,
    letters.retime,
    ahead.ahead,
    ahead.forecast_step,
    ahead.transfer,
    engine.timeline,
    engine.launches,
    engine.kernels,
    engine.host_cost,
    letters.float8,
    rivals.rivals,
    *OF_THE_PAPER,
)
NEEDS = {part.__name__: {part.__name__} for part in OF_THE_PAPER} | {"exposure": {"exposure", "real_norm"}}


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m bench.report", description=ABOUT).parse_args(argv)
    answered = {question for question, entries in paper.answers().items() if entries}
    made = {
        part.__name__: part() if NEEDS.get(part.__name__, set()) <= answered else "Not measured yet." for part in PARTS
    }
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page.write_text(filled(page.read_text(), made))


def filled(text: str, made: Mapping[str, str]) -> str:
    """A page with each of its parts as it was made."""
    return re.sub(
        r"(<!-- (\w+) -->\n)(?:.*?\n)?(<!-- /\2 -->)",
        lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    main()
