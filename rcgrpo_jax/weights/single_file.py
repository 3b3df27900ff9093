"""A transformer in one file: in BFL's layout or diffusers', under any prefix, alone or with other networks beside."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.files import TensorFiles
from rcgrpo_jax.weights.leaf_reader import LeafReader
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.networks import abstract_params
from rcgrpo_jax.weights.stored import StoredNetwork

logger = logging.getLogger(__name__)

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")  # of the one to read, where several are
BESIDE = frozenset({  # beginnings of other networks' keys, in files whose transformer has no prefix
    "vae", "first_stage_model", "text_encoder", "text_encoder_2", "text_encoders", "cond_stage_model", "conditioner",
    "clip_l", "t5xxl", "model_ema",
})  # fmt: skip
ToSource = Callable[[str], keymap.Source]


def open_single_file(path: Path, base: ModelFolder | None) -> tuple[LeafReader, MMDiTConfig]:
    """A reader of the transformer in a file, and its sizes; a warning names what lies beside it and is left out.

    Args:
        path: The file.
        base: A folder whose `transformer/config.json` says the sizes; without one they are read off the tensors.

    Raises:
        UserError: If the file holds no FLUX transformer.
    """
    files = TensorFiles(path)
    prefix, to_source = find_transformer(files)
    tensors = StoredNetwork(files, prefix, BESIDE if not prefix else frozenset())
    if base and base.has("transformer"):
        config = base.config("transformer")
    else:
        config = read_sizes(tensors.shapes, to_source, path)
    if tensors.left_out:
        names = ", ".join(f"{name}.* ({count})" for name, count in sorted(tensors.left_out.items()))
        logger.warning("%s: the transformer is read; what lies beside it is left out: %s", path, names)
    to_source = partial(to_source, width=config.width) if to_source is keymap.bfl_source else to_source
    return LeafReader(tensors, "transformer", abstract_params("transformer", config), to_source), config


def find_transformer(files: TensorFiles) -> tuple[str, ToSource]:
    """The prefix of a transformer's keys, and where its layout keeps the tensor of each of diffusers' names."""
    for anchor, to_source in (("img_in.weight", keymap.bfl_source), ("x_embedder.weight", keymap.Source)):
        found = [key.removesuffix(anchor) for key in files.shapes if f".{key}".endswith(f".{anchor}")]
        known = [prefix for prefix in PREFIXES if prefix in found]
        if len(found) == 1 or known:
            return (known or found)[0], to_source
        if found:
            raise UserError(
                f"{files.path}: holds {len(found)} transformers, {', '.join(found)}.", "Give a file that holds one."
            )
    StoredNetwork(files)  # refuses kinds of few bits that name a weight otherwise
    if any("lora" in key for key in files.shapes):
        raise UserError(f"{files.path}: a LoRA and no transformer.", "Give it as --lora, and a model as --model.")
    raise UserError(
        f"{files.path}: no FLUX transformer (looked for img_in.weight of BFL's layout and x_embedder.weight of "
        "diffusers').",
        "Give flux1-kontext-dev.safetensors or another file of these layouts; other networks come from --base.",
    )


def read_sizes(shapes: dict[str, tuple[int, ...]], to_source: ToSource, file: Path) -> MMDiTConfig:
    """The transformer's sizes, read off its tensors.

    Raises:
        UserError: If tensors are missing that tell them, or the rotary axes are not known.
    """
    if to_source is keymap.bfl_source:
        to_source = partial(keymap.bfl_source, width=0)  # the rows of fused tensors do not matter here

    def key(name: str) -> str:
        return to_source(name).key

    def blocks(kind: str) -> int:
        stack = key(f"{kind}.0.attn.norm_q.weight").split(".")[0]
        return len({name.split(".")[1] for name in shapes if name.startswith(f"{stack}.")})

    try:
        width, channels = shapes[key("x_embedder.weight")]
        (head_dim,) = shapes[key("transformer_blocks.0.attn.norm_q.weight")]
        if head_dim != MMDiTConfig.attention_head_dim:
            raise UserError(
                f"{file}: head_dim is {head_dim}; rotary axes are known for {MMDiTConfig.attention_head_dim} only.",
                "Give --base FOLDER with the transformer/config.json of this model.",
            )
        return MMDiTConfig(
            in_channels=channels,
            num_layers=blocks("transformer_blocks"),
            num_single_layers=blocks("single_transformer_blocks"),
            num_attention_heads=width // head_dim,
            joint_attention_dim=shapes[key("context_embedder.weight")][1],
            pooled_projection_dim=shapes[key("time_text_embed.text_embedder.linear_1.weight")][1],
            guidance_embeds=key("time_text_embed.guidance_embedder.linear_1.weight") in shapes,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{file}: no whole FLUX transformer (looked for {error}).",
            "Download the file again; if it is of another model, give flux1-kontext-dev.safetensors.",
        ) from None
