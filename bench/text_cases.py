"""The models of diffusers that follow a text, and the calls that their steps are timed in: one guided sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import nn

from bench.rivals.case import Case
from bench.rivals.race import needed_bytes, weight_bytes
from bench.rivals.rival import Rival
from bench.step_cases import EVERY_KIND, plan_from
from ebcache_fast.models import CogVideoXConditioning, Conditioning, PixArtConditioning, as_denoiser

ROWS = 2  # of one guided sample
SAMPLER = "ddim"
PIXART_TEXT, PROMPT = 300, 100  # tokens that PixArt-Sigma's pipeline pads to, and those of a prompt
META = torch.device("meta")


@dataclass(frozen=True)
class TextModel:
    """A transformer of diffusers by the sizes in which it differs from its defaults, and as tiny as it can be."""

    label: str
    kind: str  # its class
    sizes: Mapping[str, Any]
    tiny: Mapping[str, Any]
    context_of: Callable[[Any], Conditioning]  # of the model, for `ROWS`


def pixart_context(model: Any) -> PixArtConditioning:
    """A prompt and an empty one, padded."""
    weight = model.proj_out.weight
    text = torch.randn(ROWS, PIXART_TEXT, model.config.caption_channels, dtype=weight.dtype, device=weight.device)
    lengths = torch.tensor([[PROMPT], [1]], device=weight.device)
    mask = torch.arange(PIXART_TEXT, device=weight.device) < lengths
    return PixArtConditioning(text, mask.to(torch.int64))


def cogvideox_context(model: Any) -> CogVideoXConditioning:
    """A prompt and an empty one, of which the padding is seen as well."""
    weight, config = model.proj_out.weight, model.config
    sizes = ROWS, config.max_text_seq_length, config.text_embed_dim
    return CogVideoXConditioning(torch.randn(sizes, dtype=weight.dtype, device=weight.device))


def _sigma(px: int) -> TextModel:
    usual = dict(caption_channels=4096, use_additional_conditions=False)
    tiny = dict(num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=3, sample_size=8)
    return TextModel(
        f"PixArt-Sigma {px}",
        "PixArtTransformer2DModel",
        usual | dict(sample_size=px // 8),
        usual | tiny | dict(caption_channels=16),
        pixart_context,
    )


_VIDEO = TextModel(
    "CogVideoX-2B",
    "CogVideoXTransformer3DModel",
    {},  # 49 frames of 720 x 480
    dict(num_attention_heads=2, attention_head_dim=8, num_layers=3, time_embed_dim=8, in_channels=4, out_channels=4)
    | dict(text_embed_dim=16, max_text_seq_length=6, sample_width=8, sample_height=8, sample_frames=5),
    cogvideox_context,
)
MODELS: Final[Mapping[str, TextModel]] = MappingProxyType(
    {"pixart-1024": _sigma(1024), "pixart-2048": _sigma(2048), "cogvideox-2b": _VIDEO}
)


def case_of(model: TextModel, device: torch.device, *, tiny: bool = False) -> Case:
    """A step of every kind, of a model with random weights, none of them zero; in bfloat16, tiny in float32."""
    import diffusers

    torch.manual_seed(0)
    with device:  # filled there: 1.7 billion random numbers take a CPU long
        made: nn.Module = getattr(diffusers, model.kind)(**(model.tiny if tiny else model.sizes))
    fill(made)
    made = made.to(torch.float32 if tiny else torch.bfloat16).eval().requires_grad_(False)
    plan = plan_from(EVERY_KIND, as_denoiser(made).shape, SAMPLER)
    channels = as_denoiser(made).latent_shape[0]
    return Case(made, plan, ROWS // 2, 4.5, model.context_of(made), SAMPLER, channels)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Matrices that keep the size of what they multiply; vectors near what they were."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def most_bytes(model: TextModel, rivals: Sequence[Rival]) -> tuple[int, int]:
    """What a run of ours needs at full size, and a bound for all contenders together; nothing is allocated.

    They share the weights, and each keeps no more than we do. Before them there is the method in float32.
    """
    case = case_of(model, META)
    needed, weights = needed_bytes(case), weight_bytes(case.model)
    return needed, weights + max(2 * needed, len(rivals) * (needed - weights))
