"""All contenders, by the names that results and the README use."""

from functools import partial

from bench.rivals import caching_diffusers as others
from bench.rivals import compiled, layouts, ours, plain
from bench.rivals.rival import Rival

OURS = "ebcache_fast"
FP8 = f"{OURS}, FP8"
DIFFUSERS = ("diffusers",)
by_diffusers = partial(Rival, is_another=True, needs=DIFFUSERS)
by_cache_dit = partial(Rival, is_another=True, needs=(*DIFFUSERS, "cache_dit"))

RIVALS: tuple[Rival, ...] = (
    Rival(OURS, "our own loop, a graph a step type", partial(ours.own_loop, whole=False)),
    Rival(f"{OURS}, one graph", "our own loop, one graph for all steps", partial(ours.own_loop, whole=True)),
    Rival(f"{OURS}, drop-in", "enable() around the model in a user's loop", partial(ours.drop_in, in_order=False)),
    Rival(f"{OURS}, drop-in, in_order", "the same, nothing awaited", partial(ours.drop_in, in_order=True)),
    Rival(FP8, "our own loop, QKV and fc1 in float8", partial(ours.own_loop, whole=False, fp8=True), is_rounded=True),
    Rival(f"{OURS}, uncached", "our own loop, every step computed", partial(ours.own_loop, whole=False), False),
    Rival("P0", "the original's model in float32, TF32 products, eager, uncached", plain.original, False),
    Rival("P1", "EB-Cache in plain torch, eager", plain.eager),
    Rival("P1, uncached", "the original's model, eager, uncached", plain.eager, False),
    Rival("P2", "diffusers' DiT, eager, uncached", layouts.eager, False, needs=DIFFUSERS),
    Rival("P3", "torch.compile(max-autotune), uncached", partial(compiled.whole_model, mode="max-autotune"), False),
    Rival("P5", "torch.compile(max-autotune) of a step a type, graphs captured by hand", compiled.ByStepType),
    Rival(
        "P3, reduce-overhead",
        "torch.compile(reduce-overhead), uncached",
        partial(compiled.whole_model, mode="reduce-overhead"),
        False,
    ),
    by_cache_dit("P4", "cache-dit, the table as its static mask", others.cache_dit),
    by_cache_dit("P4, compiled", "the same under torch.compile", others.cache_dit_compiled),
    by_diffusers("P4, MagCache", "diffusers' MagCache, told the table", others.mag_cache),
    by_diffusers("P4, FirstBlockCache", "diffusers' FirstBlockCache, about as many steps", others.first_block_cache),
    by_diffusers(
        "P4, PAB", "diffusers' Pyramid Attention Broadcast, as many steps", others.pyramid_attention_broadcast
    ),
    by_diffusers("P4, TaylorSeer", "diffusers' TaylorSeer, as many steps", others.taylorseer_cache),
)

# Of PixArt and CogVideoX, whose steps take so long that most of what a host can do for them doesn't matter.
TEXT_RIVALS: tuple[Rival, ...] = (
    Rival(OURS, "our own loop, a graph a step type", partial(ours.own_loop, whole=False)),
    Rival(f"{OURS}, eager", "our own loop, no graphs", ours.without_graphs),
    Rival("P1", "EB-Cache in plain torch around diffusers' layers, eager", layouts.method, needs=DIFFUSERS),
    Rival("P2", "diffusers' transformer, eager, uncached", layouts.eager, False, needs=DIFFUSERS),
    Rival(
        "P3",
        "the same, each layer under torch.compile(max-autotune)",
        layouts.compiled_by_layer,
        False,
        needs=DIFFUSERS,
    ),
    by_cache_dit("P4", "cache-dit, the table as its static mask", others.cache_dit),
    by_diffusers(
        "P4, PAB", "diffusers' Pyramid Attention Broadcast, as many steps", others.pyramid_attention_broadcast
    ),
)
