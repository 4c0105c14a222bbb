"""The command line: parse, call, print. Each command has a file; what it does stands in the modules it calls."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper

from ebcache_fast.apps.cli.parser import COMMANDS, parse
from ebcache_fast.errors import EBCacheError

__all__ = ["COMMANDS", "main"]

# Exit codes. UNREAD: whoever read the output has stopped; rich ends a program so too.
UNREAD, BAD_INPUT, INTERRUPTED = 1, 2, 130
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # what torch's RuntimeErrors say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for what it can't do, 130 if interrupted, 1 if nobody reads on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # what an encoding lacks is no reason to end
    try:
        try:
            parse(sys.argv[1:] if arguments is None else arguments)()
        finally:
            if sys.stdout is not None:  # else it was closed before the start
                sys.stdout.flush()  # here, where what is wrong can be told
    except EBCacheError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _give_up_output()
        return UNREAD
    except OSError as error:
        _give_up_output()
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}; make room, or choose another place")
    except (MemoryError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "no more is said")
        if not isinstance(error, MemoryError) and not any(words in reason for words in NO_MEMORY):
            raise
        return _fail(f"out of memory ({reason:.200}); run fewer samples at once, or a smaller model")
    return 0


def _fail(message: str) -> int:
    with suppress(OSError):
        print("ebcache-fast:", *message.split(), file=sys.stderr)  # one line, whatever a file name holds
    return BAD_INPUT


def _give_up_output() -> None:
    """Let what is still to be written to stdout go nowhere, so that the interpreter's own last flush does not fail."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
