"""The command line: parse, call, print. Each command has a file; what it does stands in the modules it calls."""

import sys
from collections.abc import Sequence

from ebcache_fast.cli.parser import COMMANDS, parse
from ebcache_fast.errors import EBCacheError

__all__ = ["COMMANDS", "main"]

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    try:
        parse(sys.argv[1:] if arguments is None else arguments)()
    except EBCacheError as error:
        print("ebcache-fast:", *str(error).split(), file=sys.stderr)  # one line, whatever a file name holds
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
