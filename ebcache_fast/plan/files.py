"""Writing files so that a reader finds the old one or the new one, never half."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from ebcache_fast.errors import EBCacheError, JobError


@contextmanager
def replacing(path: Path, raises: type[EBCacheError] = JobError) -> Iterator[Path]:
    """A partial file to write; it takes the place of ``path`` when all went well, else it is removed.

    What the system refuses becomes an error of the type ``raises`` that names ``path``; so does a place that holds
    something other than a file.
    """
    partial = path.parent / f".{secrets.token_hex(8)}.partial"
    try:
        if "\0" in str(path):
            raise OSError("embedded null byte")
        if path.exists() and not path.is_file():
            raise OSError("it is there and not a regular file")
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise raises(f"{path}: can't be written: {error.strerror or error}; choose another path") from None
    finally:
        with suppress(OSError, ValueError):
            partial.unlink()


def make_folder(folder: Path) -> None:
    """Create ``folder`` if need be and see that files can be made in it; JobError if not, before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{folder} can't be made: {error.strerror}; choose another folder") from None
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:  # permissions don't bind root, but some folders take no file of anybody's
        raise JobError(f"{folder} is not writable: {error.strerror}; choose another folder") from None


def make_room(path: Path) -> None:
    """Create the folder of ``path`` if need be and see that a file can be written there; JobError if not."""
    make_folder(path.parent)
    if path.is_dir():
        raise JobError(f"{path} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise JobError(f"{path} can't be written: it is there and not a regular file; choose another path")
