"""The errors that a user can cause. Each says what was found, what was wanted and what to do."""

import difflib
from collections.abc import Iterable

STOPPED = 143  # exit status of a run that SIGTERM stopped before its end: 128 + SIGTERM


class UserError(Exception):
    """A failure that the user can repair. The command line prints it in two lines and exits with 1.

    Args:
        problem: One line that names the field or file, what was found and what was wanted.
        remedy: One line that says what to do about it.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str):
        # Names of files need not be text, and a message must be fit for any place.
        problem, remedy = (text.encode("utf-8", "backslashreplace").decode() for text in (problem, remedy))
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n{self.remedy}"


class UsageError(UserError):
    """A command line or configuration that cannot be run as it is written. The command line exits with 2."""

    exit_code = 2


class StopRequested(UserError):
    """The run is to stop, and what is under way was given up for that. It is no failure."""


def mark_everywhere(error: Exception) -> Exception:
    """Marks an error that every process of a run raises at the same place, and returns it.

    After such an error all processes are still there, so that collective operations can be used to clean up.
    """
    error.everywhere = True
    return error


def is_everywhere(error: BaseException | None) -> bool:
    """Whether `mark_everywhere` has marked the error."""
    return getattr(error, "everywhere", False)


def reason(error: BaseException, length: int = 200) -> str:
    """The message of a library's exception in one line of at most `length` characters; its type if it has none."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like an unknown one, for "did you mean"; None if none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
