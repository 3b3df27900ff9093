"""FLOPs that a step needs, by formula: 2 a multiply-add of every matrix product and convolution, nothing element-wise.

With D the width, N the tokens of a sample and L the blocks, a forward pass is about `24 D^2 L N + 4 L N^2 D`. Which
tokens pass through which kernel is a table, so that sizes come from the parameters themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from flax.traverse_util import flatten_dict

from rcgrpo_jax.flow.solvers import num_evaluations
from rcgrpo_jax.method.sharing import choose_size, parts_of_group
from rcgrpo_jax.models.config import MMDiTConfig, VAEConfig
from rcgrpo_jax.models.lora import LoRAConfig, target_kernels
from rcgrpo_jax.rl.options import ACDOptions, Options
from rcgrpo_jax.rl.policy import POLICIES
from rcgrpo_jax.weights.networks import abstract_params

REGION = 0.12  # of the picture, where nothing else is said
# Path of a kernel -> the tokens that pass through it; the first match counts.
_TOKENS = (
    (r"transformer_blocks/(attn/(add_\w_proj|to_add_out)|ff_context/.*)", "text"),
    (r"transformer_blocks/(attn|ff)/.*", "image"),
    (r"single_transformer_blocks/(attn/.*|proj_mlp|proj_out)", "all"),
    (r"context_embedder", "text"),
    (r"x_embedder", "image"),
    (r"proj_out", "target"),
    (r".*", "one"),  # modulations and the embeddings of time, guidance and pooled text
)
_LAST = r"transformer_blocks/(ff|ff_context)/net_2|single_transformer_blocks/proj_out"  # the last kernel of a block


@cache
def transformer_shapes(config: MMDiTConfig) -> dict:
    """Shapes of the transformer's parameters; kept, since a search asks for them again and again."""
    return abstract_params("transformer", config)


@dataclass(frozen=True)
class Pass:
    """FLOPs of the MMDiT on one sample."""

    forward: float
    backward: float  # with respect to activations and the LoRA, through frozen weights
    recomputed: dict[str, float]  # remat policy -> what the backward pass computes again
    concentration: float  # of the ACD masses, all selected blocks


def mmdit(
    config: MMDiTConfig, text: int, target: int, lora: LoRAConfig, acd: ACDOptions, attention: str = "xla"
) -> Pass:
    """FLOPs of one sample.

    Args:
        config: The transformer's sizes.
        text, target: N_txt and N_img; the reference has as many tokens as the target.
        lora, acd: Of the run.
        attention: A name of `models.attention.IMPLEMENTATIONS`; all but `xla` are flash attention, which keeps no
            scores and computes them again in the backward pass.
    """
    whole = text + 2 * target
    tokens = {"text": text, "image": 2 * target, "all": whole, "target": target, "one": 1}
    return _pass(config, tokens, whole**2, lora, attention, _concentration(config, text, target, acd))


def shared(
    config: MMDiTConfig, text: int, target: int, lora: LoRAConfig, acd: ACDOptions, others: int, size: int,
    attention: str = "xla",
) -> Pass:  # fmt: skip
    """FLOPs of one pass of a candidate and others that share its tokens (`models.sharing`).

    Args:
        config, text, target, lora, acd, attention: As for `mmdit`.
        others: Candidates beside the first.
        size: R, tokens that each of them computes.
    """
    whole, own = text + 2 * target, others * size
    tokens = {"text": text, "image": 2 * target + own, "all": whole + own, "target": whole + own, "one": 1}
    concentration = (1 + others) * _concentration(config, text, target, acd)
    return _pass(config, tokens, (whole + own) * whole, lora, attention, concentration)


def _concentration(config: MMDiTConfig, text: int, target: int, acd: ACDOptions) -> float:
    selected = min(acd.layers, config.num_blocks) if acd.weight else 0
    return 2 * selected * text * target * (2 if acd.reference_keys else 1) * config.width


def _pass(
    config: MMDiTConfig, tokens: Mapping[str, int], pairs: int, lora: LoRAConfig, attention: str, concentration: float
) -> Pass:
    """Of so many tokens of each kind, and of pairs of a query and a key that attend."""
    forward, backward, block_linears = _linears(config, tokens, lora)
    scores = pairs * config.width * config.num_blocks
    again = 0.0 if attention == "xla" else 2 * scores
    return Pass(
        forward + 4 * scores,
        backward + 8 * scores,
        {"none": again, "dots": 4 * scores + again, "full": block_linears + 4 * scores + again},
        concentration,
    )


