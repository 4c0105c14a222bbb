"""What is installed. How the tools behave stands in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION_LINE = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)


def read_version() -> str:
    """Return the version without importing the package, which needs torch."""
    match = VERSION_LINE.search((ROOT / "ebcache_fast" / "_version.py").read_text(encoding="utf-8"))
    if match is None:
        raise SystemExit('ebcache_fast/_version.py has no line __version__ = "..."; restore it')
    return match.group(1)


DIFFUSERS = "diffusers>=0.35"

setup(
    name="ebcache-fast",
    version=read_version(),
    description="Diffusion transformers at the speed of the hardware: EB-Cache as one plan, known ahead",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # kernels/ has no __init__.py, so that the folder is never a package of its own; it exists only under
    # ebcache_fast. A top-level `kernels` would break transformers, which probes for a package of that name.
    packages=[*find_packages(include=["ebcache_fast", "ebcache_fast.*"]), "ebcache_fast.kernels"],
    package_dir={"ebcache_fast.kernels": "kernels"},
    package_data={
        "ebcache_fast": ["py.typed", "assets/**/*.safetensors", "assets/**/*.json", "assets/**/*.npz"],
    },
    install_requires=[
        "torch>=2.10",
        'triton>=3.6; sys_platform == "linux"',
        "numpy>=1.26",
        "pydantic>=2.7",
        "safetensors>=0.4.3",
        "pillow>=10",
        "tqdm>=4.66",
        "rich>=13.7",
        "tyro>=0.9",
    ],
    extras_require={
        "diffusers": [DIFFUSERS, "transformers>=4.46"],
        "plots": ["matplotlib>=3.8"],
        "telemetry": ["nvidia-ml-py>=12"],
        "bench": ["pytest>=8", "pytest-benchmark>=5"],
        "dev": ["pre-commit>=4"],  # not in CI, which runs the linters by themselves
        "test": [
            "pytest>=8",
            "pytest-cov>=5",
            "pytest-xdist>=3.6",  # halves the time of the tests on two cores
            "pytest-benchmark>=5",  # the benchmarks run small among the tests, so that they can't rot
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "setuptools>=77",  # the wheel test builds with it
            DIFFUSERS,  # its schedulers are the samplers' oracle, its pipelines what the drop-in is tested on
            "transformers>=5",  # text encoders and tokenizers, made in memory
            "accelerate>=1",  # offloading, as users of diffusers' pipelines switch it on
            "peft>=0.17",  # LoRA, as they load it
        ],
    },
    entry_points={"console_scripts": ["ebcache-fast = ebcache_fast.apps.cli:main"]},
)
