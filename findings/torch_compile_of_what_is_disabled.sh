#!/bin/sh
# torch 2.13.0: torch.compile of a function or module that torch.compiler.disable was applied to.
#
# Expected: what is disabled is never compiled, wherever torch.compile is called; and with fullgraph=True that is an
# error before anything has run, as it is for a function that calls a disabled one.
# Happens: torch.compile(disabled) unwraps what it is given and compiles it, without a word: only calls from within
# other compiled code are left alone. It is the same for a module that was passed to disable. A module with its own
# disabled forward is not compiled; with fullgraph=True one whose class has it raises Unsupported before it runs, and
# one whose instance has it (model.forward = torch.compiler.disable(model.forward)) runs to its end, and then raises
# RuntimeError "found no compiled frames" in place of its result.
# Matters: libraries that mark a forward of theirs so that nobody compiles it; and whoever catches that error and calls
# the model again: what it counts, draws or caches has then happened twice.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy

"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch import nn

ran = compiled = 0


def backend(graph, inputs):
    global compiled
    compiled += 1
    return graph.forward


def add(x):
    global ran
    ran += 1
    return x + 1


class Plain(nn.Module):
    def forward(self, x):
        return add(x)


class Marked(nn.Module):
    @torch.compiler.disable
    def forward(self, x):
        return add(x)


disabled = torch.compiler.disable(add)
instance = Plain()
instance.forward = torch.compiler.disable(instance.forward)
seen = {}
for name, target in {
    "a function that calls a disabled one": lambda x: disabled(x),
    "a disabled function": disabled,
    "a disabled module": torch.compiler.disable(Plain()),
    "a module whose class has a disabled forward": Marked(),
    "a module whose instance has a disabled forward": instance,
}.items():
    for fullgraph in (False, True):
        torch._dynamo.reset()
        ran = compiled = 0
        try:
            torch.compile(target, fullgraph=fullgraph, backend=backend)(torch.ones(2))
            outcome = "returned"
        except Exception as error:
            outcome = type(error).__name__
        seen[name, fullgraph] = (outcome, ran, compiled)
        print(f"torch {torch.__version__}, {name}, fullgraph={fullgraph}: {outcome}, ran {ran}, "
              f"graphs compiled {compiled}")
assert list(seen.values()) == [
    ("returned", 1, 0), ("Unsupported", 0, 0),
    ("returned", 1, 1), ("returned", 1, 1),
    ("returned", 1, 1), ("returned", 1, 1),
    ("returned", 1, 0), ("Unsupported", 0, 0),
    ("returned", 1, 0), ("RuntimeError", 1, 0),
]
PYTHON
