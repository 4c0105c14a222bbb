"""``ebcache-fast compare``: methods against each other on the bundled model."""

from pathlib import Path


def compare(
    methods: tuple[str, ...] = (
        "no-cache",
        "table:letters-ddpm-50-1.5x",
        "table:letters-ddpm-50-2.5x",
        "fora:2",
        "fora:3",
        "steps:33",
        "steps:20",
        "eps-scale:0.98",
    ),
    samples: int = 104,
    num_sampling_steps: int = 50,
    sampler: str = "ddpm",
    cfg_scale: float = 1.5,
    global_seed: int = 0,
    out: Path | None = None,
) -> None:
    """Compare methods on the bundled model: same noise, interleaved, each against the first.

    Args:
        methods: any of no-cache, table:FILE_OR_NAME, fora:N, steps:N, eps-scale:B.
        samples: how many stand behind each figure.
        num_sampling_steps: of methods that do not say their own.
        sampler: ddpm, ddim or dpm-solver++.
        cfg_scale: guidance scale; 1 for none.
        global_seed: of all noise.
        out: folder for report.json.
    """
    from ebcache_fast import console, demo
    from ebcache_fast.files import make_folder
    from ebcache_fast.methods import Setting, parse_method
    from ebcache_fast.models import as_denoiser
    from ebcache_fast.presets import default_device, labels_in_turn, load_letters

    preset = load_letters(default_device())
    denoiser = as_denoiser(preset.model)
    setting = Setting(denoiser.shape, num_sampling_steps, sampler)
    parsed = [parse_method(method, setting) for method in methods]
    labels = labels_in_turn(samples, denoiser.num_classes)
    if out is not None:
        make_folder(out)
    with console.progress_bar() as bar:
        _, results = demo.measure(
            preset, parsed, labels, global_seed, cfg_scale, on_start=bar.reset, on_step=bar.update
        )
    console.print_results(results)
    if out is not None:
        demo.write_report(out / "report.json", results, global_seed)
        print(out / "report.json")
