"""``ebcache-fast sample``: pictures or latents of any model."""

from pathlib import Path
from typing import Any, Literal


def sample(
    model: str = "letters",
    ckpt: Path | None = None,
    table: str | None = None,
    text: str | None = None,
    num_samples: int = 26,
    image_size: int = 256,
    num_classes: int = 1000,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    device: str | None = None,
    fp8: bool = False,
    cfg_scale: float = 1.5,
    num_sampling_steps: int | None = None,
    sampler: str | None = None,
    eps_scale: float | None = None,
    global_seed: int = 0,
    per_proc_batch_size: int = 64,
    sample_dir: Path = Path("samples"),
) -> None:
    """Sample a model into samples.npz (arr_0: uint8 NHWC, or float32 latents) and, for pictures, samples.png.

    Args:
        model: "letters", the bundled one, an original DiT such as DiT-XL/2, or "diffusers"; these need --ckpt.
        ckpt: the original's .pt, or .safetensors; or of diffusers' DiT the folder.
        table: a Cache Table's file, or the name of one that comes with the package; without, nothing is cached.
        text: letters A to Z to sample; without, all classes in turn.
        num_samples: how many, where --text does not say it.
        image_size: 256 or 512, of a latent model.
        num_classes: of a latent model.
        dtype: what the model computes in; without, what its weights are in.
        device: cpu, cuda, cuda:1 and so on; without, the GPU if there is one.
        fp8: QKV's and fc1's products in float8; of an original DiT in bfloat16, on a GPU from compute capability 8.9.
        cfg_scale: guidance scale; 1 for none.
        num_sampling_steps: the table's, or 50.
        sampler: ddpm, ddim or dpm-solver++; without, what the scheduler in a folder of diffusers does, or else the
            table's, or ddpm.
        eps_scale: factor on the predicted noise; the table's, or 1.
        global_seed: sample k draws its noise from this seed and k.
        per_proc_batch_size: samples at once.
        sample_dir: folder to write.
    """
    from ebcache_fast.apps import console
    from ebcache_fast.apps.bundled import engine_options, folder_run, labels_in_turn, labels_of, open_model
    from ebcache_fast.apps.jobs import sample_into
    from ebcache_fast.apps.method_spec import open_table
    from ebcache_fast.apps.room import check_run
    from ebcache_fast.engine.engine import Engine
    from ebcache_fast.sampling import DEFAULT_STEPS, resolve_run

    opened = open_model(model, ckpt, image_size, num_classes, dtype, device)
    engine = Engine(opened, engine_options(opened, fp8=fp8))
    cache_table = None if table is None else open_table(table, num_sampling_steps)
    run: dict[str, Any] = {"sampler": sampler}
    if sampler is None:
        steps = num_sampling_steps or (DEFAULT_STEPS if cache_table is None else len(cache_table))
        run |= folder_run(model, ckpt, opened, steps)
    plan, stepper = resolve_run(engine.denoiser, cache_table, num_sampling_steps, run["sampler"], eps_scale)
    count, draws = num_samples if text is None else len(text), stepper.draws_noise
    check_run(engine.denoiser, count, per_proc_batch_size, [plan], draws_noise=draws, cfg_scale=cfg_scale)
    labels = labels_of(text) if text is not None else labels_in_turn(num_samples, engine.denoiser.num_classes)
    with console.progress_bar() as bar:
        written = sample_into(
            sample_dir,
            opened,
            labels,
            table=cache_table,
            steps=num_sampling_steps,
            **run,
            cfg_scale=cfg_scale,
            eps_scale=eps_scale,
            seed=global_seed,
            batch_size=per_proc_batch_size,
            on_step=bar.update,
            engine=engine,
        )
    print(*written, sep="\n")
