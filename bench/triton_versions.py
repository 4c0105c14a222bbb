"""The kernels' tests under other Triton versions than the pinned one.

    python -m bench.triton_versions 3.6.0 newest

Each version is installed into a folder of its own, beside the environment, and comes first on the path of the tests:
those of every kernel and of the engine over them. Triton 3.6 gets a numpy below 2.4, with which alone its interpreter
can loop up to a bound known only at run time. Then everything is compiled offline; limits that another version's
compiler breaks are shown, but only the pinned one's count. Exit status 1 if a test or a compile fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_interpreter", "test_kernels*", "test_engine_triton", "test_launches")
OLD_NUMPY = {"3.6": "numpy<2.4"}  # by Triton's version


def requirements(version: str) -> list[str]:
    """What to install for a version, "newest" for whatever that is."""
    exact = [] if version == "newest" else [f"=={version}"]
    return ["triton" + "".join(exact), *(need for old, need in OLD_NUMPY.items() if version.startswith(old))]


def run(version: str, folder: str) -> int:
    """Install one version into ``folder``, run the tests and the compiles on it; 0 if all went well."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*install, *requirements(version)], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
    show = "import triton, numpy; print('Triton', triton.__version__, 'numpy', numpy.__version__)"
    subprocess.run([sys.executable, "-c", show], check=True, env=environment, cwd=ROOT)
    files = sorted(path for pattern in TESTS for path in (ROOT / "tests").glob(f"{pattern}.py"))
    command = [sys.executable, "-m", "pytest", "-m", "", "-q", "-p", "no:cacheprovider", *map(str, files)]
    tests = subprocess.run(command, env=environment, cwd=ROOT).returncode
    compiles = [sys.executable, "-m", "bench.kernel_resources"]
    done = subprocess.run(
        compiles, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    print(done.stderr, end="")
    return tests or "Traceback" in done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    failed = []
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as folder:
            if run(version, folder):
                failed.append(version)
    print("failed: " + ", ".join(failed) if failed else "all versions passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
