#!/bin/sh
# torch 2.13.0, FSDP2: what a module's parameters and class are after fully_shard, with a single process.
#
# Expected: parameters are DTensors from then on, or plain ones from then on; asking for a state dict changes nothing;
# and a Linear stays a Linear.
# Happens: before the first forward all parameters are DTensors. After it those of the outermost module are plain
# Parameters, and of inner ones DTensors again. state_dict() makes them all DTensors once more. Of a module that was
# given to fully_shard, type(module) is a class made for it, FSDPLinear, so that `type(layer) is nn.Linear` fails and
# isinstance does not.
# Matters: caches and graphs that are keyed by parameters see a model change with every call; code that dispatches on
# type(layer), and any that reads `layer.weight` beside the module's own forward.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy

"$folder/env/bin/python" - <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
fully_shard(model[0])
fully_shard(model)


def kinds() -> list[str]:
    return [type(one).__name__ for one in (model[0].weight, model[1].weight)]


seen = {"sharded": kinds()}
with torch.no_grad():
    model(torch.ones(2, 4))
seen["after a forward"] = kinds()
model.state_dict()
seen["after state_dict()"] = kinds()
for when, what in seen.items():
    print(f"torch {torch.__version__}, {when}: inner weight {what[0]}, outer weight {what[1]}")
print(f"the class of the inner layer: {type(model[0]).__name__}, an nn.Linear: {isinstance(model[0], nn.Linear)}")
dist.destroy_process_group()
assert seen == {
    "sharded": ["DTensor", "DTensor"],
    "after a forward": ["DTensor", "Parameter"],
    "after state_dict()": ["DTensor", "DTensor"],
}
assert type(model[0]) is not nn.Linear and isinstance(model[0], nn.Linear)
PYTHON
