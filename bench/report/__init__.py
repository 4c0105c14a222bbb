"""Write every figure of README.md and docs/*.md from the committed results: none is typed by hand.

    python -m bench.report

Each part of a page between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced by what the function of that name
makes of bench/results/*.json; plots go to docs/ (needs the ``plots`` extra).
"""
