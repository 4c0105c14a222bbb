"""Tiny random models of diffusers, and pipelines of them, in memory."""

from typing import Any

import torch
from torch import nn


def tiny_transformer(**sizes: Any) -> Any:
    """A DiTTransformer2DModel in float32, its own defaults but for the size; nothing in it is zero."""
    import diffusers

    defaults = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2)
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**(defaults | dict(sample_size=8, patch_size=4) | sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_pipeline() -> Any:
    """A DiTPipeline with 1000 classes, as the pipeline takes for granted, and DDIM."""
    import diffusers

    transformer = tiny_transformer()
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    made = diffusers.DiTPipeline(transformer, vae.eval(), diffusers.DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made
