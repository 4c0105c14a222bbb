"""``ebcache-fast calibrate``: a Cache Table for a model."""

from functools import partial
from pathlib import Path
from typing import Any, Literal


def calibrate(
    out: Path,
    model: str = "letters",
    ckpt: Path | None = None,
    image_size: int = 256,
    num_classes: int = 1000,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    device: str | None = None,
    fp8: bool = False,
    method: Literal["path", "algorithm1"] | None = None,
    samples: int | None = None,
    num_sampling_steps: int = 50,
    sampler: str | None = None,
    cfg_scale: float = 1.5,
    eps_scale: float = 1.0,
    target_speedup: float | None = None,
    target_ms: float | None = None,
    profile: Path | None = None,
    a: float | None = None,
    k: float | None = None,
    criterion: Literal["vector", "norm"] | None = None,
    norm: Literal["rms", "l2"] | None = None,
    compare_scaled: bool | None = None,
    max_run: int | None = None,
    global_seed: int = 0,
    per_proc_batch_size: int = 64,
    progress_file: Path | None = None,
) -> None:
    """Make a Cache Table for a model: by the path search, or by EB-Cache's Algorithm 1.

    Args:
        out: file to write the table to, .json.
        model: "letters", the bundled one, an original DiT such as DiT-XL/2, or "diffusers"; these need --ckpt.
        ckpt: the original's .pt, or .safetensors; or of diffusers' DiT the folder.
        image_size: 256 or 512, of a latent model.
        num_classes: of a latent model.
        dtype: what the model computes in; without, what its weights are in.
        device: cpu, cuda, cuda:1 and so on; without, the GPU if there is one.
        fp8: QKV's and fc1's products in float8; of an original DiT in bfloat16, on a GPU from compute capability 8.9.
        method: path measures how well forecasts do, and finds the steps to compute for a target speed-up; algorithm1 is
            the paper's. Without, path, but algorithm1 where one of its own options is given, those from --a on.
        samples: how many are measured, or vote; without, 128, or 1000 of algorithm1.
        num_sampling_steps: steps of the table.
        sampler: ddpm, ddim or dpm-solver++; without, what the scheduler in a folder of diffusers does, or else ddim.
        cfg_scale: guidance scale; 1 for none.
        eps_scale: factor b on the predicted noise, in (0, 1].
        target_speedup: speed-up that the MAC count is to allow; without, 2, or of algorithm1 what its thresholds give,
            which a target loosens, to take back what is too much.
        target_ms: of path, how many milliseconds a batch's run is to take instead, by --profile.
        profile: timeline.json of a profile of any table that path made for this model: how long its steps take.
        a: threshold of algorithm1 at the last step, 0.05; where a target is given, only its ratio to k counts.
        k: how much higher the threshold is at the first step, 0.15.
        criterion: compare outputs as vectors, which is usual, or, as in the paper, by their norms.
        norm: root mean square, or, as in the paper, L2, for which the thresholds must be as much larger.
        compare_scaled: compare b times both outputs, or, as in the paper, b times the cached one alone.
        max_run: most cached steps in a row, 3; 0 for no limit.
        global_seed: of all noise.
        per_proc_batch_size: samples at once.
        progress_file: where finished batches are counted, so that the same command resumes.
    """
    from ebcache_fast.apps import console
    from ebcache_fast.apps.bundled import engine_options, folder_run, open_model
    from ebcache_fast.apps.room import check_votes
    from ebcache_fast.apps.timeline import Timeline
    from ebcache_fast.calibration.algorithm1 import Algorithm1
    from ebcache_fast.calibration.pipeline import calibrate as search
    from ebcache_fast.calibration.search import SAMPLES
    from ebcache_fast.errors import InputError
    from ebcache_fast.models import as_denoiser
    from ebcache_fast.plan.files import make_room
    from ebcache_fast.plan.timesteps import MAX_INT

    own: dict[str, Any] = {"a": a, "k": k, "criterion": criterion, "norm": norm, "compare_scaled": compare_scaled}
    own = {name: value for name, value in own.items() if value is not None}
    if max_run is not None:
        own["max_run"] = max_run or None
    method = method or ("algorithm1" if own else "path")
    algorithm = Algorithm1(**own) if own or method == "algorithm1" else None
    samples = SAMPLES[method] if samples is None else samples
    for name, number in {"max_run": max_run or 0, "seed": global_seed, "batch_size": per_proc_batch_size}.items():
        if number > MAX_INT:
            raise InputError(f"{name}={number} is above {MAX_INT}, the most that a table's file can say; choose less")
    opened = open_model(model, ckpt, image_size, num_classes, dtype, device)
    run: dict[str, Any] = {"sampler": sampler or "ddim"}
    if sampler is None:
        run |= folder_run(model, ckpt, opened, num_sampling_steps)
    check_votes(as_denoiser(opened), samples, per_proc_batch_size, num_sampling_steps, cfg_scale)
    for path in (out, *([] if progress_file is None else [progress_file])):
        make_room(path)  # hours of votes must not be lost for want of a place
    with console.progress_bar() as bar:
        table = search(
            opened,
            **run,
            method=method,
            samples=samples,
            steps=num_sampling_steps,
            cfg_scale=cfg_scale,
            eps_scale=eps_scale,
            algorithm=algorithm,
            target_speedup=target_speedup,
            target_ms=target_ms,
            step_ms=None if profile is None else Timeline.load(profile).step_ms(),
            seed=global_seed,
            batch_size=per_proc_batch_size,
            fp8=engine_options(opened, fp8=fp8).fp8,
            progress_file=progress_file,
            on_step=bar.update,
            on_total=partial(console.set_total, bar),
        )
    table.save(out)
    console.print_table(table)
    console.print_calibration(table)
    print(out)
