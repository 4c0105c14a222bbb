"""The strict JSON that tables are kept in: read exactly or not at all, laid out for people."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ebcache_fast.errors import TableError
from ebcache_fast.plan import shown
from ebcache_fast.plan.files import replacing

NPY = b"\x93NUMPY"
MAX_BYTES = 4 * 2**20  # far above any real table: a wrong path must not fill the memory


class Rows(list[Any]):
    """Strings or short lists that are laid out one a line."""


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Put the name of ``source`` before the message of a TableError raised inside."""
    try:
        yield
    except TableError as error:
        raise TableError(f"{source}: {error}") from None


def is_npy(path: str | os.PathLike[str]) -> bool:
    """True if a file begins as numpy's arrays do; False for no file at all."""
    try:
        with open(path, "rb") as file:
            return file.read(len(NPY)) == NPY
    except (OSError, ValueError):
        return False


def read_bytes(source: Traversable) -> bytes:
    """Read a file of at most 4 MiB; TableError with the reason where it can't be read."""
    try:
        with source.open("rb") as file:
            raw: bytes = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise TableError(f"can't be read: {_reason(error)}") from None
    if len(raw) > MAX_BYTES:
        raise TableError(f"expected a table of at most {MAX_BYTES} bytes, got more")
    return raw


def read_json(source: Traversable) -> dict[str, Any]:
    """The JSON object that a file holds; TableError for all else, and for a repeated key."""
    try:
        document = json.loads(read_bytes(source).decode("utf-8"), object_pairs_hook=_without_repeats)
    except TableError:
        raise
    except (ValueError, RecursionError) as error:
        raise TableError(f"expected strict JSON: {error}") from None
    if not isinstance(document, dict):
        raise TableError(f"expected a JSON object, got {shown(document)}")
    return document


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise TableError(f"{key_shown(name)}: expected once, got {times} times")
    return document


def write_json(path: str | os.PathLike[str], document: dict[str, Any]) -> None:
    """Put ``document`` in the place of the file, wholly or, with a TableError, not at all, as where it is too large."""
    text = _layout(document) + "\n"
    if len(text) > MAX_BYTES:
        raise TableError(f"{path}: expected a table of at most {MAX_BYTES} bytes, got {len(text)}; nothing is written")
    with replacing(Path(path), TableError) as partial:
        partial.write_text(text, encoding="ascii")


def key_shown(name: str) -> str:
    """A key of the file as it may stand in a message: on one line, not too long."""
    return repr(name)[1:-1][:80]


def _layout(value: object, indent: str = "") -> str:
    """JSON with one key a line and every list on one line, but for lists of objects and `Rows`."""
    if isinstance(value, list) and value and (isinstance(value, Rows) or all(isinstance(item, dict) for item in value)):
        inner = indent + "  "
        return "[\n" + ",\n".join(inner + _layout(item, inner) for item in value) + f"\n{indent}]"
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    inner = indent + "  "
    lines = (f"{inner}{json.dumps(key)}: {_layout(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
