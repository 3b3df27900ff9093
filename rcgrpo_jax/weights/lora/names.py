"""Names of the tensors in LoRA files of all programs: which linear layer a tensor adapts, and which part it is.

| program | a key |
|---|---|
| diffusers, ai-toolkit | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` |
| PEFT | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight` |
| fal's Kontext trainer | `base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight` |
| ComfyUI, BFL's names | `diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight` |
| kohya | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` |
| OneTrainer | `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight` |
| XLabs | `double_blocks.0.processor.qkv_lora1.down.weight` |

Dots and underscores are one here: diffusers' and BFL's names stay distinct without them, so that one table holds all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from rcgrpo_jax.weights import keymap

PREFIXES = ("base_model_model_", "model_", "diffusion_model_", "transformer_", "lora_unet_", "lora_transformer_",
            "lycoris_", "unet_")  # fmt: skip
TEXT_ENCODERS = re.compile(
    r"(base_model\.model\.)?(lora_|lycoris_)?((prior_)?te[123]?_|text_encoders?(_[23])?[._]|bundle_emb\.|"
    r"(cond_stage_model|conditioner|text_model|t5xxl|clip(_[lg])?)[._])"
)
# Part of a LoRA -> how programs end its key; PEFT may put an adapter's name before `.weight`.
_ENDINGS = {
    "A": r"[._](lora_A|lora_down|lora\.down|lora_linear_layer\.down|down)((\.[^.]+)?\.weight)?",
    "B": r"[._](lora_B|lora_up|lora\.up|lora_linear_layer\.up|up)((\.[^.]+)?\.weight)?",
    "alpha": r"\.(alpha|lora_alpha)",
}
_PARTS = [(part, re.compile(rf"(.+?){ending}$")) for part, ending in _ENDINGS.items()]
# Pattern of keys that belong to another kind of adapter -> the name of that kind.
FOREIGN = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_|oft_blocks|oft_diag": "OFT",
    r"\.lora_mid\.": "a Tucker decomposition (lora_mid)",
    r"\.on_input$|\.ia3": "IA3",
    r"\.(diff|diff_b|w_norm|b_norm|set_weight)$": "a full change of weights (diff)",
    r"lora_B\.bias$|lora_up\.bias$|lora_B\..*\.bias$": "LoRA with a bias",
    r"(query|key)_norm\.scale$|norm_(added_)?[qk]\.weight$": "a control LoRA, which replaces norms",
    r"\.(absmax|quant_map|quant_state|scale_weight)": "quantised factors",
    r"lora_controlnet": "a control LoRA",
    r"(^|\.)(proj_in|ip_adapter|image_proj)": "an IP-Adapter",
}


class Rows(NamedTuple):
    """A kernel of our tree that a linear layer of a file fills, in one layer of a stack, and the file's rows for it."""

    leaf: keymap.Leaf
    layer: int
    source: keymap.Source

    @property
    def path(self) -> keymap.Path:
        return self.leaf.path[:-1]

    @property
    def module(self) -> str:
        """What diffusers calls it."""
        return keymap.diffusers_key(self.path, self.layer if self.leaf.stacked else None)

    @property
    def fan_in_out(self) -> tuple[int, int]:
        return self.leaf.shape[-2:]


def plain(name: str) -> str:
    """A name without the difference between dots and underscores."""
    return name.replace(".", "_")


def is_flux(params: Mapping) -> bool:
    """Whether a network is FLUX's transformer, the one whose layers have BFL's names too."""
    return {"x_embedder", "context_embedder", "time_text_embed"} <= params.keys()


def bfl_source(params: Mapping) -> Callable[[str], keymap.Source]:
    """diffusers' key -> BFL's, for a transformer of this width."""
    return partial(keymap.bfl_source, width=params["x_embedder"]["kernel"].shape[-1])


def rows(params: Mapping, to_source: Callable[[str], keymap.Source]) -> Iterator[Rows]:
    """Every kernel of a transformer (arrays or shapes), a layer at a time, and its rows of a file's tensor."""
    for leaf in keymap.leaves(params, to_source):
        if leaf.path[-1] == "kernel":
            yield from (Rows(leaf, layer, source) for layer, source in enumerate(leaf.sources))


def linear_layers(params: Mapping) -> dict[str, list[Rows]]:
    """The linear layers that a file can name -> the kernels they fill, in the order of their rows.

    Args:
        params: Parameters of the trained network (arrays or shapes).
    """
    table: dict[str, list[Rows]] = {}
    for to_source in (keymap.Source, *([bfl_source(params)] if is_flux(params) else [])):
        for row in rows(params, to_source):
            table.setdefault(plain(row.source.key.removesuffix(".weight")), []).append(row)
    for found in table.values():
        found.sort(key=lambda row: row.source.start)
    return table | _xlabs(table)


def _xlabs(table: Mapping[str, list[Rows]]) -> dict[str, list[Rows]]:
    """XLabs' names of attention layers; the `linear1` of its single blocks is cut before the MLP's rows."""
    double = {"qkv_lora1": "img_attn_qkv", "qkv_lora2": "txt_attn_qkv", "proj_lora1": "img_attn_proj",
              "proj_lora2": "txt_attn_proj"}  # fmt: skip
    single = {"qkv": "linear1", "proj": "linear2"}  # "_lora.down.weight" is an ending
    found = {}
    for name, filled in table.items():
        for kind, names in (("double_blocks", double), ("single_blocks", single)):
            for theirs, bfl in names.items():
                if match := re.fullmatch(rf"({kind}_\d+)_{bfl}", name):
                    kept = [row for row in filled if not row.path[-1].startswith("proj_mlp")]
                    found[f"{match[1]}_processor_{theirs}"] = kept
    return found


def split(key: str) -> tuple[str, str] | None:
    """A key as (layer's name, "A", "B" or "alpha"); None if it is none of these."""
    for part, pattern in _PARTS:
        if match := pattern.fullmatch(key):
            return match[1], part
    return None


def find(name: str, table: Mapping[str, list[Rows]]) -> str | None:
    """The entry of the table that a layer's name means, whatever stands before it."""
    name = plain(name)
    while name not in table:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return name


def foreign_kind(key: str) -> str | None:
    """The kind of adapter that a key belongs to, if it is one that is not read."""
    return next((kind for pattern, kind in FOREIGN.items() if re.search(pattern, key)), None)
