"""A small study: makers' folders, its page and key, and votes as the page saves them."""

import json
from pathlib import Path

import numpy as np

from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.study.build import build, key_file
from rcgrpo_jax.study.records import Key, read_key

SIZE = 48  # pixels a side
MAKERS = ("kontext-base", "kontext-lora", "tealstone")


def examples(count: int = 3) -> Scenes:
    return Scenes("heldout", count, SIZE)


def write_folders(root: Path, count: int = 3, makers: tuple[str, ...] = MAKERS) -> dict[str, Path]:
    """A folder a maker, whose edits are noise of their own over the source."""
    rng = np.random.default_rng(0)
    for maker in makers:
        for example in (examples(count)[i] for i in range(count)):
            noise = rng.integers(0, 40, example.image.shape, np.uint8)
            save_image(root / maker / f"{example.name}.png", np.minimum(example.image, 215) + noise)
    return {maker: root / maker for maker in makers}


def write_study(root: Path, **options) -> tuple[Path, Key]:
    """The page of a study of the three makers, and its key."""
    page = root / "study.html"
    build(examples(), write_folders(root), page, **options)
    return page, read_key(key_file(page))


def make_key(examples: int, makers: tuple[str, ...] = MAKERS, questions: int = 1) -> Key:
    """The key of a study without a page, in which the place of a maker moves by one from example to example."""

    def edits(n: int) -> dict[str, str]:
        order = np.roll(makers, n).tolist()
        return {f"edit{n}-{place}": maker for place, maker in enumerate(order)}

    asked = {f"q{i + 1}": f"Question {i + 1}?" for i in range(questions)}
    shown = {f"example{n}": {"name": f"{n}", "edits": edits(n)} for n in range(examples)}
    return Key(study="a1b2", seed=0, makers=list(makers), questions=asked, examples=shown)


def make_votes(key: Key, voter: str, chosen: list[str | None], question: str = "q1") -> dict:
    """Votes for makers, or None, on the first examples in their order."""
    answers = []
    for (example, shown), maker in zip(key["examples"].items(), chosen, strict=False):
        ids = {other: edit for edit, other in shown["edits"].items()}
        answers.append(
            {"question": question, "example": example, "chosen": maker and ids[maker], "seconds": 2.5,
             "shown": [*shown["edits"]]}
        )  # fmt: skip
    return {"study": key["study"], "voter": voter, "answers": answers}


def write_votes(folder: Path, *votes: dict) -> list[Path]:
    paths = [folder / f"votes{i}.json" for i in range(len(votes))]
    for path, found in zip(paths, votes, strict=True):
        path.write_text(json.dumps(found))
    return paths
