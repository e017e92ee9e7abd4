"""The error that a user can act on, and how a program ends by an error."""

import difflib
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """A mistake on the user's side; its text says what was given, what was expected and what to type instead.

    The command line prints it as one line without a traceback and exits with its `status`.
    """

    status = 2
    elsewhere = False  # whether another process tells of it

    def __str__(self) -> str:
        return printable(super().__str__())


class SettingError(UserError):
    """A mistake in settings, which a config, a flag and an axis of a grid each spell in their own way.

    Args:
        text: the message, with a `{}` for each setting.
        settings: key and value of each, such as ("sample.steps", 4). The message spells them as a config does.
    """

    def __init__(self, text: str, *settings: tuple[str, Any]) -> None:
        self.text, self.settings = text, settings
        super().__init__(self.spelled(_as_in_a_config))

    def spelled(self, spell: Callable[[str, Any], str]) -> str:
        """The message with each setting as `spell(key, value)`."""
        return self.text.format(*(spell(key, value) for key, value in self.settings))


def _as_in_a_config(key: str, value: Any) -> str:
    return f"{key}=[{','.join(map(str, value))}]" if isinstance(value, list) else f"{key}={value}"


class PassingError(UserError):
    """What may be over when the same command is started again, such as a lost connection: job scripts do start it."""

    status = 75  # EX_TEMPFAIL


def report(program: str, error: BaseException) -> int:
    """Tell on stderr what ended `program`, and give the exit status: one line for what the user can act on."""
    if isinstance(error, UserError):
        if not error.elsewhere:
            print(f"{program}: {error}", file=sys.stderr)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        print(f"{program}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `given`, or the empty string when none is close."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def printable(text: str) -> str:
    """`text` with control characters, and what is no character at all, written as escapes: names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
