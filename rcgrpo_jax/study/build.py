"""The page of a study: several makers' edits of the same examples, side by side, without saying whose they are."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from rcgrpo_jax.data.example import Source
from rcgrpo_jax.data.images import resize_image
from rcgrpo_jax.data.paths import printable
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.examples import check_room, read_example
from rcgrpo_jax.evaluation.pictures import check_names, read_common, read_picture, size_of_edits
from rcgrpo_jax.study.records import UNSURE, Key, write_key

QUESTION = "Which edit is the best?"
MOST_MAKERS = 9  # a key of the keyboard each
MOST_BYTES = 200_000_000  # of a page: browsers of phones give up on larger ones
_LOSSLESS, _QUALITY = 256 * 256, 90  # pixels of a picture up to which nothing is lost; WebP's quality of larger ones


class Built(NamedTuple):
    """What was written."""

    study: str  # id
    examples: int
    size: int  # bytes of the page
    key: Path
    alike: list[str]  # names of examples of which two edits are the same in every pixel


def key_file(page: Path) -> Path:
    """Where the key of a page is."""
    return page.with_suffix(".key.json")


def build(
    source: Source,
    makers: Mapping[str, Path],
    page: Path,
    *,
    questions: Sequence[str] = (QUESTION,),
    count: int | None = None,
    seed: int | None = None,
    size: tuple[int, int] | None = None,
    side: int | None = None,
    most_bytes: int = MOST_BYTES,
    progress: Callable[[], None] = lambda: None,
) -> Built:
    """Writes the page of a study, and its key beside it.

    The page has nothing of the makers: edits have random ids, and places that differ from example to example
    (`balanced_orders`). All pictures are re-encoded alike, from their pixels alone.

    Args:
        source: The examples.
        makers: Name -> folder with a PNG for each example, named by it.
        page: The HTML file to write.
        questions: That are asked of each example.
        count: Examples, drawn by the seed; all by default.
        seed: Of places, ids and that draw; a new one by default, so that nobody can guess it.
        size: (height, width) of the pictures in pixels. By default that of the edits where `edit_all` made them, else
            that of the first example.
        side: Longer side of the pictures on the page, where they are larger; by default they stay as they are.
        most_bytes: Of the page.
        progress: Called for each example.

    Raises:
        UserError: A picture is missing or of another size, the page would be too large, there is a page or a key of
            another study, memory holds no such pictures, or a file cannot be written.
        UsageError: There are too few examples, too few or too many makers, or a question comes twice.
    """
    makers, questions = {printable(x): folder for x, folder in makers.items()}, [*map(printable, questions)]
    _check(len(source), makers, questions, count)
    _check_new(page)
    seed = secrets.randbits(48) if seed is None else seed
    rng = np.random.default_rng(seed)
    indices = sorted(rng.permutation(len(source))[:count].tolist())
    orders = balanced_orders(len(indices), len(makers), rng)
    size = size or size_of_edits(makers.values()) or source[indices[0]].image.shape[:2]
    check_room(1 + len(makers), size)
    asked = {f"q{i + 1}": text for i, text in enumerate(questions)}
    key = Key(study="", seed=seed, makers=[*makers], questions=asked, examples={})
    alike: list[str] = []

    def trials() -> Iterator[dict[str, Any]]:
        """What the page shows of each example, one at a time: all pictures together are large."""
        for index, order in zip(indices, orders, strict=True):
            example = read_example(source, index, size)
            names = [key["makers"][maker] for maker in order]
            pictures = [read_picture(makers[name], example.name, size) for name in names]
            if len({picture.tobytes() for picture in pictures}) < len(pictures):
                alike.append(example.name)
            own = _id(seed, example.name, example.instruction, example.image)
            edits = {_id(own, place, pictures[place]): name for place, name in enumerate(names)}
            key["examples"][own] = {"name": example.name, "edits": edits}
            urls = [data_url(picture, side) for picture in (example.image, *pictures)]
            shown = {"instruction": example.instruction, "source": urls[0], "edits": urls[1:]}
            yield {"id": own, "shown": shown}
            progress()
        check_names([example["name"] for example in key["examples"].values()])
        key["study"] = _id(asked, key["examples"])

    _write(page, key, trials(), len(indices), most_bytes)
    return Built(key["study"], len(indices), page.stat().st_size, key_file(page), alike)


def balanced_orders(examples: int, makers: int, rng: np.random.Generator) -> Int[np.ndarray, "N M"]:
    """Which maker has which place: `M` makers in `M` places for each of `N` examples.

    The rows are those of random Latin squares, one after the other. Each maker is in each place equally often where N
    is a multiple of M, and otherwise at most once more in one place than in another.

    Args:
        examples: N.
        makers: M.
        rng: Draws the squares.
    """
    cyclic = np.add.outer(np.arange(makers), np.arange(makers)) % makers
    squares = [  # columns and rows of the cyclic one in random order: each row by itself is a random permutation
        rng.permutation(cyclic[:, rng.permutation(makers)]) for _ in range(-(-examples // makers))
    ]
    return np.concatenate(squares)[:examples]


def _id(*parts: Any) -> str:
    """What the page calls something, by its content: pages of one seed and other pictures have other ids."""
    content = b"|".join(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode() for part in parts)
    return hashlib.sha256(content).hexdigest()[:16]


def data_url(image: UInt8[np.ndarray, "H W 3"], side: int | None = None) -> str:
    """A picture as the address that holds it: WebP of its pixels alone, lossless up to 256 x 256 of them.

    Args:
        image: The picture.
        side: Most pixels of its longer side.
    """
    if side and (longest := max(image.shape[:2])) > side:
        image = resize_image(image, tuple(max(1, round(length * side / longest)) for length in image.shape[:2]))
    file = io.BytesIO()
    lossless = image.shape[0] * image.shape[1] <= _LOSSLESS
    Image.fromarray(image).save(file, "WEBP", lossless=lossless, quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _check(examples: int, makers: Mapping[str, Path], questions: Sequence[str], count: int | None) -> None:
    if not examples or examples < (count or 0):
        raise UsageError(
            f"--data: {examples} examples found; {count or 'one'} at least were wanted.", "Lower --count, or add more."
        )
    if not 2 <= len(makers) <= MOST_MAKERS:
        raise UsageError(
            f"--pictures: {len(makers)} folders found; 2 to {MOST_MAKERS} were wanted.", "Name a folder for each maker."
        )
    if UNSURE in makers:
        raise UsageError(
            f"--pictures: a folder called {UNSURE} found; so is the answer of a voter who is not sure.", "Rename it."
        )
    if len({question.strip() for question in questions}) < len(questions) or not questions:
        raise UsageError(
            f"--question: {', '.join(map(repr, questions)) or 'none'} found; different ones were wanted.",
            "Leave out what comes twice.",
        )
    for folder in makers.values():
        read_common(folder)  # refuses what is no folder


def _check_new(page: Path) -> None:
    """Refuses to replace a page or a key: voters may have the one, and the other may be kept elsewhere."""
    if key_file(page).exists():
        raise _has_key(page)
    if page.exists():
        raise UserError(
            f"{page}: a page found, which voters may have; a new name was wanted.",
            "Choose another --out, or remove that file.",
        )


def _has_key(page: Path) -> UserError:
    return UserError(
        f"{key_file(page)}: the key of a study found; without it, votes on its page cannot be counted.",
        "Choose another --out, or remove that file and its page.",
    )


def _write(page: Path, key: Key, trials: Iterator[dict[str, Any]], count: int, most_bytes: int) -> None:
    """Writes page and key, both or neither."""
    environment = Environment(
        loader=PackageLoader("rcgrpo_jax.study", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip

    def study() -> dict[str, Any]:  # comes after the trials, which fill the key
        shown = {own: [*example["edits"]] for own, example in key["examples"].items()}
        return {"study": key["study"], "questions": key["questions"], "shown": shown}

    parts = environment.get_template("study.html.j2").generate(trials=trials, study=study)
    partial = page.with_name(f".{page.name}.{os.getpid()}.partial")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for part in parts:
                file.write(part.encode())
                if file.tell() > most_bytes:
                    raise _too_large(page, file.tell(), most_bytes, len(key["examples"]), count)
        try:
            write_key(key_file(page), key)
            os.replace(partial, page)
        except FileExistsError:  # another process was first
            raise _has_key(page) from None
        except OSError:
            with suppress(OSError):
                key_file(page).unlink()
            raise
    except OSError as error:
        raise UserError(f"{page}: cannot be written ({error}).", "Choose a file you can write to.") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _too_large(page: Path, size: int, most_bytes: int, done: int, count: int) -> UserError:
    fitting = max(1, int(0.9 * done * most_bytes / size))
    return UserError(
        f"{page}: {size / 1e6:,.0f} MB found after {done} of {count} examples; {most_bytes / 1e6:,.0f} MB at most were "
        "wanted, which browsers can open.",
        f"Show fewer examples (--count {fitting}), or smaller pictures (--side).",
    )
