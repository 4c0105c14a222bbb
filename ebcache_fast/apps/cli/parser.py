"""Parser of the command line: its words become one call of a command, with its arguments bound."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial, wraps
from io import StringIO
from types import MappingProxyType
from typing import Final

import tyro

from ebcache_fast.apps.cli.calibrate import calibrate
from ebcache_fast.apps.cli.compare import compare
from ebcache_fast.apps.cli.demo import demo
from ebcache_fast.apps.cli.info import info
from ebcache_fast.apps.cli.profile import profile
from ebcache_fast.apps.cli.sample import sample
from ebcache_fast.apps.cli.table import check_table, export_table, import_table, show_table
from ebcache_fast.errors import InputError

RULE = re.compile("[─-]{5,}")  # between the parts of the parser's reports
FRAME = re.compile("[│╭╮╰╯]|\x1b\\[[0-9;]*m")

COMMANDS: Final[Mapping[str, Callable[..., None]]] = MappingProxyType(
    {
        "demo": demo,
        "sample": sample,
        "calibrate": calibrate,
        "compare": compare,
        "profile": profile,
        "table-show": show_table,
        "table-check": check_table,
        "table-import": import_table,
        "table-export": export_table,
        "info": info,
    }
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    """The command that ``words`` ask for, its arguments bound; InputError where they do not fit.

    Raises SystemExit after printing help.
    """
    if (joined := "-".join(words[:2])) in COMMANDS:
        words = [joined, *words[2:]]  # "table show" reads better than the parser's "table-show"
    report = StringIO()
    try:
        with redirect_stderr(report):
            commands = {name: _bound(command) for name, command in COMMANDS.items()}
            call: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(commands, prog="ebcache-fast", args=words)
    except SystemExit as stop:
        if not stop.code:
            raise
        # What the parser has to say stands in a frame: a title, the message, which is all that is kept, and help.
        _, framed, *_ = [*RULE.split(FRAME.sub("", report.getvalue())), ""]
        message = framed.strip(" .\n")
        raise InputError(f"{message}; ebcache-fast --help shows what there is") from None
    return call


def _bound(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """``command`` as the parser sees it, but calling it only binds the arguments."""

    @wraps(command)
    def bind(*args: object, **kwargs: object) -> Callable[[], None]:
        return partial(command, *args, **kwargs)

    return bind
