"""Small files in the layouts in which data sets are published: the same columns, types, folders and mask forms."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 24  # of a picture
REGION = (slice(4, 12), slice(6, 18))  # of every edit: rows, columns


def png(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def region() -> np.ndarray:
    """The edit region, float32 `[H, W]`."""
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[REGION] = 1
    return mask


def pictures(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A source without dark pixels, and a target that differs in the region alone."""
    rng = np.random.default_rng(seed)
    source = rng.integers(40, 100, (SIZE, SIZE, 3), np.uint8)
    target = source.copy()
    target[REGION] += 120
    return source, target


def white(source: np.ndarray) -> np.ndarray:
    return (region() * 255).astype(np.uint8)


def black(source: np.ndarray) -> np.ndarray:
    return ((1 - region()) * 255).astype(np.uint8)


def transparent(source: np.ndarray) -> np.ndarray:
    """The source with the region erased, twice as large."""
    alpha = ((1 - region()) * 255).astype(np.uint8)
    return np.dstack([source, alpha]).repeat(2, axis=0).repeat(2, axis=1)


def painted(source: np.ndarray) -> np.ndarray:
    """The source with the region painted black."""
    return np.where(region()[..., None] > 0, 0, source).astype(np.uint8)


def of_hub(pixels: np.ndarray | None) -> dict | None:
    """A picture as a cell of a hub's Parquet file."""
    return None if pixels is None else {"bytes": png(pixels), "path": "x.png"}


def write_parquet(file: Path, rows: list[dict], group: int = 4) -> Path:
    """Rows with hub pictures, in a file with small row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    first = {name: next((row[name] for row in rows if row[name] is not None), None) for name in rows[0]}
    kinds = {dict: picture, int: pa.int32(), bytes: pa.binary()}
    schema = pa.schema([(name, kinds.get(type(value), pa.string())) for name, value in first.items()])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=group)
    return file


def compbench_rows() -> list[dict]:
    """Seven rows: two of `add`, of `remove` and of `replace` one whose mask is null; one of another task."""
    tasks = ("add", "add", "remove", "remove", "replace", "replace", "action")
    rows = []
    for index, task in enumerate(tasks):
        source, target = pictures(index)
        path = f"{index:03d}ca3cb/0/{index:05d}.png" if task != "action" else f"{index:05d}.png"
        rows.append(
            {
                "task": task,
                "image_path": path,
                "input_image": of_hub(source),
                "edited_image": of_hub(target),
                "instruction": f"Edit {index}.",
                "caption": f"a thing {index}",
                "mask": None if index in (5, 6) else of_hub(white(source)),
            }
        )
    return rows


def compbench_parquet(root: Path) -> Path:
    rows = compbench_rows()
    write_parquet(root / "data/train-00000-of-00002.parquet", rows[:4])
    write_parquet(root / "data/train-00001-of-00002.parquet", rows[4:])
    write_parquet(root / "data/multi_turn-00000-of-00001.parquet", [row | {"task": "multi_turn_add"} for row in rows])
    return root


def compbench_folders(root: Path) -> Path:
    """As the authors' downloader lays them out."""
    for row in compbench_rows()[:6]:
        task = root / "tasks" / row["task"]
        for name in ("input_image", "edited_image", "mask"):
            if row[name]:
                file = task / name / row["image_path"]
                file.parent.mkdir(parents=True)
                file.write_bytes(row[name]["bytes"])
        table = task / "metadata.json"
        lines = json.loads(table.read_text()) if table.is_file() else []
        lines.append({key: row[key] for key in ("image_path", "instruction", "caption")})
        table.write_text(json.dumps(lines, indent=2))
    return root


def magicbrush(root: Path) -> Path:
    rows = []
    for index in range(3):
        source, target = pictures(index)
        rows.append(
            {
                "img_id": "242679",
                "turn_index": index + 1,
                "source_img": of_hub(source),
                "mask_img": of_hub(transparent(source)),
                "instruction": f"Edit {index}.",
                "target_img": of_hub(target),
            }
        )
    write_parquet(root / "data/train-00000-of-00001-453c1a9ccc53b253.parquet", rows)
    write_parquet(root / "data/dev-00000-of-00001-b3949adffa3af51a.parquet", rows[:1])
    return root


def humanedit(root: Path) -> Path:
    """Three rows; the second one's source has a black thing outside the region."""
    rows = []
    for index, kind in enumerate(("Add", "Remove", "Counting")):
        source, target = pictures(index)
        if index == 1:
            source[16:22, 16:22] = target[16:22, 16:22] = 0
        rows.append(
            {
                "IMAGE_ID": f"photo-{index}",
                "EDITING_TYPE": kind,
                "CORE": 0,
                "MASK": 1,
                "EDITING_INSTRUCTION": f"Edit {index}.",
                "OUTPUT_DESCRIPTION": f"a photograph {index}",
                "INPUT_CAPTION_BY_LLAMA": "before",
                "OUTPUT_CAPTION_BY_LLAMA": "after",
                "INPUT_IMG": of_hub(source),
                "MASK_IMG": of_hub(painted(source)),
                "OUTPUT_IMG": of_hub(target),
            }
        )
    write_parquet(root / "data/train-00000-of-00001-7ba280c9a805ec9a.parquet", rows)
    return root


def ultraedit(root: Path) -> Path:
    """Three rows; the mask of the last is blank."""
    rows = []
    for index in range(3):
        source, target = pictures(index)
        mask = np.full((SIZE, SIZE), 255, np.uint8) if index == 2 else white(source)
        rows.append(
            {
                "source_image": of_hub(source),
                "edited_image": of_hub(target),
                "mask_image": of_hub(mask),
                "edit_prompt": f"Edit {index}.",
                "source_caption": "before",
                "target_caption": f"after {index}",
            }
        )
    write_parquet(root / "data/RegionBase-00000-of-00001.parquet", rows)
    return root


def cocoedit(root: Path) -> Path:
    lines = []
    for index in range(3):
        source, _ = pictures(index)
        line = {"prompt": f"Edit {index}.", "image": f"images_part1/{index}.png", "mask": f"masks_part1/{index}.png"}
        for name, pixels in (("image", source), ("mask", black(source))):
            (root / line[name]).parent.mkdir(parents=True, exist_ok=True)
            (root / line[name]).write_bytes(png(pixels))
        lines.append(json.dumps(line))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root
