"""`rcgrpo convert`: released weights into a directory of Orbax checkpoints, leaf by leaf."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rcgrpo_jax.borders import read_object
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.export import network_json
from rcgrpo_jax.weights.files import TensorFiles
from rcgrpo_jax.weights.hub import local_path
from rcgrpo_jax.weights.leaf_reader import LeafReader, ShardingOf, on_default_device, problem_report
from rcgrpo_jax.weights.load import COPY_AGAIN, MANIFEST, ModelFolder, fingerprint
from rcgrpo_jax.weights.networks import NETWORKS, abstract_params
from rcgrpo_jax.weights.single_file import open_single_file
from rcgrpo_jax.weights.stored import StoredNetwork
from rcgrpo_jax.weights.tokenizers import check_files

ASSETS = ("tokenizer", "tokenizer_2", "scheduler")
SAVED_AT_ONCE = 2**28  # bytes of small leaves that are gathered into one write
Progress = Callable[[str, int, int], None]  # (network, leaves done, leaves in all)


def open_checkpoint(source: str, base: str | None) -> tuple[dict[str, LeafReader], dict[str, dict], Path | None]:
    """A reader and a `config.json` for each network of the source, and the folder with tokenizers and scheduler."""
    patterns = ["*.json", "*/*.json", "*/*.txt", "*/*.model", *(f"{name}/*.safetensors" for name in NETWORKS)]
    path = local_path(source, patterns)
    readers, configs = {}, {}
    if path.is_file():
        model = ModelFolder(base) if base else None
        readers["transformer"], config = open_single_file(path, model)
        configs["transformer"] = network_json("transformer", config)
        if model is None:
            return readers, configs, None
    elif base:
        raise UsageError(f"--base: {source} is no single file and has its own networks.", "Leave --base out.")
    else:
        model = ModelFolder(path)
    folder = model.path
    if model.converted:
        raise UserError(f"{folder}: already converted.", "Use it as --model.")
    if missing := [part for part in (*NETWORKS, *ASSETS) if part not in readers and not (folder / part).is_dir()]:
        raise UserError(f"{folder}: holds no {', '.join(missing)}.", "The model folder is not complete; copy it again.")
    for part in ("tokenizer", "tokenizer_2"):
        check_files(folder / part)
    model.schedule_options()  # refuses one that is not computed
    for name in NETWORKS:
        if name not in readers:
            configs[name] = read_object(folder / name / "config.json", COPY_AGAIN)
            params = abstract_params(name, model.config(name))
            readers[name] = LeafReader(StoredNetwork(TensorFiles(folder / name)), name, params)
    return readers, configs, folder


def convert(
    source: str,
    destination: str | Path,
    *,
    base: str | None = None,
    dtype: Any = None,
    sharding_of: ShardingOf = on_default_device,
    progress: Progress = lambda *_: None,
) -> dict[str, int]:
    """Converts a diffusers folder, a hub id or the transformer of a single file into `destination`.

    All shapes are checked before anything is written. Then each leaf is read, checked for NaN, cast, placed and saved
    in turn, so that memory holds up to three copies of one leaf, never the model (small ones are gathered up to
    `SAVED_AT_ONCE`). The directory appears under its name only when complete.

    Args:
        source: Folder, hub id `owner/name`, or `.safetensors` file with a transformer (`single_file`).
        destination: New directory.
        base: diffusers folder to take the other networks, tokenizers and scheduler from, for a single file.
        dtype: Dtype to store; None keeps the files', and takes bfloat16 for float8.
        sharding_of: Where leaves are placed on the way.
        progress: Called after each leaf.

    Returns:
        Parameters of each network.

    Raises:
        UserError: With a line for each tensor that does not fit; nothing is left behind.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: already exists.", "Choose another directory, or remove this one.")
    readers, configs, folder = open_checkpoint(source, base)
    if folder is not None and folder.resolve() in destination.resolve().parents:
        raise UserError(f"{destination}: lies inside the source {folder}.", "Choose a directory outside of it.")
    _raise_all([(reader, reader.problems()) for reader in readers.values()])
    _check_space(destination, readers, dtype)
    partial_dir = destination.absolute().with_name(f".{destination.absolute().name}.incomplete")
    _remove(partial_dir)
    try:
        partial_dir.mkdir(parents=True)
        for name, reader in readers.items():
            (partial_dir / name).mkdir()
            (partial_dir / name / "config.json").write_text(json.dumps(configs[name], indent=2) + "\n")
            _save_network(partial_dir / name / "params", reader, dtype, sharding_of, progress)
        _raise_all([(reader, reader.values_lost()) for reader in readers.values()])
        _copy_assets(folder, partial_dir)
        cast = f"-{jnp.dtype(dtype).name}" if dtype else ""
        fingerprints = {name: fingerprint(configs[name], reader.files) + cast for name, reader in readers.items()}
        _write_manifest(partial_dir, source, dtype, fingerprints)
        if destination.is_dir():
            destination.rmdir()
        partial_dir.rename(destination)
    except OSError as error:
        raise UserError(f"{destination}: cannot be written ({error}).", "Free disk space, or choose another.") from None
    finally:
        _remove(partial_dir)
    return {name: sum(int(np.prod(leaf.shape)) for leaf in reader.leaves) for name, reader in readers.items()}


