"""``ebcache-fast profile``: where the time of a run goes."""

from pathlib import Path


def profile(
    model: str = "letters",
    ckpt: Path | None = None,
    table: str = "letters-ddpm-50-1.5x",
    num_samples: int = 8,
    image_size: int = 256,
    num_classes: int = 1000,
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
        cfg_scale: guidance scale; 1 for none.
        global_seed: of all noise.
        eager: run without CUDA graphs, so that layers and operations have ranges of their own.
        trace: also write trace.json of one more run, with torch.profiler; not while another profiler looks on.
        out: folder for timeline.json, timeline.png and trace.json.
    """
    from ebcache_fast import console, profile_job
    from ebcache_fast.methods import open_table
    from ebcache_fast.models import as_denoiser
    from ebcache_fast.presets import labels_in_turn, open_model

    opened = open_model(model, ckpt, image_size, num_classes)
    timeline, written = profile_job.profile_into(
        out,
        opened,
        labels_in_turn(num_samples, as_denoiser(opened).num_classes),
        open_table(table),
        names={"model": model, "table": table},
        eager=eager,
        trace=trace,
        cfg_scale=cfg_scale,
        seed=global_seed,
    )
    console.print_timeline(timeline)
    print(*written, sep="\n")
