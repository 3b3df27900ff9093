"""Small GEdit-Bench and ImgEdit-Bench, as their authors give them: data, results, prompts and answers."""

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import data_sets
import numpy as np
import pyarrow
from judge_server import Reply, message
from PIL import Image

SHAPES = ((48, 80), (80, 48), (64, 64))  # (height, width) of pictures
GEDIT = [  # task, key, in the intersection; each in two languages
    ("color_alter", "4c309b59", True),
    ("color_alter", "0-a", False),
    ("text_change", "77ee0001", True),
]
IMGEDIT = {  # key -> category, kind of edit
    "1082": ("animal", "adjust"),
    "673": ("style", "style"),
    "97": ("for_add", "adjust"),
}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SHAPES[seed % 3], 3), np.uint8)


def gedit_arrow(folder: Path) -> Path:
    """The hub's columns, in a stream of Arrow as `datasets` saves a split."""
    rows = [
        {
            "task_type": task, "key": key, "instruction": f"{language} {key}", "instruction_language": language,
            "input_image": data_sets.of_hub(picture(index)), "input_image_raw": data_sets.of_hub(picture(index)),
            "Intersection_exist": there,
        }
        for language in ("en", "cn")
        for index, (task, key, there) in enumerate(GEDIT)
    ]  # fmt: skip
    file = folder / "train" / "data-00000-of-00001.arrow"
    file.parent.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return folder


def gedit_results(folder: Path, language: str = "en", scale: int = 1) -> Path:
    """Negatives of the sources, `scale` times as large, beside the sources themselves."""
    for index, (task, key, _) in enumerate(GEDIT):
        place = folder / "fullset" / task / language
        place.mkdir(parents=True, exist_ok=True)
        source = picture(index)
        Image.fromarray(source).save(place / f"{key}_SRCIMG.png")
        Image.fromarray((255 - source).repeat(scale, 0).repeat(scale, 1)).save(place / f"{key}.png")
    return folder


def gedit_prompts(file: Path) -> Path:
    """A file of the names of GEdit-Bench's prompts, with other words; running it fails."""
    texts = {
        "_context_no_delimit": 'Answer {"score" : [...]}.', "_prompts_0shot_two_image_edit_rule": "Two pictures.",
        "_prompts_0shot_tie_rule_SC": "Was it edited? <instruction>", "_prompts_0shot_rule_PQ": "How good is it?",
    }  # fmt: skip
    lines = [f'{name} = """{text}"""' for name, text in texts.items()]
    file.write_text("\n\n".join(["# generated", *lines, "raise SystemExit('this file was run')"]))
    return file


def imgedit_folder(folder: Path) -> Path:
    """What `Benchmark.tar` unpacks to."""
    place, table = folder / "Benchmark" / "singleturn", {}
    for index, (key, (category, kind)) in enumerate(IMGEDIT.items()):
        (place / category).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(index)).save(place / category / f"000{key}.jpg", quality=100)
        table[key] = {"id": f"{category}/000{key}.jpg", "prompt": f"Edit {key}.", "edit_type": kind}
    (place / "singleturn.json").write_text(json.dumps(table))
    (place / "judge_prompt.json").write_text(json.dumps(imgedit_prompts()))
    return folder


def imgedit_prompts() -> dict[str, str]:
    return {kind: f"Rate {kind}: <edit_prompt>" for kind in ("adjust", "style")}


def imgedit_results(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for index, key in enumerate(IMGEDIT):
        Image.fromarray(255 - picture(index)).save(folder / f"{key}.png")
    return folder


def said(body: Mapping[str, Any]) -> str:
    """The text of a request."""
    return "".join(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")


def shown(body: Mapping[str, Any]) -> list[np.ndarray]:
    """The pictures of a request."""
    urls = [x["image_url"]["url"] for x in body["messages"][0]["content"] if x["type"] == "image_url"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in urls]


GEDIT_SCORES = {"4c309b59": (9, 4), "0-a": (1, 7), "77ee0001": (6, 6)}  # key -> SC, PQ
IMGEDIT_SCORES = {"1082": (5, 4, 3), "673": (2, 2, 1), "97": (1, 1, 1)}
_PQ_OF = {SHAPES[i]: GEDIT_SCORES[key][1] for i, (_, key, _) in enumerate(GEDIT)}


def gedit_answer(body: Mapping[str, Any], attempt: int = 1) -> Reply:
    """SC by the key in the instruction, PQ by the shape of the picture; the smaller of two numbers counts."""
    if "How good" in said(body):
        (edited,) = shown(body)
        score = _PQ_OF.get(edited.shape[:2], 5)
    else:
        score = next((sc for key, (sc, _) in GEDIT_SCORES.items() if key in said(body)), 5)
    return message(json.dumps({"score": [10, score], "reasoning": "fine"}))


def imgedit_answer(body: Mapping[str, Any], attempt: int = 1) -> Reply:
    key = re.search(r"Edit (\d+)", said(body))
    names = zip(("Prompt Compliance", "Visual Seamlessness", "Physical & Detail Fidelity"),
                IMGEDIT_SCORES.get(key[1] if key else "", (3, 3, 3)), strict=True)  # fmt: skip
    return message("\n".join(["Brief reasoning: 1 of 2 done.", *(f"{name}: {score}" for name, score in names)]))
