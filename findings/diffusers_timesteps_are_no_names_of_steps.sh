#!/bin/sh
# diffusers 0.42.1: the timesteps that schedulers hand to the model, all with their defaults.
#
# Expected: training steps, numbers from 0 to 1000 that fall; where a solver asks the model twice for a step, the same
# number comes twice, as with Heun's.
# Happens: KDPM2Ancestral's second number is almost the first (749.2504 and 749.25, and at the end 0.00004 and 0):
# neither equal nor apart, though equal as integers. EDMEuler's are log(sigma) / 4, from 1.1 to -1.6, as integers 1, 0,
# 0, 0, -1; IPNDM's fall from 1 to 0.06, as integers 1, 0, 0, 0, 0.
# Matters: caches and tables that are keyed by a timestep, or that tell a new picture from a repeated number, or the
# end of a picture from a number below 1.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1

"$folder/env/bin/python" - <<'PYTHON'
import diffusers

seen = {}
for name in ("HeunDiscrete", "KDPM2AncestralDiscrete", "EDMEuler", "IPNDM"):
    scheduler = getattr(diffusers, name + "Scheduler")()
    scheduler.set_timesteps(5)
    seen[name] = scheduler.timesteps.tolist()
    print(f"diffusers {diffusers.__version__}, {name}: {', '.join(f'{one:.7g}' for one in seen[name])}; "
          f"as integers {scheduler.timesteps.long().tolist()}")
heun, ancestral = seen["HeunDiscrete"], seen["KDPM2AncestralDiscrete"]
assert heun[1::2] == heun[2::2] and len(heun) == len(ancestral) == 9
assert all(0 < first - second < 0.001 for first, second in zip(ancestral[1::2], ancestral[2::2], strict=True))
assert [int(one) for one in seen["EDMEuler"]] == [1, 0, 0, 0, -1] and seen["EDMEuler"][-1] < -1.5
assert [int(one) for one in seen["IPNDM"]] == [1, 0, 0, 0, 0]
PYTHON
