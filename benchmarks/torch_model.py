"""diffusers' transformer with the weights of a preset, peft's LoRA, and an attention processor that takes ACD."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from peft import LoraConfig
from torch import Tensor

from benchmarks.presets import Preset, offset_and_scale, pseudorandom, seed_of
from rcgrpo_jax.weights.load import SMALL_EDITOR

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def adapted_transformer(preset: Preset, device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The frozen transformer and a fresh LoRA on its attention projections."""
    if preset.model is None:
        transformer = FluxTransformer2DModel.from_pretrained(SMALL_EDITOR / "transformer", torch_dtype=dtype)
    else:
        sizes = {name: value for name, value in asdict(preset.model).items() if name != "rope_theta"}
        with torch.device("meta"):
            transformer = FluxTransformer2DModel(**sizes).to(dtype)
        transformer.to_empty(device=device)
        for name, parameter in transformer.named_parameters():
            fill(parameter, name)
    transformer.to(device).requires_grad_(False)
    options = preset.config.lora
    transformer.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=ATTENTION))
    return transformer


@torch.no_grad()
def fill(tensor: Tensor, key: str) -> None:
    """Writes the weights of `presets.pseudorandom` in place."""
    offset, scale = offset_and_scale(key, tuple(tensor.shape))
    index = torch.arange(tensor.numel(), dtype=torch.int32, device=tensor.device)
    tensor.copy_((offset + torch.tensor(scale) * pseudorandom(index, seed_of(key)).float()).reshape(tensor.shape))


class ConcentrationProcessor(FluxAttnProcessor):
    """diffusers' attention of a block, which also takes the density of Eq. 17 where there is a `region` `[b, N]`.

    Args:
        text_tokens: N_txt; in single blocks text and image are one sequence.
    """

    def __init__(self, text_tokens: int):
        super().__init__()
        self.text_tokens = text_tokens
        self.region: Tensor | None = None
        self.density: Tensor | None = None  # [b]

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attn.head_dim))

        q, k = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states)))
        v = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            q_text = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
            k_text = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
            v_text = heads(attn.add_v_proj(encoder_hidden_states))
            q, k, v = (torch.cat(pair, dim=1) for pair in ((q_text, q), (k_text, k), (v_text, v)))
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1).transpose(1, 2) for x in (q, k))
        if self.region is not None:
            last = self.text_tokens + self.region.shape[1]
            self.density = density(q[:, :, : self.text_tokens], k[:, :, self.text_tokens : last], self.region)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        text, image = out[:, : self.text_tokens], out[:, self.text_tokens :]
        return attn.to_out[0](image.contiguous()), attn.to_add_out(text.contiguous())


def density(q_text: Tensor, k_image: Tensor, region: Tensor, eps: float = 1e-6) -> Tensor:
    """ACD `[b]` of text queries `[b, H, N_txt, D]` over image keys `[b, H, N, D]` (Eq. 16, 17)."""
    attention = (q_text @ k_image.mT * q_text.shape[-1] ** -0.5).float().softmax(-1).mean(1)  # [b, N_txt, N]
    inside = (attention * region[:, None]).sum((1, 2)) / (region.sum(1) + eps)
    return inside / (attention.sum((1, 2)) / (region.shape[1] + eps))


@contextmanager
def concentrating(processors: Sequence[ConcentrationProcessor], region: Tensor) -> Iterator[None]:
    """Lets processors take the density of samples with masks `region` `[b, N]`."""
    for processor in processors:
        processor.region = region
    yield
    for processor in processors:
        processor.region = processor.density = None
