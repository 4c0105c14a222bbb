"""``ebcache-fast demo``: the bundled model with and without EB-Cache."""

from pathlib import Path


def demo(
    text: str | None = None,
    out: Path = Path("ebcache-demo"),
    samples: int = 156,
    seed: int = 0,
    sampler: str = "ddim",
) -> None:
    """Sample the bundled letter model with and without EB-Cache; print costs and quality, and draw a picture.

    Args:
        text: what the picture spells, letters A to Z; the alphabet if left out.
        out: folder for comparison.png and report.json.
        samples: how many stand behind each figure, 32 or more.
        seed: of all noise.
        sampler: ddim, whose fewer steps go towards the same pictures, or ddpm, the paper's, which draws noise at each.
    """
    from ebcache_fast.apps import console
    from ebcache_fast.apps import demo as main_job

    with console.progress_bar() as bar:
        results = main_job.demo(out, text, samples, seed, sampler, on_start=bar.reset, on_step=bar.update)
    console.print_results(results)
    print(f"\n{out / 'comparison.png'}\n{out / 'report.json'}")
