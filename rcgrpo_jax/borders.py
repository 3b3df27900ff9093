"""What comes from outside, checked once where it enters: JSON against a type, sizes against this machine's memory."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, TypeVar

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.filetypes import LFS_POINTER, LFS_REMEDY, describe

T = TypeVar("T")
DEEPEST = 100  # levels of lists and objects within each other; pydantic follows twice as many
STRICT: Any = {"strict": True, "allow_inf_nan": False}  # pydantic's options for values that nobody may reinterpret


def parse_json(text: str | bytes) -> Any:
    """Reads a JSON text.

    Raises:
        ValueError: If it is not JSON or not UTF-8, or is nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def conform(value: Any, kind: type[T] | Any, where: str, remedy: str) -> T:
    """Checks a value against a type, and returns it as that type: no text or switch is a number, 8.0 is no count.

    Args:
        value: Of JSON: dicts, lists, texts, numbers, booleans, None.
        kind: A type as pydantic takes it: `dict[str, float]`, `Annotated[int, Gt(0)]`; a dataclass or TypedDict says
            `__pydantic_config__ = STRICT` itself.
        where: The file, for the message.
        remedy: What to do about it.

    Raises:
        UserError: With a line for every field that is not of its type: its place, what was found, what was wanted.
    """
    from pydantic import ValidationError

    parts = value.items() if isinstance(value, dict) else [("the whole", value)]
    if deep := [name for name, part in parts if _is_deeper(part, DEEPEST)]:
        raise UserError(f"{where}: {deep[0]}: lists or objects in more than {DEEPEST} others found.", remedy)
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)  # as JSON, in which a tuple is a list
    except ValidationError as error:
        problems = [_problem(found) for found in error.errors(include_url=False)]
        joined = f" {problems[0]}" if len(problems) == 1 else "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{where}:{joined}.", remedy) from None


@functools.lru_cache  # to make one takes far longer than to use it
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind, config=None if hasattr(kind, "__pydantic_config__") else STRICT)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more than so many levels."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(part, levels - 1) for part in inner)


def _problem(found: Any) -> str:
    place = ".".join(map(str, found["loc"])) or "the whole"
    wanted = found["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return f"{place}: {shorten(found['input'])} found, {wanted} wanted"


def is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the type of a default: an int is a float too, a list a tuple, and no switch is a number."""
    kinds = {float: (float, int), tuple: (tuple, list)}.get(type(default), type(default))
    return isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)


def shorten(value: Any, length: int = 60) -> str:
    """A value as a message shows it, cut if it is long."""
    try:
        text = repr(value)
    except RecursionError:
        text = "endless nesting"
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = "an endless number"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: If there is no such file, or it holds no JSON object.
    """
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.", remedy) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).", remedy) from None
    except ValueError as error:
        kind = describe(path)
        raise UserError(f"{path}: not JSON ({kind or error}).", LFS_REMEDY if kind == LFS_POINTER else remedy) from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: {shorten(found)} found; a JSON object was wanted.", remedy)
    return found


def memory_bytes() -> int:
    """What arrays can take here at most: the memory of this machine and of the devices that JAX has opened.

    Where processes share a run, each holds its part: the sum over all of them counts.
    """
    import jax
    import psutil

    total = psutil.virtual_memory().total
    for device in jax.local_devices():
        if device.platform != "cpu":
            total += (device.memory_stats() or {}).get("bytes_limit", 0)
    return total * jax.process_count()


def check_memory(what: str, needed: int, remedy: str) -> None:
    """Refuses what cannot fit, before any work on it starts.

    Args:
        what: The field and its value, as in "data.size: 1000000 x 1000000".
        needed: Bytes of the arrays that cannot be done without.
        remedy: What to do about it.

    Raises:
        UserError: If they are more than `memory_bytes`.
    """
    if needed > (there := memory_bytes()):
        raise UserError(
            f"{what} takes {needed / 2**30:,.1f} GiB at least; this machine has {there / 2**30:,.1f} GiB.", remedy
        )
