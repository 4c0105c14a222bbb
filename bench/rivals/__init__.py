"""Rivals, each as a user would run it, beside us in one process: the same weights, noise, labels, table and dtype.

    python -m bench.rivals [--px 256] [--samples 1] [--only NAME ...] [--rounds 15] [--minutes M]
    python -m bench.rivals --dry-run              tiny, on the CPU: proves all that is installed, measures nothing
    python -m bench.rivals --list

Contenders take turns, a whole trajectory each, after a first run of each that compiles, tunes and captures. A run of
our own loop is timed from the request on: the modulation, which rivals compute at every step, is prepared before the
first. All guide three channels, scale eps and take the sampler's step alike: rivals by `loop.step_on`, in fewer tensor
operations than the code they come from, which is a kindness to them. Each result is held against the same method in
float32, so that nobody is timed for a wrong picture. The file is written after each round.

DiT-XL/2 has random weights: they do not change its speed. Compiled code is cached where TORCHINDUCTOR_CACHE_DIR and
TRITON_CACHE_DIR say, between runs too: a first race spends most of its time on compiling. P2 and P4 need packages that
are never installed with ours, with --no-deps where there is no registry:

    diffusers huggingface-hub safetensors packaging pyyaml pillow tqdm requests urllib3 certifi idna httpx2 httpcore2
    h11 truststore, and cache-dit
"""
