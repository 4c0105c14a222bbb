"""Write every figure of the README from the committed results: no number in it is typed by hand.

    python -m bench.report

Each part of README.md between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced by what the function of that name
makes of bench/results/*.json; plots go to docs/ (needs the ``plots`` extra).
"""
