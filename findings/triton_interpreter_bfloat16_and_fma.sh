#!/bin/sh
# Triton 3.7.1, TRITON_INTERPRET=1 on a CPU: what kernels compute there and not when they are compiled.
#
# Expected: the interpreter computes what compiled code does, but slowly, or refuses what it can't.
# Happens: bfloat16 numbers are loaded and stored rightly, and their sums are those of their bits as integers: 1 + 1 is
# 1.7e38, with no error and no warning. A float32 that is cast to bfloat16 is cut off instead of rounded to nearest.
# And tl.fma rounds twice, as x * y + z does, where a fused multiply-add by its definition rounds once.
# Matters: kernels that are tested without a GPU: a bfloat16 test is meaningless there, and tests of a last bit pass
# with the wrong arithmetic.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 triton==3.7.1

cat >"$folder/kernels.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def add(x, y, out, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))


@triton.jit
def cast(x, out, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


@triton.jit
def fma(x, y, z, out, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


one, total = torch.ones(2, dtype=torch.bfloat16), torch.empty(2, dtype=torch.bfloat16)
add[(1,)](one, one, total, 2)
print(f"triton {triton.__version__}: 1 + 1 in bfloat16 is {float(total[0]):g}")

exact, rounded = torch.tensor([1.00782, 1.0119]), torch.empty(2, dtype=torch.bfloat16)
cast[(1,)](exact, rounded, 2)
print(f"{exact.tolist()} as bfloat16: {rounded.tolist()}, of torch: {exact.bfloat16().tolist()}")

torch.manual_seed(0)
x, y, z = (torch.randn(1024) for _ in range(3))
out = torch.empty(1024)
fma[(1,)](x, y, z, out, 1024)
once = (x.double() * y.double() + z.double()).float()
print(f"fma rounds once: {torch.equal(out, once)}, twice: {torch.equal(out, x * y + z)}")

assert float(total[0]) > 1e38
assert rounded[1] < exact.bfloat16()[1]
assert torch.equal(out, x * y + z) and not torch.equal(out, once)
PYTHON
TRITON_INTERPRET=1 "$folder/env/bin/python" "$folder/kernels.py"
