#!/bin/sh
# diffusers 0.42.1, DiTPipeline with a seeded `generator`.
#
# Expected: the same generator state gives the same picture with any scheduler; many other pipelines hand it on to the
# scheduler for that.
# Happens: it makes the first latents only; scheduler.step is called without it. A scheduler that adds noise at each
# step (DDPM, Euler ancestral) draws from torch's global generator, so that two calls alike give two pictures. With one
# that adds none (DDIM, Euler) they are the same; with all of them they are if torch.manual_seed is called as well.
# Matters: whoever serves pictures by seed, or compares a cached picture with the plain one: what differs is noise.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1

"$folder/env/bin/python" - <<'PYTHON'
import diffusers
import torch

torch.manual_seed(0)
transformer = diffusers.DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=4
).eval()
vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2).eval()
seen = {}
for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"):
    pipe = diffusers.DiTPipeline(transformer, vae, getattr(diffusers, name)())
    pipe.set_progress_bar_config(disable=True)

    def picture():
        generator = torch.Generator().manual_seed(7)
        return pipe([1], generator=generator, num_inference_steps=4, output_type="pt").images

    one, other = picture(), picture()
    torch.manual_seed(3)
    third = picture()
    torch.manual_seed(3)
    fourth = picture()
    seen[name] = (torch.equal(one, other), torch.equal(third, fourth))
    print(f"diffusers {diffusers.__version__}, {name}: two pictures of one seed differ by "
          f"{float((one - other).abs().max()):.3f} at most, after torch.manual_seed by "
          f"{float((third - fourth).abs().max()):.3f}")
assert seen == {
    "DDIMScheduler": (True, True),
    "EulerDiscreteScheduler": (True, True),
    "DDPMScheduler": (False, True),
    "EulerAncestralDiscreteScheduler": (False, True),
}
PYTHON