def _remove(directory: Path) -> None:
    """Removes a directory until it stays away: after a failed save, Orbax's other writes may bring it back."""
    for _ in range(50):
        if not directory.exists():
            return
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)


def _raise_all(found: list[tuple[LeafReader, list[str]]]) -> None:
    """Raises one error for the problems of all networks, if there are any."""
    if reports := [problem_report(reader.name, reader.files.path, problems) for reader, problems in found if problems]:
        raise UserError("\n".join(report.problem for report in reports), reports[0].remedy + " Nothing was written.")


def _check_space(destination: Path, readers: dict[str, LeafReader], dtype: Any) -> None:
    needed = sum(
        int(np.prod(leaf.shape)) * jnp.dtype(dtype or reader.tensors.dtype(leaf.sources[0].key)).itemsize
        for reader in readers.values()
        for leaf in reader.leaves
    )
    parent = next(p for p in (destination.absolute(), *destination.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{destination}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB needed.",
            "Free disk space, choose another disk, or convert with --dtype bfloat16.",
        )


def _save_network(path: Path, reader: LeafReader, dtype: Any, sharding_of: ShardingOf, progress: Progress) -> None:
    from rcgrpo_jax.orbax import ocp, saving

    batch: dict[keymap.Path, jax.Array] = {}
    for done, leaf in enumerate(reader.leaves, start=1):
        batch[leaf.path] = reader.read(leaf, dtype, sharding_of)
        if sum(x.nbytes for x in batch.values()) > SAVED_AT_ONCE or done == len(reader.leaves):
            if not reader.not_finite:  # after the first bad tensor the rest is only read, for the report
                with saving():
                    _write(ocp.partial.save, path.absolute(), unflatten_dict(batch))
            batch.clear()
        progress(reader.name, done, len(reader.leaves))
    if not reader.not_finite:
        _write(ocp.partial.finalize, path.absolute())


def _write(save: Callable[..., None], *args: Any) -> None:
    try:
        save(*args)
    except ValueError as error:  # what TensorStore makes of a full disk
        raise OSError(error) from None


def _copy_assets(folder: Path | None, target: Path) -> None:
    if folder is not None:
        for asset in ASSETS:
            if (folder / asset).is_dir():
                shutil.copytree(folder / asset, target / asset)
        shutil.copy(folder / "model_index.json", target)


def _write_manifest(target: Path, source: str, dtype: Any, fingerprints: dict[str, str]) -> None:
    manifest = {
        "format": "rcgrpo_jax converted model",
        "version": 1,
        "source": Path(source).name,
        "dtype": jnp.dtype(dtype).name if dtype else "as in the source",
        "fingerprints": fingerprints,
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
