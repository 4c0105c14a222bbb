"""Moments of a device: CUDA events on a GPU, which its stream records as it goes, the host's clock elsewhere."""

import time

import torch

Mark = torch.cuda.Event | float


def mark(device: torch.device) -> Mark:
    """Now, as the device's stream sees it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Between two marks of one device, which the host waits for."""
    if isinstance(start, torch.cuda.Event):
        end.synchronize()  # type: ignore[union-attr]
        return start.elapsed_time(end) / 1e3  # type: ignore[arg-type]
    return end - start  # type: ignore[operator]
