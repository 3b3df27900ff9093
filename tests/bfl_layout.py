"""The single-file layout of FLUX, written down a second time, apart from `rcgrpo_jax.weights.keymap`."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from rcgrpo_jax.models.config import MMDiTConfig

# BFL's names -> diffusers' names; several of these are stacked by rows, in this order.
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    **{
        f"{ours}_in.{side}_layer": f"time_text_embed.{theirs}_embedder.linear_{number}"
        for ours, theirs in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text"))
        for side, number in (("in", 1), ("out", 2))
    },
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE = {"modulation.lin": "norm.linear", "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out"}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def shapes(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of the file."""
    d, c, head = config.width, config.in_channels, config.attention_head_dim
    layers = {  # module -> [out, in]
        "img_in": (d, c), "txt_in": (d, config.joint_attention_dim),
        "time_in.in_layer": (d, 256), "time_in.out_layer": (d, d),
        "vector_in.in_layer": (d, config.pooled_projection_dim), "vector_in.out_layer": (d, d),
        "final_layer.linear": (c, d), "final_layer.adaLN_modulation.1": (2 * d, d),
    }  # fmt: skip
    if config.guidance_embeds:
        layers |= {"guidance_in.in_layer": (d, 256), "guidance_in.out_layer": (d, d)}
    norms = []
    for i in range(config.num_layers):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            layers |= {
                f"{block}_mod.lin": (6 * d, d), f"{block}_attn.qkv": (3 * d, d), f"{block}_attn.proj": (d, d),
                f"{block}_mlp.0": (4 * d, d), f"{block}_mlp.2": (d, 4 * d),
            }  # fmt: skip
            norms += [f"{block}_attn.norm.query_norm", f"{block}_attn.norm.key_norm"]
    for i in range(config.num_single_layers):
        block = f"single_blocks.{i}"
        layers |= {
            f"{block}.modulation.lin": (3 * d, d), f"{block}.linear1": (7 * d, d), f"{block}.linear2": (d, 5 * d),
        }  # fmt: skip
        norms += [f"{block}.norm.query_norm", f"{block}.norm.key_norm"]
    found = {f"{norm}.scale": (head,) for norm in norms}
    for module, (rows, columns) in layers.items():
        found |= {f"{module}.weight": (rows, columns), f"{module}.bias": (rows,)}
    return found


def from_diffusers(tensors: dict[str, np.ndarray], config: MMDiTConfig) -> dict[str, np.ndarray]:
    """A transformer of a diffusers folder as the tensors of the single file."""
    found = {}
    for key in shapes(config):
        module, leaf = key.rsplit(".", 1)
        prefix, layers, norms = "", TOP, {}
        for blocks, theirs, tables in (
            ("double_blocks", "transformer_blocks", (DOUBLE, DOUBLE_NORMS)),
            ("single_blocks", "single_transformer_blocks", (SINGLE, SINGLE_NORMS)),
        ):
            if module.startswith(blocks):
                _, layer, module = module.split(".", 2)
                prefix, (layers, norms) = f"{theirs}.{layer}.", tables
        if leaf == "scale":
            found[key] = tensors[f"{prefix}{norms[module]}.weight"]
            continue
        parts = [tensors[f"{prefix}{name}.{leaf}"] for name in layers[module].split()]
        if module == "final_layer.adaLN_modulation.1":  # diffusers: scale, shift; here: shift, scale
            parts = np.split(parts[0], 2)[::-1]
        found[key] = np.concatenate(parts)
    return found


def write_single_file(folder: Path, path: Path, config: MMDiTConfig) -> Path:
    """Writes the transformer of a diffusers folder as a single file."""
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(from_diffusers(tensors, config), path)
    return path
