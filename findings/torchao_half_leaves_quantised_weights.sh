#!/bin/sh
# torchao 0.18.0 with torch 2.13.0: model.half() after quantize_(model, Int8WeightOnlyConfig()).
#
# Expected: every floating parameter is float16 afterwards, as nn.Module.half promises, so that any weight's dtype is
# that of the activations.
# Happens: biases are float16, and the quantised weights still say float32, without a word; the layer takes and returns
# float16 all the same. Its element_size() is still 4 for codes of one byte, so that the usual sum of
# numel() * element_size() counts four times what is held.
# Matters: code that makes inputs or memory like `layer.weight`, as pipelines and caches do, gets the wrong dtype; and
# memory reports do not show that quantising saved anything.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0

"$folder/env/bin/python" - <<'PYTHON'
import torch
import torchao
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32))
quantize_(model, Int8WeightOnlyConfig())
model.half()
layer = model[0]
with torch.no_grad():
    out = model(torch.ones(2, 64, dtype=torch.float16))
said = layer.weight.numel() * layer.weight.element_size()
held = layer.weight.qdata.nbytes
print(f"torchao {torchao.__version__}, torch {torch.__version__}: after half() the weight says {layer.weight.dtype}, "
      f"the bias {layer.bias.dtype}, and the output is {out.dtype}")
print(f"numel() * element_size() says {said} bytes, its codes take {held}")
assert (layer.weight.dtype, layer.bias.dtype, out.dtype) == (torch.float32, torch.float16, torch.float16)
assert (said, held) == (4 * 64 * 32, 64 * 32)
PYTHON