def _linears(config: MMDiTConfig, tokens: Mapping[str, int], lora: LoRAConfig) -> tuple[float, float, float]:
    """FLOPs of the linear layers: forward, backward, and of those in blocks whose outputs a backward pass needs."""
    params = transformer_shapes(config)
    adapted = target_kernels(params, lora.targets)
    forward = backward = block_linears = 0.0
    for path, kernel in flatten_dict(params).items():
        if path[-1] != "kernel":
            continue
        name = "/".join(path[:-1])
        kind = next(kind for pattern, kind in _TOKENS if re.fullmatch(pattern, name))
        *stack, fan_in, fan_out = kernel.shape
        rows = math.prod(stack) * tokens[kind]
        base = 2 * rows * fan_in * fan_out
        update = 2 * rows * lora.rank * (fan_in + fan_out) if path[:-1] in adapted else 0.0
        forward += base + update
        if kind == "one" or name.endswith("embedder"):
            continue  # before the first adapter: no gradient runs there
        backward += base + 2 * update
        if stack and not re.fullmatch(_LAST, name):  # a block's last product is not needed again
            block_linears += base + update
    return forward, backward, block_linears


def vae_decoder(config: VAEConfig, cells: int) -> float:
    """FLOPs of decoding one image of `cells` latent cells (`models.vae._Decoder`)."""

    def conv(cells: int, fan_in: int, fan_out: int, kernel: int = 9) -> float:
        return 2 * cells * kernel * fan_in * fan_out

    def resnet(cells: int, fan_in: int, fan_out: int) -> float:
        shortcut = conv(cells, fan_in, fan_out, 1) if fan_in != fan_out else 0.0
        return conv(cells, fan_in, fan_out) + conv(cells, fan_out, fan_out) + shortcut

    widths = config.block_out_channels[::-1]
    last = widths[0]
    total = conv(cells, config.latent_channels, last) + 2 * resnet(cells, last, last)
    if config.mid_block_add_attention:
        total += 4 * conv(cells, last, last, 1) + 4 * cells**2 * last
    for i, width in enumerate(widths):
        for _ in range(config.layers_per_block + 1):
            total += resnet(cells, last, width)
            last = width
        if i + 1 < len(widths):
            cells *= 4
            total += conv(cells, width, width)
    return total + conv(cells, last, config.out_channels)


def size_of_region(options: Options, target: int, region: float) -> int:
    """R for a square region in a square picture; 0 if nothing is shared.

    Args:
        options: The run's.
        target: N_img.
        region: Share of the picture, of a batch's largest region.
    """
    if options.rollout.share == "none":
        return 0

    def grown(by: int) -> int:
        return min(math.ceil(math.sqrt(region * target) + 2 * by) ** 2, target) if by >= 0 else 0

    return choose_size(grown(options.rollout.share_grow) + grown(options.rollout.share_grow_reference), target)


def _shared_rollout(
    options: Options, transformer: MMDiTConfig, text: int, target: int, one: Pass, size: int, devices: int
) -> float:
    """FLOPs of all rollouts of a step whose candidates share tokens."""
    rollout = options.rollout
    at_a_time = (rollout.micro_batch or rollout.prompts * rollout.group_size) // rollout.prompts
    parts = parts_of_group(rollout.prompts, devices)
    is_whole = parts == 1 and at_a_time == rollout.group_size
    others = rollout.group_size - 1 if is_whole else at_a_time // parts
    passes = rollout.prompts * parts * (rollout.group_size // at_a_time)
    every, full = num_evaluations(rollout.solver, rollout.num_steps), rollout.share_full_steps
    of_group = shared(transformer, text, target, options.lora, options.acd, others, size)
    forward = full * (1 + others) * one.forward + (every - full) * of_group.forward
    return passes * (forward + rollout.num_steps * of_group.concentration)


def step(
    options: Options,
    transformer: MMDiTConfig,
    vae: VAEConfig,
    text: int,
    target: int,
    attention: str = "xla",
    region: float = REGION,
    devices: int = 1,
) -> dict[str, float]:
    """FLOPs of the three programs over the whole mesh; an update is one of `objective.updates`.

    Args:
        options: The run's.
        transformer, vae: Sizes.
        text, target, attention: As for `mmdit`.
        region: Share of the picture of a batch's largest region, where candidates share tokens outside of it.
        devices: Along `data` and `fsdp`; groups that share tokens may be split over them.
    """
    one = mmdit(transformer, text, target, options.lora, options.acd, attention)
    samples, num_steps = options.rollout.prompts * options.rollout.group_size, options.rollout.num_steps
    evaluations = num_evaluations(options.rollout.solver, num_steps)
    policy, size = POLICIES[options.policy], size_of_region(options, target, region)

    def differentiated(of: Pass) -> float:
        again = of.forward if options.surrogate.anchor_mode == "integrate" else 0.0  # each is a checkpoint by itself
        return of.forward + of.recomputed[options.model.remat] + of.backward + again

    rolled = samples * (evaluations * one.forward + num_steps * one.concentration)
    if size:
        rolled = _shared_rollout(options, transformer, text, target, one, size, devices)
    updated = policy.num_evaluations(options.step) * differentiated(one)
    if size and options.surrogate.share != "none":
        anchors = options.surrogate.anchors
        of_group = shared(transformer, text, target, options.lora, options.acd, anchors, size, attention)
        updated = policy.num_units(options.step) * differentiated(of_group)
    return {
        "rollout": rolled,
        "decode": samples * vae_decoder(vae, 4 * target),
        "update": updated + policy.num_forwards(options.step) * one.forward,
    }
