"""Writing files so that a reader finds the old one or the new one, never half."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ebcache_fast.errors import JobError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A partial file to write; it takes the place of ``path`` when all went well, else it is removed.

    An OSError becomes a JobError that names ``path``.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise JobError(f"{path} can't be written: {error.strerror or error}; choose another place") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def make_folder(folder: Path) -> None:
    """Create ``folder`` if need be and see that files can be made in it; JobError if not, before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{folder} can't be made: {error.strerror}; choose another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise JobError(f"{folder} is not writable; choose another folder")


def make_room(path: Path) -> None:
    """Create the folder of ``path`` if need be and see that a file can be written there; JobError if not."""
    make_folder(path.parent)
    if path.is_dir():
        raise JobError(f"{path} is a folder; name a file in it")
