"""What many tests have by one name."""

from pathlib import Path

import torch

from ebcache_fast.plan import Branch, StepType

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
NO, ATTENTION, ATTN_MLP, MLP, *_ = StepType  # NO_CACHE, and what the others reuse
BRANCHES = (Branch.SELF_ATTN, Branch.MLP)
