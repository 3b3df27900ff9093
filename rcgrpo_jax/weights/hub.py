"""Models by their names on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rcgrpo_jax.errors import UserError


def local_path(source: str, patterns: Sequence[str]) -> Path:
    """A path as it is, or the folder that the hub gives for `owner/name` where nothing lies at that path.

    Args:
        source: A path, or a name on the hub.
        patterns: Of the files to download.

    Raises:
        UserError: The hub did not give it.
    """
    path = Path(source).expanduser()
    return _download(source, patterns) if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source) else path


def _download(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: not a local path, and the hub did not give it ({reason}).",
            "Check the name; for a gated model accept its licence and run `hf auth login`, or download it by hand.",
        ) from None
