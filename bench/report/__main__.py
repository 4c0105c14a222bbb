"""The command; see the package."""

import re
from collections.abc import Callable

from bench.report import engine, letters, paper, rivals
from bench.report.tables import ROOT

OF_THE_PAPER = (paper.precision, paper.equal_cost, paper.scale, paper.gating, paper.exposure, paper.similarity)
PARTS: tuple[Callable[[], str], ...] = (
    letters.demo,
    letters.quality,
    letters.cpu,
    engine.timeline,
    engine.launches,
    engine.kernels,
    engine.host_cost,
    letters.float8,
    rivals.rivals,
    *OF_THE_PAPER,
)
NEEDS = {part.__name__: {part.__name__} for part in OF_THE_PAPER} | {"exposure": {"exposure", "real_norm"}}


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    answered = {question for question, entries in paper.answers().items() if entries}
    for part in PARTS:
        made = part() if NEEDS.get(part.__name__, set()) <= answered else "Not measured yet."
        pattern = re.compile(rf"(<!-- {part.__name__} -->\n)(?:.*?\n)?(<!-- /{part.__name__} -->)", re.DOTALL)
        text = pattern.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
    readme.write_text(text)


if __name__ == "__main__":
    main()
