"""The error that means "the input is wrong", as opposed to "the program is wrong"."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what was given, what is needed. Scripts print it without a traceback and
    exit with status 2.
    """


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns an `InputError` into one line on stderr and exit status 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
