"""Encoders run once: their results lie on disk under the hash of what went in."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import resize_image, resize_mask
from rcgrpo_jax.editors.flux_kontext import Editor
from rcgrpo_jax.errors import UserError, everywhere
from rcgrpo_jax.parallel import distributed

EXAMPLE = {"pixels", "mask", "target", "instruction"}  # what an entry holds beside the encodings
_SAME_DATA = "Give every process the same data, or one folder that all see."


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
        encoded = editor.encode(pixels[None], [example.instruction])
        tensors = {name: np.asarray(x)[0] for name, x in encoded.items()} | {"pixels": pixels, "mask": mask}
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
