"""The command line: parse, call, print. What the commands do stands in the modules they call."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial, wraps
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import tyro
from tyro.conf import Positional

from ebcache_fast.errors import EBCacheError, InputError

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes
RULE = re.compile("[─-]{5,}")  # between the parts of the parser's reports
FRAME = re.compile("[│╭╮╰╯]|\x1b\\[[0-9;]*m")


def demo(text: str | None = None, out: Path = Path("ebcache-demo"), samples: int = 104, seed: int = 0) -> None:
    """Sample the bundled letter model with and without EB-Cache; print costs and quality, and draw a picture.

    Args:
        text: what the picture spells, letters A to Z; the alphabet if left out.
        out: folder for comparison.png and report.json.
        samples: how many stand behind each figure, 32 or more.
        seed: of all noise.
    """
    from ebcache_fast import console
    from ebcache_fast import demo as main_job

    with console.progress_bar() as bar:
        results = main_job.demo(out, text, samples, seed, on_start=bar.reset, on_step=bar.update)
    console.print_results(results)
    print(f"\n{out / 'comparison.png'}\n{out / 'report.json'}")


def sample(
    model: str = "letters",
    ckpt: Path | None = None,
    table: str | None = None,
    text: str | None = None,
    num_samples: int = 26,
    image_size: int = 256,
    num_classes: int = 1000,
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
        cfg_scale: guidance scale; 1 for none.
        num_sampling_steps: the table's, or 50.
        sampler: ddpm, ddim or dpm-solver++; the table's, or ddpm.
        eps_scale: factor on the predicted noise; the table's, or 1.
        global_seed: sample k draws its noise from this seed and k.
        per_proc_batch_size: samples at once.
        sample_dir: folder to write.
    """
    from ebcache_fast import console, job
    from ebcache_fast.methods import open_table
    from ebcache_fast.models import as_denoiser
    from ebcache_fast.presets import labels_in_turn, labels_of, open_model

    opened = open_model(model, ckpt, image_size, num_classes)
    labels = labels_of(text) if text is not None else labels_in_turn(num_samples, as_denoiser(opened).num_classes)
    chosen = None if table is None else open_table(table)
    with console.progress_bar() as bar:
        written = job.sample_into(
            sample_dir,
            opened,
            labels,
            table=chosen,
            steps=num_sampling_steps,
            sampler=sampler,
            cfg_scale=cfg_scale,
            eps_scale=eps_scale,
            seed=global_seed,
            batch_size=per_proc_batch_size,
            on_step=bar.update,
        )
    print(*written, sep="\n")


def calibrate(
    out: Path,
    model: str = "letters",
    ckpt: Path | None = None,
    image_size: int = 256,
    num_classes: int = 1000,
    samples: int = 1000,
    num_sampling_steps: int = 50,
    sampler: str = "ddpm",
    cfg_scale: float = 1.5,
    eps_scale: float = 1.0,
    target_speedup: float | None = None,
    a: float = 0.05,
    k: float = 0.15,
    criterion: Literal["vector", "norm"] = "vector",
    norm: Literal["rms", "l2"] = "rms",
    compare_scaled: bool = True,
    max_run: int = 3,
    global_seed: int = 0,
    per_proc_batch_size: int = 64,
    progress_file: Path | None = None,
) -> None:
    """Make a Cache Table for a model by EB-Cache's Algorithm 1.

    Args:
        out: file to write the table to, .json.
        model: "letters", the bundled one, an original DiT such as DiT-XL/2, or "diffusers"; these need --ckpt.
        ckpt: the original's .pt, or .safetensors; or of diffusers' DiT the folder.
        image_size: 256 or 512, of a latent model.
        num_classes: of a latent model.
        samples: how many vote.
        num_sampling_steps: steps of the table.
        sampler: ddpm, ddim or dpm-solver++.
        cfg_scale: guidance scale; 1 for none.
        eps_scale: factor b on the predicted noise, in (0, 1].
        target_speedup: find the threshold whose table the MAC count allows this speed-up.
        a: threshold at the last step; where a target is given, only its ratio to k counts.
        k: how much higher the threshold is at the first step.
        criterion: compare outputs as vectors, or, as in the paper, by their norms.
        norm: root mean square, or, as in the paper, L2, for which the thresholds must be as much larger.
        compare_scaled: compare b times both outputs, or, as in the paper, b times the cached one alone.
        max_run: most cached steps in a row; 0 for no limit.
        global_seed: of all noise.
        per_proc_batch_size: samples at once.
        progress_file: where finished batches are counted, so that the same command resumes.
    """
    from ebcache_fast import calibrate as search
    from ebcache_fast import console
    from ebcache_fast.algorithm1 import Algorithm1
    from ebcache_fast.files import make_room
    from ebcache_fast.presets import open_model

    make_room(out)  # hours of votes must not be lost for want of a place
    with console.progress_bar() as bar:
        table = search(
            open_model(model, ckpt, image_size, num_classes),
            samples=samples,
            steps=num_sampling_steps,
            sampler=sampler,
            cfg_scale=cfg_scale,
            eps_scale=eps_scale,
            algorithm=Algorithm1(
                a=a, k=k, criterion=criterion, norm=norm, compare_scaled=compare_scaled, max_run=max_run or None
            ),
            target_speedup=target_speedup,
            seed=global_seed,
            batch_size=per_proc_batch_size,
            progress_file=progress_file,
            on_step=bar.update,
        )
    table.save(out)
    console.print_table(table)
    print(out)


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


