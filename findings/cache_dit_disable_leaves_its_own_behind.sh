#!/bin/sh
# cache-dit 1.5.3 with diffusers 0.42.1: a model after enable_cache and disable_cache.
#
# Expected: the model as it was: the same forward, and the same names in its state dict.
# Happens: a DiT keeps a forward of cache-dit's own and a second name, _norm1_emb, for an embedding it has already. Its
# state dict has five keys more, so that loading the weights it was made with raises RuntimeError, and so does
# save_pretrained, for tensors that share memory. It computes the same. And where a model's forward was replaced by a
# method of another object, as timers and loggers do it, that method's function comes back bound to the model instead
# (bound_method.__get__(model) binds anew): on a PixArt the next call raises AttributeError.
# Matters: turning the cache off to compare with the plain model, to save, to load other weights, or to use another
# cache; and whatever wraps forward.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 cache-dit==1.5.3

cat >"$folder/look.py" <<'PYTHON'
import logging
import sys
from importlib.metadata import version

import cache_dit
import diffusers
import torch

logging.disable(logging.WARNING)
sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8)
config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0)


def raised(call, *args, **kwargs) -> str:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return "nothing"


dit = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, patch_size=4, **sizes).eval()
inputs = dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([9, 9]), class_labels=torch.tensor([1, 2]))
weights = {name: weight.clone() for name, weight in dit.state_dict().items()}
with torch.no_grad():
    before = dit(**inputs).sample
    cache_dit.enable_cache(dit, cache_config=config)
    cache_dit.disable_cache(dit)
    same = torch.equal(dit(**inputs).sample, before)
home = dit.forward.__func__.__module__
more = sorted(set(dit.state_dict()) - set(weights))
loading, saving = raised(dit.load_state_dict, weights), raised(dit.save_pretrained, sys.argv[1])
print(f"cache-dit {version('cache-dit')}, DiT after disable_cache: its output is the same: {same}; its forward is of "
      f"{home}; more in its state dict: {', '.join(more)}")
print(f"load_state_dict raises {loading}, save_pretrained {saving}")


class Counter:
    def __init__(self, model):
        self.inner, self.calls = model.forward, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


pixart = diffusers.PixArtTransformer2DModel(
    cross_attention_dim=16, caption_channels=16, use_additional_conditions=False, **sizes
).eval()
inputs = dict(
    hidden_states=torch.randn(2, 4, 8, 8), encoder_hidden_states=torch.randn(2, 6, 16), timestep=torch.tensor([9, 9]),
    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
)
counter = Counter(pixart)
pixart.forward = counter.forward
with torch.no_grad():
    pixart(**inputs)
    cache_dit.enable_cache(pixart, cache_config=config)
    pixart(**inputs)
    cache_dit.disable_cache(pixart)
    calling = raised(pixart, **inputs)
print(f"PixArt with a counter for its forward: it counted {counter.calls} of 2 calls; after disable_cache the "
      f"forward is bound to {type(pixart.forward.__self__).__name__}, and a call raises {calling}")
assert same and home.startswith("cache_dit.") and len(more) == 5
assert loading == saving == "RuntimeError"
assert counter.calls == 2 and pixart.forward.__self__ is pixart and calling == "AttributeError"
PYTHON
"$folder/env/bin/python" "$folder/look.py" "$folder/saved"
