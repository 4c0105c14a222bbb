"""``ebcache-fast compare``: methods against each other on one model."""

from pathlib import Path
from typing import Literal

FRONTIER = "frontier.png"


def compare(
    methods: tuple[str, ...] | None = None,
    policies: tuple[str, ...] | None = None,
    budget: tuple[float, ...] = (1.5, 2.5),
    model: str = "letters",
    ckpt: Path | None = None,
    image_size: int = 256,
    num_classes: int = 1000,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    device: str | None = None,
    samples: int = 104,
    labels: tuple[int, ...] | None = None,
    num_sampling_steps: int = 20,
    sampler: str = "ddim",
    cfg_scale: float = 1.5,
    global_seed: int = 0,
    per_proc_batch_size: int = 26,
    out: Path | None = None,
) -> None:
    """Compare methods on one model: same noise, interleaved, each against the first.

    The bundled model's samples are also judged by its classifier; of any other model there are costs, times and errors.

    Args:
        methods: any of no-cache, table:FILE_OR_NAME, steps:N, eps-scale:B, a policy such as fora:N (an unknown name
            lists them), and of your own MODULE:FUNCTION or FILE.py:FUNCTION, a function (timesteps, shape) that returns
            a Plan or a CacheTable; or, as NAME or NAME:ARGUMENT, a policy that an installed package registered.
        policies: instead, policies by name, each at every --budget: path, algorithm1, fora, taylorseer, hicache, power,
            steps, dpm-solver++, or all. The first two are calibrated; they leave tables in --out, and take those there.
        budget: speed-ups over no caching by multiply-accumulates, of --policies.
        model: "letters", the bundled one, an original DiT such as DiT-XL/2, or "diffusers"; these need --ckpt.
        ckpt: the original's .pt, or .safetensors; or of diffusers' DiT the folder.
        image_size: 256 or 512, of a latent model.
        num_classes: of a latent model.
        dtype: what the model computes in; without, what its weights are in.
        device: cpu, cuda, cuda:1 and so on; without, the GPU if there is one.
        samples: how many stand behind each figure.
        labels: classes that the samples take in turn; without, all.
        num_sampling_steps: of methods that do not say their own.
        sampler: ddim, dpm-solver++ or ddpm, of all methods; a table for another one is refused.
        cfg_scale: guidance scale; 1 for none.
        global_seed: of all noise.
        per_proc_batch_size: samples at once.
        out: folder for report.json and frontier.png, and for tables.
    """
    options = dict(locals())
    from ebcache_fast.apps import console
    from ebcache_fast.apps.budgets import calibrated, check_budgets, methods_at, policies_of
    from ebcache_fast.apps.bundled import BUNDLED, labels_in_turn, letters_judge, open_model
    from ebcache_fast.apps.compare import check_count, measure
    from ebcache_fast.apps.frontier import draw_frontier, points_of
    from ebcache_fast.apps.method_spec import Setting, default_methods, parse_method
    from ebcache_fast.apps.pictures import save_picture
    from ebcache_fast.apps.report import command_line, write_report
    from ebcache_fast.apps.room import check_run
    from ebcache_fast.errors import InputError
    from ebcache_fast.models import as_denoiser
    from ebcache_fast.plan.files import make_folder
    from ebcache_fast.samplers import make_sampler

    check_budgets(budget)
    judge = letters_judge() if model == BUNDLED else None
    check_count(samples, judged=judge is not None)
    opened = open_model(model, ckpt, image_size, num_classes, dtype, device)
    denoiser = as_denoiser(opened)
    setting = Setting(denoiser.shape, num_sampling_steps, sampler)
    if out is not None:
        make_folder(out)
    if policies is None:
        options["methods"] = default_methods(setting) if methods is None else methods
        parsed = [parse_method(method, setting) for method in options["methods"]]
    else:
        if methods is not None:
            raise InputError("methods and policies are two ways to say the same; leave one of them out")
        tables = calibrated(opened, setting, cfg_scale, out)
        parsed = methods_at(policies_of(policies, sampler), budget, setting, tables)
    plans, draws = [method.plan for method in parsed], make_sampler(sampler, num_sampling_steps).draws_noise
    check_run(denoiser, samples, per_proc_batch_size, plans, draws_noise=draws, cfg_scale=cfg_scale)
    drawn = labels_in_turn(samples, denoiser.num_classes, labels or ())
    with console.progress_bar() as bar:
        _, results = measure(
            opened,
            parsed,
            drawn,
            judge,
            seed=global_seed,
            cfg_scale=cfg_scale,
            batch_size=per_proc_batch_size,
            on_start=bar.reset,
            on_step=bar.update,
        )
    console.print_results(results)
    if out is not None:
        settings = {"model": model, "sampler": sampler, "cfg_scale": cfg_scale, "seed": global_seed}
        write_report(out / "report.json", results, drawn, command_line("compare", options), settings)
        print(out / "report.json")
        if points := points_of(results):
            save_picture(
                draw_frontier(points, f"Quality against cost, {num_sampling_steps} steps of {sampler}"), out / FRONTIER
            )
            print(out / FRONTIER)
