"""The photographs that the scikit-image wheel itself carries (`skimage/data`), so that nothing is downloaded.

- `astronaut.png`: Eileen Collins, by NASA; public domain.
- `chelsea.png`: Chelsea the cat, by Stefan van der Walt; CC0.
- `coffee.png`: a cup at Pikolo Espresso Bar, by Rachel Michetti; CC0.
- `rocket.jpg`: Falcon 9 with DSCOVR, by SpaceX; released into the public domain.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rcgrpo_jax.errors import UserError

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def find_photographs() -> dict[str, Path]:
    """Finds the photographs by name, without importing scikit-image.

    Raises:
        UserError: scikit-image is not installed, or not from its wheel.
    """
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise UserError(
            "scikit-image is not installed; the photographs come with it.", "pip install 'rcgrpo_jax[photo]'"
        )
    files = {name: Path(package.origin).parent / "data" / name for name in NAMES}
    for file in files.values():
        if not file.is_file():
            raise UserError(
                f"{file}: there is no such file; scikit-image's wheel carries it.",
                "Install scikit-image from its wheel: pip install --force-reinstall 'rcgrpo_jax[photo]'",
            )
    return files
