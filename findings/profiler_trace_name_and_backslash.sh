#!/bin/sh
# torch 2.13.0, torch.profiler on Linux: what export_chrome_trace(path) writes, and where.
#
# Expected: a file at `path`, or an exception; a path that ends in .gz gives the same JSON, compressed. Nothing in it
# depends on what it is called.
# Happens: the file's name stands inside it, as "traceName". With .gz it is the name of a temporary file, another at
# each export and gone by then. A backslash, which Linux allows in a name, is taken for a slash: for "a\b.json" the
# file stays "a\b.json.tmp" because there is no folder "a", one line goes to stderr, and the call returns as if all
# were well.
# Matters: writing to a partial name and renaming leaves the partial name inside; equal traces have unequal files; a
# program says that it wrote a trace, and there is none.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy

mkdir "$folder/traces"
cd "$folder/traces"
"$folder/env/bin/python" - <<'PYTHON'
import gzip
import json
import os

import torch
from torch.profiler import ProfilerActivity, profile


def export(path: str) -> object:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(4) + 1
    return profiler.export_chrome_trace(path)


def name_in(path: str) -> str:
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
        return json.load(file)["traceName"]


for path in ("one.json", "two.json.gz"):
    export(path)
    print(f"torch {torch.__version__}: {path} has traceName {name_in(path)}")
assert name_in("one.json") == "one.json"
assert os.path.basename(name_in("two.json.gz")) != "two.json.gz" and not os.path.exists(name_in("two.json.gz"))

backslash = "a\\b.json"
returned = export(backslash)
there = sorted(os.listdir("."))
print(f"exporting to {backslash} returned {returned}; files are {', '.join(there)}")
assert there == ["a\\b.json.tmp", "one.json", "two.json.gz"]
PYTHON
