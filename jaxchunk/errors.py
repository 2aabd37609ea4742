"""The error that means "the input is wrong", as opposed to "the program is wrong"."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what was given, what is needed. Scripts print it without a traceback and
    exit with status 2.
    """


class RunFailedError(RuntimeError):
    """A run came to an end that no input explains, such as a loss that is not finite; what it recorded is kept."""


def first_line(error: BaseException, *, with_type: bool = False) -> str:
    """What an error says, without the page that may follow its first line; its type where it says nothing."""
    lines, kind = str(error).strip().splitlines(), type(error).__name__
    if not lines:
        return kind
    return f"{kind}: {lines[0]}" if with_type else lines[0]


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """For scripts: one line on stderr and an exit status in place of a traceback.

    Status 2 for an `InputError`, 1 for a `RunFailedError`, 130 for Ctrl-C.
    """
    try:
        yield
    except (InputError, RunFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
