"""Errors that a user can act on, and the end of a program by an error."""

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
    elsewhere = False  # whether another process reports it

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
    """A temporary failure, such as a lost connection: job scripts start the same command again."""

    status = 75  # EX_TEMPFAIL


def not_finite(network: str) -> UserError:
    """The error of a network whose output is not finite: it would become black images, or any tokens."""
    return UserError(
        f"the {network} gave values that are not finite: see that its weights are, then try precision fp32, or a lower "
        "cfg_scale or temperature"
    )


def report(program: str, error: BaseException) -> int:
    """Report on stderr the error that ended `program`, in one line where the user can act on it; the exit status."""
    if isinstance(error, UserError):
        if not error.elsewhere:
            print(f"{program}: {error}", file=sys.stderr)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        print(f"{program}: interrupted; the same command resumes where it stopped", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `given`, or the empty string when none is close."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates as escapes, since names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
