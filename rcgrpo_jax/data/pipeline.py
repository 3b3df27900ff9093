"""From examples to batches: encoders run once, their results lie on disk under the hash of what went in."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import resize_image, resize_mask
from rcgrpo_jax.data.prefetch import Prefetch
from rcgrpo_jax.editor import Editor
from rcgrpo_jax.errors import UserError, everywhere
from rcgrpo_jax.parallel import distributed

_SAME_DATA = "Give every process the same data, or one folder that all see."


class Source(Protocol):
    """Random access to examples; `data.folder.EditFolder` is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> EditExample: ...


class EditBatch(NamedTuple):
    """What a training step reads: one row a prompt, on the host."""

    reference: Float[np.ndarray, "P N C"]  # packed latents of the source
    text: Float[np.ndarray, "P N_txt D"]  # T5 sequence
    pooled: Float[np.ndarray, "P D_pool"]  # CLIP vector
    text_weights: Float[np.ndarray, "P N_txt"]  # 1 for the instruction's own tokens, 0 for padding
    pixels: UInt8[np.ndarray, "P H W 3"]  # source, resized
    mask: Float[np.ndarray, "P H W"]  # edit region, resized
    instructions: tuple[str, ...]
    targets: UInt8[np.ndarray, "P H W 3"] | None = None  # reference edits, where every example has one


class EncodedSource:
    """Examples with their encodings, each computed once and kept in a folder.

    Several processes share the work; where they share the folder too, each example is encoded by one of them.

    The file of an example is named by a hash of its pixels, mask, target and instruction, of the encoders' weights, and
    of the size and dtype, so that changed inputs never meet old results.

    Args:
        source: The examples.
        editor: Encoders; not touched if everything is in the cache.
        size: (height, width) that images and masks are resized to.
        folder: The cache; created if missing.
        validate: Called with each example before it is encoded; raises if it cannot be used.
        progress: Called after each example with (done, all).

    Raises:
        UserError: If an example cannot be read or differs between processes, or the cache cannot be written.
    """

    def __init__(
        self,
        source: Source,
        editor: Editor,
        size: tuple[int, int],
        folder: str | Path,
        validate: Callable[[EditExample], None] = lambda _: None,
        progress: Callable[[int, int], None] = lambda *_: None,
    ):
        self.folder = Path(folder)
        parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        settings = [editor.folder.fingerprint(part) for part in parts]
        settings += [str(np.dtype(editor.dtype)), editor.max_text_tokens, list(size)]
        sizes = distributed.gather(np.array([len(source)]))
        if sizes.min() < sizes.max():
            apart = UserError(
                f"data: the processes find different numbers of examples, {', '.join(map(str, sizes))}.", _SAME_DATA
            )
            raise everywhere(apart)
        own = distributed.own_share(len(source))
        hashes = np.zeros((len(source), 16), np.uint8)
        missing: list[int] = []
        with distributed.together():
            for read, index in enumerate(own, start=1):
                example = source[index]
                validate(example)
                name = _content_hash(example, settings)
                hashes[index] = np.frombuffer(bytes.fromhex(name), np.uint8)
                if self._file(name).is_file():
                    progress(read - len(missing), len(own))
                else:
                    missing.append(index)
        hashes = distributed.total(hashes)  # each row is another process' own
        self._files = [self._file(row.tobytes().hex()) for row in hashes]
        if distributed.anyone(not all(file.is_file() for file in self._files)):
            editor.load_encoders()  # also where nothing is missing: the others' reading waits for it

        def write(index: int) -> None:
            """Encodes an example, unless its file is there."""
            if not self._files[index].is_file():
                example = source[index]
                if self._file(_content_hash(example, settings)) != self._files[index]:
                    raise UserError(f"data: example {index} has changed, or is another on another process.", _SAME_DATA)
                self._write(self._files[index], example, editor, size)

        with distributed.together():
            for done, index in enumerate(missing, start=len(own) - len(missing) + 1):
                write(index)
                progress(done, len(own))
        with distributed.together():
            for index in range(len(source)):  # those of the others, where they have disks of their own
                write(index)

    @property
    def digest(self) -> str:
        """A hash of all examples in order: equal for runs that see the same data."""
        return hashlib.sha256(" ".join(file.stem for file in self._files).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def __getitem__(self, index: int) -> dict:
        from safetensors import SafetensorError, safe_open

        file = self._files[index]
        try:
            with safe_open(file, framework="np") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                return tensors | stored.metadata()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: unreadable cache entry ({error}).", "Remove the file; it is made anew.") from None

    def _write(self, file: Path, example: EditExample, editor: Editor, size: tuple[int, int]) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        pixels = resize_image(example.image, size)
        mask = resize_mask(example.mask, size)
        encoding = editor.encode_text([example.instruction])
        tensors = {
            "reference": np.asarray(editor.encode_image(pixels[None]))[0],
            "text": np.asarray(encoding.text)[0],
            "pooled": np.asarray(encoding.pooled)[0],
            "text_weights": (np.arange(encoding.text.shape[1]) < encoding.lengths[0]).astype(np.float32),
            "pixels": pixels,
            "mask": mask,
        }
        if example.target is not None:
            tensors["target"] = resize_image(example.target, size)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")  # another run may write the same entry
            in_order = {name: np.ascontiguousarray(x) for name, x in tensors.items()}  # safetensors reads raw memory
            save_file(in_order, partial, metadata={"instruction": example.instruction})
            partial.replace(file)
        except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
            raise UserError(
                f"data.cache: {file} cannot be written ({error}).", "Free disk space, or set data.cache elsewhere."
            ) from None


def _content_hash(example: EditExample, settings: Sequence) -> str:
    digest = hashlib.sha256(json.dumps([example.instruction, *settings]).encode())
    for array in (example.image, example.mask, example.target):
        if array is None:
            continue
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


class Batches:
    """Batches of P prompts as a function of the step alone, so that a resumed run needs no iterator state.

    Each process gets its own rows of the P: which examples a step sees does not depend on how many processes there are.
    The batch of the next step is read in a thread while the device works on this one.

    Args:
        source: Encoded examples.
        prompts: P.
        seed: Of the order, which is drawn anew each epoch.
    """

    def __init__(self, source: EncodedSource, prompts: int, seed: int):
        import grain

        self.source, self._prompts = source, prompts
        self._dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        self._prefetch = Prefetch(self._read)

    def __getitem__(self, step: int) -> EditBatch:
        """The batch of a step.

        Raises:
            UserError: If an entry of the cache cannot be read.
        """
        return self._prefetch[step]

    def _read(self, step: int) -> EditBatch:
        rows = [self._dataset[step * self._prompts + i] for i in distributed.own_rows(self._prompts)]

        def stack(name: str) -> np.ndarray:
            return np.stack([row[name] for row in rows])

        arrays = [stack(name) for name in EditBatch._fields[:6]]
        targets = stack("target") if all("target" in row for row in rows) else None
        return EditBatch(*arrays, tuple(row["instruction"] for row in rows), targets)