def show_table(source: Positional[str]) -> None:
    """Print a Cache Table: its steps as a strip, what it is for, where it comes from.

    Args:
        source: a table's .json file, or the name of one that comes with the package.
    """
    from ebcache_fast import console
    from ebcache_fast.methods import open_table

    console.print_table(open_table(source))


def check_table(
    source: Positional[str],
    model: str = "letters",
    image_size: int = 256,
    num_classes: int = 1000,
) -> None:
    """Hold a Cache Table against a model: whether it fits, and what it costs there.

    Args:
        source: a table's .json file, or the name of one that comes with the package.
        model: "letters", the bundled one, or an original DiT such as DiT-XL/2.
        image_size: 256 or 512, of a latent model.
        num_classes: of a latent model.
    """
    from ebcache_fast import console
    from ebcache_fast.methods import open_table
    from ebcache_fast.presets import shape_of

    shape = shape_of(model, image_size, num_classes)
    console.print_costs(open_table(source).plan(shape), shape)


def import_table(
    source: Positional[Path],
    out: Path,
    kind: Literal["eb-npy", "smoothcache"] = "eb-npy",
    order: Literal["execution", "index"] = "execution",
    steps: int = 50,
    spacing: Literal["even", "stride"] = "even",
    eps_scale: float | None = None,
    adm_lambda: float | None = None,
    eb_delta: float | None = None,
    allow_amplify: bool = False,
) -> None:
    """Turn a schedule that another project released into a Cache Table.

    Args:
        source: EB-Cache's .npy, or SmoothCache's .json.
        out: file to write the table to, .json.
        kind: what the source is.
        order: of an .npy: as executed, or by descending index, as the released code reads it.
        steps: how many.
        spacing: of the timesteps out of 1000: even, both ends kept, or stride, 0, k, 2k and so on.
        eps_scale: factor b on the predicted noise, in (0, 1].
        adm_lambda: instead, ADM-ES's lambda: b = 1 / lambda.
        eb_delta: instead, the delta of EB-Cache's released script: b = 1 / delta.
        allow_amplify: lets b exceed 1.
    """
    from ebcache_fast import console
    from ebcache_fast.noise_schedule import TRAIN_STEPS, ddim_timesteps, respaced_timesteps
    from ebcache_fast.table_importers import eps_scale_of, from_eb_npy, from_smoothcache

    timesteps = (respaced_timesteps if spacing == "even" else ddim_timesteps)(TRAIN_STEPS, steps)
    b = eps_scale_of(eps_scale, adm_lambda, eb_delta)
    if kind == "eb-npy":
        table = from_eb_npy(source, timesteps, order, b, allow_amplify)
    else:
        table = from_smoothcache(source, timesteps, b, allow_amplify)
    table.save(out)
    console.print_table(table)
    print(out)


def info() -> None:
    """Say what runs here: versions, device, Triton, the backend of every operation, the tables at hand."""
    from ebcache_fast import console

    console.print_info()


COMMANDS: Final[Mapping[str, Callable[..., None]]] = MappingProxyType(
    {
        "demo": demo,
        "sample": sample,
        "calibrate": calibrate,
        "compare": compare,
        "profile": profile,
        "table-show": show_table,
        "table-check": check_table,
        "table-import": import_table,
        "info": info,
    }
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    """The command that ``words`` ask for, its arguments bound; InputError where they do not fit.

    Raises SystemExit after printing help.
    """
    report = StringIO()
    try:
        with redirect_stderr(report):
            commands = {name: _bound(command) for name, command in COMMANDS.items()}
            chosen: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(commands, prog="ebcache-fast", args=words)
    except SystemExit as stop:
        if not stop.code:
            raise
        # What the parser has to say stands in a frame: a title, the message, which is all that is kept, and help.
        _, framed, *_ = [*RULE.split(FRAME.sub("", report.getvalue())), ""]
        message = framed.strip(" .\n")
        raise InputError(f"{message}; ebcache-fast --help shows what there is") from None
    return chosen


def _bound(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """``command`` as the parser sees it, but calling it only binds the arguments."""

    @wraps(command)
    def bind(*args: object, **kwargs: object) -> Callable[[], None]:
        return partial(command, *args, **kwargs)

    return bind


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if (joined := "-".join(words[:2])) in COMMANDS:
        words[:2] = [joined]  # "table show" reads better than the parser's "table-show"
    try:
        parse(words)()
    except EBCacheError as error:
        print("ebcache-fast:", *str(error).split(), file=sys.stderr)  # one line, whatever a file name holds
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
