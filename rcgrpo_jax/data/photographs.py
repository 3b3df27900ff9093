"""A small folder of examples to try the package on: real photographs with hand-traced regions and recolouring edits.

The photographs are the four that the scikit-image wheel itself carries (`skimage/data`), so nothing is downloaded:
  - `astronaut.png`: Eileen Collins, by NASA; public domain.
  - `chelsea.png`: Chelsea the cat, by Stefan van der Walt; CC0.
  - `coffee.png`: a cup at Pikolo Espresso Bar, by Rachel Michetti; CC0.
  - `rocket.jpg`: Falcon 9 with DSCOVR, by SpaceX; released into the public domain.
They are copied as they are; the outlines below are this package's own.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from rcgrpo_jax.errors import UserError

# Polygons in pixels of their photograph, written as the `points` of an SVG polygon: "x,y x,y ...".
_SUIT = (
    "112,206 98,222 74,239 57,262 44,285 38,305 30,328 25,354 23,380 21,400 20,417 24,436 24,469 33,495 41,511 110,511 "
    "114,504 122,496 138,488 157,485 160,481 154,466 164,463 176,465 187,473 194,487 194,499 188,511 280,511 278,501 "
    "276,487 276,469 278,451 281,435 286,419 292,409 293,400 298,390 306,385 319,370 329,362 340,357 348,354 365,348 "
    "360,340 360,326 355,305 349,285 345,275 335,259 315,241 305,236 305,252 300,265 292,279 279,288 259,293 236,294 "
    "213,290 194,283 171,272 154,260 141,249 126,228 115,213"
)
_PATCH = (
    "171,349 186,352 199,361 206,374 208,386 205,401 196,414 184,421 171,423 156,420 144,411 136,399 134,386 137,371 "
    "145,359 157,351"
)
_NAME_TAG = "278,339 326,346 329,361 319,370 315,377 284,373"
_LEFT_STRAP = (
    "231,299 241,296 252,299 250,317 252,333 251,347 250,377 247,411 247,436 248,446 254,447 256,456 255,472 250,475 "
    "243,472 242,465 244,452 240,440 238,417 239,387 242,345 239,325 239,321 242,316 240,309 231,303"
)
_RIGHT_STRAP = (
    "252,323 262,336 268,351 273,380 274,420 275,469 276,511 257,511 259,475 255,460 257,433 261,414 260,385 256,355 "
    "252,336"
)
_BUCKLE = "226,489 227,475 234,468 242,465 242,469 237,475 238,487 243,497 246,506 248,511 226,511 231,500 226,497"
_HELMET = (
    "281,511 278,501 276,487 276,469 278,451 281,435 286,419 292,409 293,400 298,390 306,385 319,370 329,362 340,357 "
    "348,354 366,349 375,347 389,345 401,344 417,345 433,349 451,358 467,371 480,386 489,404 494,421 497,437 497,451 "
    "504,457 507,469 508,484 511,486 511,511"
)
_LEFT_EYE = (
    "140,108 140,101 143,96 150,90 159,87 167,86 176,87 187,91 195,97 200,104 203,113 202,121 199,129 192,137 184,142 "
    "173,143 163,142 154,136 147,129 142,119"
)
_RIGHT_EYE = (
    "295,147 295,139 298,131 303,125 311,119 320,113 327,110 333,111 338,116 340,125 339,134 336,142 330,150 322,157 "
    "311,161 303,160 297,156"
)
_NOSE = "231,228 241,232 248,229 268,230 291,231 288,238 274,249 268,259 259,264 252,259 249,248 243,238"
_CUP = (
    "173,107 176,92 183,74 196,56 216,39 242,26 264,20 286,18 308,20 333,26 359,39 379,56 396,76 405,94 408,116 "
    "406,134 401,164 392,193 385,207 379,214 372,223 370,235 360,245 341,253 330,264 325,271 307,282 294,286 279,286 "
    "257,283 255,279 245,290 236,299 225,308 215,308 203,302 197,291 196,278 200,266 218,235 201,221 190,207 182,195 "
    "180,182 176,153 173,123"
)
_COFFEE = (
    "203,142 209,127 227,107 253,99 282,95 308,98 333,109 355,127 368,147 370,158 359,171 341,182 319,190 297,193 "
    "275,192 249,186 227,173 211,156"
)
_SAUCER = (
    "181,70 158,81 132,99 110,121 94,145 82,178 77,211 79,244 86,273 101,303 121,328 147,350 180,370 216,382 253,387 "
    "289,388 326,385 363,376 399,359 427,339 450,314 469,281 477,248 478,219 474,189 461,158 443,132 417,108"
)
_SPOON_HANDLE = "397,72 410,67 421,70 424,78 419,98 414,114 408,131 408,112 405,94"
_SPOON_BOWL = (
    "391,194 388,204 385,220 383,233 389,247 400,259 405,271 405,284 401,297 389,313 374,323 359,325 347,322 334,312 "
    "328,300 326,287 328,275 332,264 341,254 361,245 370,235 372,223 379,215"
)
_ROCKET = (
    "322,127 318,131 314,137 311,145 311,179 314,181 314,290 313,350 312,406 331,406 331,350 330,290 329,246 328,204 "
    "329,181 332,179 333,172 333,145 330,137 326,131"
)


class _Region(NamedTuple):
    photograph: str  # a file of `skimage/data`
    outlines: tuple[str, ...]  # polygons whose union is the region,
    holes: tuple[str, ...] = ()  # less the union of these


_REGIONS = {
    "suit": _Region("astronaut.png", (_SUIT,), (_PATCH, _NAME_TAG, _LEFT_STRAP, _RIGHT_STRAP, _BUCKLE)),
    "helmet": _Region("astronaut.png", (_HELMET,)),
    "eyes": _Region("chelsea.png", (_LEFT_EYE, _RIGHT_EYE)),
    "nose": _Region("chelsea.png", (_NOSE,)),
    "cup": _Region("coffee.png", (_CUP,), (_COFFEE,)),
    "coffee": _Region("coffee.png", (_COFFEE,)),
    "saucer": _Region("coffee.png", (_SAUCER,), (_CUP, _SPOON_HANDLE, _SPOON_BOWL)),
    "spoon": _Region("coffee.png", (_SPOON_HANDLE, _SPOON_BOWL)),
    "rocket": _Region("rocket.jpg", (_ROCKET,)),
}

_EDITS = (  # region; instruction, whose last colour is the target; caption of the region after the edit
    ("suit", "Change the orange spacesuit to blue.", "an astronaut in a blue spacesuit"),
    ("suit", "Make the astronaut's suit green.", "an astronaut in a green spacesuit"),
    ("helmet", "Paint the helmet red.", "a red space helmet"),
    ("eyes", "Make the cat's eyes deep sky blue.", "a cat with bright blue eyes"),
    ("nose", "Turn the cat's nose purple.", "a cat with a purple nose"),
    ("cup", "Paint the coffee cup blue.", "a blue coffee cup"),
    ("cup", "Make the cup yellow.", "a yellow coffee cup"),
    ("coffee", "Turn the coffee into matcha, light green.", "light green matcha in a cup"),
    ("saucer", "Change the red saucer to dark green.", "a dark green saucer"),
    ("spoon", "Make the spoon gold.", "a gold spoon"),
    ("rocket", "Paint the rocket red.", "a red rocket"),
    ("rocket", "Turn the white rocket orange.", "an orange rocket"),
)


def write_photographs(folder: Path) -> Path:
    """Writes 12 edits of 4 photographs as a folder that `EditFolder` reads.

    The folder gets `images/` (copies of the photographs), `masks/` (PNG, white = edit region, at the photograph's size)
    and `metadata.jsonl`, whose lines have an instruction that the colour reward can score and a caption. The same bytes
    are written each time; files of these names are overwritten.

    Args:
        folder: Where to write; made if need be.

    Returns:
        The folder.

    Raises:
        UserError: scikit-image is not installed or lacks a photograph, or the folder cannot be written.
    """
    photographs = find_photographs()
    try:
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for name, file in photographs.items():
            shutil.copyfile(file, folder / "images" / name)
        for name, region in _REGIONS.items():
            with Image.open(photographs[region.photograph]) as photograph:
                _draw(region, photograph.size).save(folder / "masks" / f"{name}.png")
        lines = (
            {"image": f"images/{_REGIONS[name].photograph}", "mask": f"masks/{name}.png"}
            | {"instruction": instruction, "caption": caption}
            for name, instruction, caption in _EDITS
        )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metadata.jsonl").write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(
            f"{folder}: the examples cannot be written ({error}).", "Choose a folder you can write to."
        ) from error
    return folder


def find_photographs() -> dict[str, Path]:
    """Finds the photographs by name, without importing scikit-image."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise UserError(
            "scikit-image is not installed; the example photographs come with it.", "pip install 'rcgrpo_jax[demo]'"
        )
    data = Path(package.origin).parent / "data"
    files = {region.photograph: data / region.photograph for region in _REGIONS.values()}
    for file in files.values():
        if not file.is_file():
            raise UserError(
                f"{file}: there is no such file; scikit-image's wheel carries it.",
                "Install scikit-image from its wheel: pip install --force-reinstall 'rcgrpo_jax[demo]'",
            )
    return files


def _draw(region: _Region, size: tuple[int, int]) -> Image.Image:
    """Draws a region in white on black; `size` is `(width, height)` of its photograph in pixels."""
    mask = Image.new("L", size)
    canvas = ImageDraw.Draw(mask)
    for polygons, value in ((region.outlines, 255), (region.holes, 0)):
        for points in polygons:
            canvas.polygon([tuple(map(int, point.split(","))) for point in points.split()], fill=value)
    return mask
