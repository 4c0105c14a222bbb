"""Tiny random models of diffusers, and pipelines of them, in memory."""

from typing import Any

import torch
from torch import nn

WORDS = ("a", "the", "red", "green", "small", "old", "cat", "dog", "bird", "house", "runs", "sleeps")
TEXT_WIDTH = 16
TEXT_LENGTH = 6  # tokens of a prompt, the padding counted


def filled(model: Any, std: float = 0.2) -> Any:
    """The model in eval mode, with nothing in it zero, and the same at every call."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def quiet(pipe: Any) -> Any:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_transformer(**sizes: Any) -> Any:
    """A DiTTransformer2DModel in float32, its own defaults but for the size; nothing in it is zero."""
    import diffusers

    defaults = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2)
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**(defaults | dict(sample_size=8, patch_size=4) | sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_pixart(**sizes: Any) -> Any:
    """A PixArtTransformer2DModel as PixArt-Sigma's, but for the size: 16 tokens, and eps beside a variance."""
    import diffusers

    defaults = dict(num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2)
    made = diffusers.PixArtTransformer2DModel(
        **(defaults | dict(caption_channels=TEXT_WIDTH, sample_size=8, use_additional_conditions=False) | sizes)
    )
    return filled(made)


def tiny_cogvideox(**sizes: Any) -> Any:
    """A CogVideoXTransformer3DModel as CogVideoX-2b's, but for the size: 3 latent frames of 16 patches."""
    import diffusers

    defaults = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, time_embed_dim=8)
    channels = dict(in_channels=4, out_channels=4, text_embed_dim=TEXT_WIDTH, max_text_seq_length=TEXT_LENGTH)
    video = dict(sample_width=8, sample_height=8, sample_frames=5, temporal_compression_ratio=2)
    made = diffusers.CogVideoXTransformer3DModel(**(defaults | channels | video | sizes))
    return filled(made, std=0.4)  # with less, gates are so small that what is reused hardly shows


def tiny_vae() -> Any:
    """An AutoencoderKL that leaves height and width as they are."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8).eval()


def tiny_video_vae() -> Any:
    """An AutoencoderKLCogVideoX that halves height, width and time."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    ).eval()


def tiny_text() -> dict[str, Any]:
    """A T5 encoder and a tokenizer that knows `WORDS`, by their names in a pipeline."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ("<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS))
    tokenizer = T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)
    sizes = dict(d_model=TEXT_WIDTH, d_ff=32, d_kv=8, num_heads=2, num_layers=1, vocab_size=len(pieces))
    return dict(tokenizer=tokenizer, text_encoder=filled(T5EncoderModel(T5Config(**sizes))))


def tiny_pipeline() -> Any:
    """A DiTPipeline with 1000 classes, as the pipeline takes for granted, and DDIM."""
    import diffusers

    transformer = tiny_transformer()
    return quiet(diffusers.DiTPipeline(transformer, tiny_vae(), diffusers.DDIMScheduler()))


def tiny_pixart_sigma() -> Any:
    """A PixArtSigmaPipeline with the DPM-Solver++ that its checkpoints come with."""
    import diffusers

    made = diffusers.PixArtSigmaPipeline(
        **tiny_text(), vae=tiny_vae(), transformer=tiny_pixart(), scheduler=diffusers.DPMSolverMultistepScheduler()
    )
    return quiet(made)


def tiny_pixart_alpha(*, additional_conditions: bool = False) -> Any:
    """A PixArtAlphaPipeline, as the 512 checkpoint's or, with resolution and aspect ratio, as the 1024 one's."""
    import diffusers

    sizes = dict(sample_size=128, attention_head_dim=12, cross_attention_dim=24, use_additional_conditions=True)
    made = diffusers.PixArtAlphaPipeline(
        **tiny_text(),
        vae=tiny_vae(),
        transformer=tiny_pixart(**(sizes if additional_conditions else {})),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    return quiet(made)


def cogvideox_scheduler(name: str = "CogVideoXDDIMScheduler", snr_shift_scale: float = 3.0) -> Any:
    """As CogVideoX-2b has it; CogVideoX-5b has CogVideoXDPMScheduler and a shift of 1."""
    import diffusers

    return getattr(diffusers, name)(
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift_scale,
        timestep_spacing="trailing",
    )


def _cogvideox(kind: str, scheduler: Any, **sizes: Any) -> Any:
    import diffusers

    transformer = tiny_cogvideox(**sizes)
    made = getattr(diffusers, kind)(**tiny_text(), vae=tiny_video_vae(), transformer=transformer, scheduler=scheduler)
    return quiet(made)


ROTARY = dict(use_rotary_positional_embeddings=True, attention_head_dim=16)  # 3 axes don't fit into 8


def tiny_cogvideox_2b() -> Any:
    """A CogVideoXPipeline with added positions and DDIM."""
    return _cogvideox("CogVideoXPipeline", cogvideox_scheduler())


def tiny_cogvideox_5b() -> Any:
    """A CogVideoXPipeline with rotary embeddings and DPM-Solver++."""
    return _cogvideox("CogVideoXPipeline", cogvideox_scheduler("CogVideoXDPMScheduler", 1.0), **ROTARY)


def tiny_image_to_video() -> Any:
    """A CogVideoXImageToVideoPipeline: the image's latents are further channels of what the model sees."""
    positions = dict(use_learned_positional_embeddings=True)
    scheduler = cogvideox_scheduler("CogVideoXDPMScheduler", 1.0)
    return _cogvideox("CogVideoXImageToVideoPipeline", scheduler, in_channels=8, **positions, **ROTARY)


def tiny_video_to_video() -> Any:
    """A CogVideoXVideoToVideoPipeline."""
    return _cogvideox("CogVideoXVideoToVideoPipeline", cogvideox_scheduler())
