"""Files of Learning-to-Cache's released routers (Ma et al., arXiv 2406.01733), which torch pickled."""

import argparse
import math
import os
import pickle
from pathlib import Path

import torch

from ebcache_fast.errors import TableError
from ebcache_fast.plan import shown

MAX_BYTES = 64 * 2**20  # a thousand times a real router


def read_router(path: str | os.PathLike[str]) -> dict[int, list[float]]:
    """Scores of a released router, a file of torch: the sigmoid of ``routers["INDEX.prob"]`` of each index.

    Only tensors and the options it was trained with are unpickled. Raises TableError, naming the file, for any other.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise TableError(f"{file}: expected a router of at most {MAX_BYTES} bytes")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(f"{file}: is no router of Learning-to-Cache: {first:.160}") from None
    routers = content.get("routers", content) if isinstance(content, dict) else None
    found: dict[int, list[float]] = {}
    for name, tensor in (routers or {}).items():
        index, _, rest = str(name).partition(".")
        if rest != "prob" or not index.isdecimal() or not isinstance(tensor, torch.Tensor) or tensor.ndim != 1:
            raise TableError(f"{file}: routers: expected vectors named INDEX.prob, got {shown(name)}")
        found[int(index)] = [1 / (1 + math.exp(-min(max(value, -60.0), 60.0))) for value in tensor.double().tolist()]
    if sorted(found) != list(range(len(found))) or not found:
        raise TableError(f"{file}: routers: expected indices from 0 on, got {shown(sorted(found))}")
    return found
