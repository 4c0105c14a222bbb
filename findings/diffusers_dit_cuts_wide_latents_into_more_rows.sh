#!/bin/sh
# diffusers 0.42.1, DiTTransformer2DModel: latents that are not square.
#
# Expected: a wide picture as wide as it was given, since the patch embedding makes positions for any height and width;
# or an error.
# Happens: the output is cut into squares of floor(sqrt(tokens)) patches, and what does not fit one becomes more rows of
# the batch. Latents of 8 x 16 (2 x 4 patches) for a batch of 2 return a batch of 4 pictures of 8 x 8; those of 4 x 16
# return 8 x 8. No error and no warning, unless the numbers can't be divided so.
# Matters: whoever samples a DiT in another aspect ratio, or reads len(output) as the number of prompts.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1

"$folder/env/bin/python" - <<'PYTHON'
import diffusers
import torch

torch.manual_seed(0)
model = diffusers.DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=4
).eval()
seen = {}
for height, width in ((8, 8), (8, 16), (8, 12), (4, 16)):
    latents = torch.randn(2, 4, height, width)
    with torch.no_grad():
        out = model(latents, timestep=torch.tensor([9, 9]), class_labels=torch.tensor([1, 2])).sample
    seen[height, width] = tuple(out.shape)
    print(f"diffusers {diffusers.__version__}: latents {tuple(latents.shape)} -> {tuple(out.shape)}")
assert seen == {
    (8, 8): (2, 8, 8, 8), (8, 16): (4, 8, 8, 8), (8, 12): (3, 8, 8, 8), (4, 16): (2, 8, 8, 8)
}, "the output's shape has changed"
PYTHON
