"""The errors a user can cause, each with what was found, what was wanted and the way out."""

import difflib
from collections.abc import Iterable

STOPPED = 143  # 128 + SIGTERM: the exit status of a run that was stopped before its end


class UserError(Exception):
    """A failure that the user can mend; the command line prints it in two lines and exits with 1.

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
    """A command line or configuration that cannot be run as written; exit code 2."""

    exit_code = 2


def everywhere(error: Exception) -> Exception:
    """Marks an error that every process of a run raises at the same place: none of them is gone."""
    error.everywhere = True
    return error


def is_everywhere(error: BaseException | None) -> bool:
    """Whether the error was marked so."""
    return getattr(error, "everywhere", False)


def reason(error: BaseException, length: int = 200) -> str:
    """What an exception of a library says, in one line; its type where it says nothing."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that one which is not known was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
