#!/bin/sh
# dit-smoothcache 0.1.1: a second picture with the same helper.
#
# Expected: SmoothCacheHelper follows its schedule for each picture; its steps begin again with the next.
# Happens: it counts calls of each layer from `enable()` on and never begins again. Once the schedule is over everything
# is computed, so that the second picture of a pipeline has no cached step at all, without a word. `enable()` has to be
# called again for each picture, after `disable()`: else the layers are wrapped a second time.
# Matters: times and qualities measured over several pictures, and whoever compares another cache with it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy dit-smoothcache==0.1.1

"$folder/env/bin/python" - <<'PYTHON'
from contextlib import redirect_stdout
from io import StringIO

import torch
from importlib.metadata import version
from torch import nn

with redirect_stdout(StringIO()):  # it says what it could not import
    from SmoothCache import SmoothCacheHelper


class Counted(nn.Module):
    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return x + 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Counted()

    def forward(self, x):
        return x + self.mlp(x)


model = nn.Sequential(nn.Sequential(Block()))
helper = SmoothCacheHelper(model, Block, ["mlp"], {"mlp": [1, 0, 0, 1]})
computed = []


def picture():
    before = Counted.calls
    with redirect_stdout(StringIO()):  # it prints at every call
        for _ in range(4):
            model(torch.zeros(1))
    computed.append(Counted.calls - before)


helper.enable()
picture()
picture()
helper.disable()
helper.enable()
picture()
print(f"dit-smoothcache {version('dit-smoothcache')}: of 4 steps, 2 of them to be cached, the first picture computed "
      f"{computed[0]}, the second {computed[1]}, and after disable() and enable() the third {computed[2]}")
assert computed == [2, 4, 2]
PYTHON
