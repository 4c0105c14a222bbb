"""Tiny random models of diffusers, and pipelines of them, in memory."""

from typing import Any

import torch
from torch import nn


def tiny_pipeline() -> Any:
    """A DiTPipeline in float32 with 1000 classes, as the pipeline takes for granted, and DDIM."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=4,
    )  # fmt: skip
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    made = diffusers.DiTPipeline(transformer.eval(), vae.eval(), diffusers.DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made
