"""What a measurement ran on and in which state: versions, and the GPU's clocks, power, heat and what throttled it.

It goes into every result, at the start and at the end of a run. The GPU's part needs nvidia-ml-py (the extra
``telemetry``); without it, or without a GPU, the dictionary says so and why.
"""

import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from ebcache_fast import __version__

ROOT = Path(__file__).resolve().parents[1]

# The bits of NVML's clock event reasons (nvml.h, nvmlClocksEventReasons); the first two are no throttling.
CLOCK_REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
}
# What is read of a device, given NVML's module and the device's handle.
READINGS: dict[str, Callable[[Any, Any], Any]] = {
    "name": lambda nvml, gpu: nvml.nvmlDeviceGetName(gpu),
    "driver": lambda nvml, gpu: nvml.nvmlSystemGetDriverVersion(),
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "sm_clock_max_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "memory_clock_max_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "power_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "power_limit_watts": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
    "temperature_celsius": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "throttle_reasons": lambda nvml, gpu: reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)),
}


def telemetry() -> dict[str, Any]:
    """Time, versions and the state of the GPU as it is now, ready for JSON."""
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "gpu": gpu_state()}


def versions() -> dict[str, Any]:
    """The software, and the commit it was measured at: of a repository, or as $COMMIT says where there is none."""
    return {
        "ebcache_fast": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": git("rev-parse", "HEAD") or os.environ.get("COMMIT"),
        "changed_files": (git("status", "--porcelain") or "").splitlines(),
    }


def git(*arguments: str) -> str | None:
    """What a git command prints about this repository, or None."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.rstrip("\n")
    return None


def gpu_state() -> dict[str, Any]:
    """``READINGS`` of torch's current GPU; ``available`` false, and ``why``, where NVML can't be asked."""
    try:
        import pynvml
    except ImportError:
        return {"available": False, "why": "pynvml is not there; install nvidia-ml-py to record the GPU's state"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"available": False, "why": f"NVML does not start: {error}"}
    try:
        gpu = current_handle(pynvml)
        return {"available": True} | {name: reading(pynvml, gpu, read) for name, read in READINGS.items()}
    except pynvml.NVMLError as error:
        return {"available": False, "why": f"NVML does not find torch's GPU: {error}"}
    finally:
        pynvml.nvmlShutdown()


def current_handle(nvml: ModuleType) -> Any:
    """NVML's handle of torch's current GPU, by its UUID: CUDA may number GPUs otherwise. Else of the first one."""
    if not torch.cuda.is_available():
        return nvml.nvmlDeviceGetHandleByIndex(0)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")


def reading(nvml: ModuleType, gpu: Any, read: Callable[[Any, Any], Any]) -> Any:
    """One value, or NVML's words for why this GPU does not tell it."""
    try:
        return read(nvml, gpu)
    except nvml.NVMLError as error:
        return f"not told: {error}"


def reasons(bits: int) -> list[str]:
    """The names of the bits; unknown ones in hexadecimal."""
    named = [name for bit, name in CLOCK_REASONS.items() if bits & bit]
    unknown = bits & ~sum(CLOCK_REASONS)
    return [*named, *([hex(unknown)] if unknown else [])]
