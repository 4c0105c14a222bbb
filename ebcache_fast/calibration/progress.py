"""The file in which a calibration counts its finished batches, so that the same call can resume."""

import json
import os
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebcache_fast.calibration.tally import Tally
from ebcache_fast.errors import JobError
from ebcache_fast.plan.files import replacing

Array = NDArray[np.float64]
SHOWN = 4  # differences from another call that are named


class CalibrationProgress:
    """Tallies by the threshold they were counted with, or a path's sums: JSON, replaced whole after every batch.

    Without a path nothing is read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)
        self._content: dict[str, Any] = {"call": {}, "tallies": {}}

    def open(self, call: dict[str, Any]) -> None:
        """Read the file if it is there; JobError unless it was written by a call of the same arguments."""
        found = self._load(call)
        differing = [
            f"{name} {reprlib.repr(found['call'].get(name))}, not {reprlib.repr(call.get(name))}"
            for name in [*call, *sorted(found["call"].keys() - call.keys())]
            if found["call"].get(name) != call.get(name)
        ]
        if differing:
            more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
            raise JobError(
                f"{self._path} belongs to a calibration with {'; '.join(differing[:SHOWN])}{more}; "
                "repeat that call, or choose another progress file"
            )
        self._content = found

    def read(self, key: str, steps: int) -> Tally:
        """The tally counted so far under ``key``; JobError unless it is a whole one of ``steps`` steps."""
        entry = self.entry(key)
        if entry is None:
            return Tally.empty(steps)
        try:
            votes, errors = np.array(entry["votes"], np.int64), np.array(entry["errors"], np.float64)
            tally = Tally(votes, errors, int(entry["samples"]))
            shaped = votes.shape == errors.shape == (steps, 3)
            counted = shaped and (votes >= 0).all() and (votes.sum(axis=1) == tally.samples).all()
            if not counted or not ((errors >= 0) & (errors < np.inf)).all():
                raise ValueError(f"it is not of {steps} steps and {tally.samples} samples")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise JobError(f"{self._path}: tally {key!r} is damaged ({error}); delete the file") from None
        return tally

    def write(self, key: str, tally: Tally) -> None:
        """Record ``tally`` under ``key``, as `record` does."""
        self.record(key, {"samples": tally.samples, "votes": tally.votes.tolist(), "errors": tally.errors.tolist()})

    def entry(self, key: str) -> Any:
        """Value recorded under ``key``; None where nothing was."""
        return self._content["tallies"].get(key)

    def read_array(self, key: str, *shapes: tuple[int, ...]) -> tuple[int, list[Array]]:
        """The samples and the arrays recorded under ``key``; zeros of no samples where nothing was.

        Raises JobError unless they are finite, and of these shapes.
        """
        entry = self.entry(key)
        if entry is None:
            return 0, [np.zeros(shape) for shape in shapes]
        try:
            samples, arrays = int(entry["samples"]), [np.array(values, np.float64) for values in entry["arrays"]]
            if [array.shape for array in arrays] != list(shapes) or not all(np.isfinite(a).all() for a in arrays):
                raise ValueError(f"it has not the finite numbers of {' and '.join(map(str, shapes))}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise JobError(f"{self._path}: entry {key!r} is damaged ({error}); delete the file") from None
        return samples, arrays

    def write_array(self, key: str, samples: int, *arrays: Array) -> None:
        """Record arrays of so many samples, as `write` does."""
        self.record(key, {"samples": samples, "arrays": [array.tolist() for array in arrays]})

    def record(self, key: str, value: object) -> None:
        """Record what JSON can hold under ``key``: the old file stays until the new one is whole.

        Raises JobError where it can't be written.
        """
        self._content["tallies"][key] = value
        if self._path is not None:
            with replacing(self._path) as partial:
                partial.write_text(json.dumps(self._content))

    def _load(self, call: dict[str, Any]) -> dict[str, Any]:
        """The file's content; where there is none, that of a file of ``call`` without tallies."""
        if self._path is None:
            return {"call": call, "tallies": {}}
        try:
            if self._path.exists() and not self._path.is_file():
                raise OSError("it is there and not a regular file")  # a device may have no end
            found = dict(json.loads(self._path.read_text()))
            if not all(isinstance(found[name], dict) for name in ("call", "tallies")):
                raise ValueError("wrong layout")
        except FileNotFoundError:
            return {"call": call, "tallies": {}}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise JobError(
                f"{self._path} is not a calibration's progress file ({reason}); choose another path"
            ) from None
        return found
