"""Where a judge is asked, and how a request can fail."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from rcgrpo_jax.errors import UserError


class Unanswered(Exception):
    """A request came to nothing; the message is the cause.

    Args:
        cause: One line.
        status: The HTTP status, where there was one.
    """

    def __init__(self, cause: str, status: int | None = None):
        super().__init__(cause)
        self.status = status


class Busy(Unanswered):
    """No server is there, or none has room: worth waiting for."""


class Fault(Unanswered):
    """A server has failed at this request: worth a few attempts."""


def parse_urls(text: str) -> list[str]:
    """The addresses in a list with commas.

    Raises:
        UserError: One is no plain http or https address, or there is none.
    """
    found = [url.strip().rstrip("/") for url in text.split(",")]
    for url in found:
        try:
            parts = urlsplit(url)
            plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            parts, plain = None, False
        secret = "@" in url or "?" in url or "#" in url
        if not plain or secret:
            shown = "an address with more than host, port and path" if secret else repr(url)
            raise UserError(
                f"urls: {shown} found; addresses such as http://localhost:8000/v1, with commas, were wanted.",
                "Correct `urls`. A token belongs into the environment variable that `token_variable` names.",
            )
    return list(dict.fromkeys(found))


def read_token(variable: str) -> str:
    """The bearer token in an environment variable; "" where none is named.

    Raises:
        UserError: It holds no token. The message has neither its name nor its value: either may be the token itself.
    """
    token = os.environ.get(variable, "") if variable else ""
    if variable and not re.fullmatch("[!-~]+", token):
        raise UserError(
            "token_variable: an environment variable with a token was wanted; it is not set, empty, or has spaces.",
            "Set the variable, and give its name; leave token_variable empty to send no token.",
        )
    return token
