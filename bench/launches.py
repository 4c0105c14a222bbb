"""How many launches a step costs: a model's own forward in a plain loop, and the engine by the type of the step.

    python -m bench.launches [--out FILE]

A model of DiT-XL/2's 28 layers and tiny width, one guided sample. Counted are every Triton launch and every ATen
operation that is not a view, on any device; without a GPU the kernels run in Triton's interpreter. The plain loop calls
``forward_with_cfg`` of this package's own module of the original's layout, leaner than the original's code, and takes
an eager DDPM step with learned-range variance, its coefficients plain numbers. Beside what was counted as it ran stands
what programs say (`bench.program_launches`): of the same kinds of step, of the named tables and of steps that reuse
some layers. It writes bench/results/launches.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from bench.launch_count import Launches, count_trajectory, few_programs
from bench.program_launches import by_kind, counted
from bench.telemetry import telemetry
from ebcache_fast.models import DiT, as_denoiser
from ebcache_fast.plan import Plan, StepType

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "launches.json"
LAYERS = 28
NO, ATTENTION, ATTN_MLP = StepType.NO_CACHE, StepType.ATTENTION, StepType.ATTN_MLP
# The first dispatch of a kind allocates what it works in; the second is what counts.
TYPES = (NO, ATTENTION, ATTN_MLP, NO, ATTENTION, *[ATTN_MLP] * 4)
DISPATCHES = {3: "NO_CACHE", 4: "ATTENTION", 8: "ATTN_MLP", 5: "a run of 3 ATTN_MLP"}  # by its first step


def make_model(device: torch.device, layers: int) -> DiT:
    """Many layers of little width."""
    model = DiT(input_size=8, patch_size=4, in_channels=4, hidden_size=16, depth=layers, num_heads=2, num_classes=5)
    return model.eval().to(device)


@torch.no_grad()
def plain_step(model: nn.Module, device: torch.device) -> dict[str, Counter[str]]:
    """What one step of a plain loop launches: the model's forward, and the sampler's step."""
    x, t = torch.randn(1, 4, 8, 8, device=device), torch.full((2,), 500, device=device)
    pair, y = torch.cat([x, x]), torch.tensor([1, 5], device=device)
    found = {}
    with Launches() as forward:
        out = model.forward_with_cfg(pair, t, y, 1.5)
    found["forward"] = forward.counts
    with Launches() as update:
        ddpm_step(x, out[:1], alpha_bar=0.5)
    found["sampler"] = update.counts
    return found


def ddpm_step(x: Tensor, out: Tensor, alpha_bar: float) -> Tensor:
    """One DDPM step from x (N, C, H, W) by a model's output (N, 2 C, H, W), written operation by operation.

    Source: Ho et al., arXiv 2006.11239, eq. 7; the variance Nichol and Dhariwal's, arXiv 2102.09672, eq. 15.
    """
    beta, before = 0.01, alpha_bar / 0.99
    eps, v = out.chunk(2, dim=1)
    share = (v + 1) / 2
    log_variance = share * math.log(beta) + (1 - share) * math.log(beta * (1 - before) / (1 - alpha_bar))
    x0 = x / math.sqrt(alpha_bar) - math.sqrt(1 / alpha_bar - 1) * eps
    from_x0, from_x = math.sqrt(before) * beta / (1 - alpha_bar), math.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
    mean = from_x0 * x0 + from_x * x
    return mean + torch.exp(log_variance / 2) * torch.randn_like(x)


def measure(device: torch.device, layers: int) -> dict[str, Any]:
    """Every count, with its operations by name."""
    model = make_model(device, layers)
    before = plain_step(model, device)
    shape = as_denoiser(model).shape
    plan = Plan.from_types(TYPES, range(len(TYPES), 0, -1), shape.sites)
    with few_programs():
        engine = count_trajectory(model, TYPES)
    return {
        "layers": layers,
        "before": {part: told(counts) for part, counts in before.items()},
        "after": {name: told(engine[first]) for first, name in DISPATCHES.items()},
        "by_program": by_kind(plan, shape),
        **counted(),
    }


def told(counts: Counter[str]) -> dict[str, Any]:
    """Their total, and the most frequent first."""
    return {"launches": counts.total(), "by_name": dict(counts.most_common())}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not triton.knobs.runtime.interpret:  # read when kernels are defined
        command = [sys.executable, "-m", "bench.launches", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT).returncode
    found = measure(device, args.layers)
    for name, part in (*found["before"].items(), *found["after"].items()):
        print(f"{name}: {part['launches']}")
    for name, table in found["tables"].items():
        print(f"{name}: {table['a_step']:.1f} a step")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found | {"telemetry": telemetry()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
