"""``ebcache-fast profile``: where the time of a run goes."""

from pathlib import Path
from typing import Literal


def profile(
    model: str = "letters",
    ckpt: Path | None = None,
    table: str = "letters-ddim-20-1.5x",
    num_samples: int = 8,
    image_size: int = 256,
    num_classes: int = 1000,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    device: str | None = None,
    fp8: bool = False,
    cfg_scale: float = 1.5,
    global_seed: int = 0,
    eager: bool = False,
    trace: bool = True,
    out: Path = Path("ebcache-profile"),
) -> None:
    """Time one run by type of step, in ranges that Nsight Systems and Nsight Compute see; draw its timeline.

    Args:
        model: "letters", the bundled one, an original DiT such as DiT-XL/2, or "diffusers"; these need --ckpt.
        ckpt: the original's .pt, or .safetensors; or of diffusers' DiT the folder.
        table: a Cache Table's file, or the name of one that comes with the package.
        num_samples: how many, in one batch.
        image_size: 256 or 512, of a latent model.
        num_classes: of a latent model.
        dtype: what the model computes in; without, what its weights are in.
        device: cpu, cuda, cuda:1 and so on; without, the GPU if there is one.
        fp8: QKV's and fc1's products in float8; of an original DiT in bfloat16, on a GPU from compute capability 8.9.
        cfg_scale: guidance scale; 1 for none.
        global_seed: of all noise.
        eager: run without CUDA graphs, so that layers and operations have ranges of their own.
        trace: also write trace.json of one more run, with torch.profiler; not while another profiler looks on.
        out: folder for timeline.json, timeline.png and trace.json.
    """
    from ebcache_fast.apps import console
    from ebcache_fast.apps.bundled import engine_options, labels_in_turn, open_model
    from ebcache_fast.apps.method_spec import open_table
    from ebcache_fast.apps.profile import profile_into
    from ebcache_fast.apps.room import check_run
    from ebcache_fast.models import as_denoiser
    from ebcache_fast.sampling import resolve_run

    opened = open_model(model, ckpt, image_size, num_classes, dtype, device)
    options, denoiser, cache_table = engine_options(opened, fp8=fp8), as_denoiser(opened), open_table(table)
    plan, sampler = resolve_run(denoiser, cache_table, None, None, None)
    draws = sampler.draws_noise
    check_run(denoiser, num_samples, num_samples, [plan], draws_noise=draws, cfg_scale=cfg_scale)
    timeline, written = profile_into(
        out,
        opened,
        labels_in_turn(num_samples, denoiser.num_classes),
        cache_table,
        names={"model": model, "table": table},
        eager=eager,
        trace=trace,
        options=options,
        cfg_scale=cfg_scale,
        seed=global_seed,
    )
    console.print_timeline(timeline)
    print(*written, sep="\n")
