"""Samples of a calibration: prompts in the place of labels, and what is said of one that fails."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ebcache_fast.errors import InputError, JobError
from ebcache_fast.models import Conditioning

SHOWN_LETTERS = 80  # of a prompt in a message


@dataclass(frozen=True)
class Prompted:
    """Stand-in for labels in a model that has none: the conditioning of prompts, and the shape of their latents."""

    latents: tuple[int, ...]  # the shape of one
    context_of: Callable[
        [range], Conditioning
    ]  # of these samples; under guidance of as many unconditional rows after them
    checksum: int  # of the call that it comes from
    prompts: tuple[str, ...] = ()  # which the samples take in turn


class SampleError(Exception):
    """Failure of one sample of a batch, or of none in particular; the message says how it stopped the batch."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def error_of(indices: range, fault: SampleError, labels: Tensor, prompts: tuple[str, ...]) -> InputError | JobError:
    """The error to raise where one sample of these, or the batch as a whole, could not take part."""
    if fault.row is None:
        samples = f"sample {indices[0]}" if len(indices) == 1 else f"samples {indices[0]} to {indices[-1]}"
        return JobError(f"{samples}: {fault}; votes before are kept where there is a progress_file: repeat the call")
    k = indices[fault.row]
    who = f"prompt {shown(prompts, k)}" if prompts else f"label {int(labels[k])}"
    return InputError(
        f"sample {k}, {who}: {fault}; use bfloat16 or float32, whose range is wider than float16's, or leave it out"
    )


def shown(prompts: tuple[str, ...], sample: int) -> str:
    """The prompt of a sample, quoted; a long one by its beginning."""
    prompt = prompts[sample % len(prompts)]
    return repr(prompt if len(prompt) <= SHOWN_LETTERS else f"{prompt[:SHOWN_LETTERS]}…")
