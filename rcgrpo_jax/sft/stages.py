"""What `rcgrpo sft` can train: FLUX's autoencoder, its flow with its text encoders, or an adapter of any family.

Each stage gives the loss of one example; `sft.train` maps it over the batch and the mesh.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.editors.base import sample
from rcgrpo_jax.editors.flux_kontext import FluxKontext
from rcgrpo_jax.editors.model import Model, to_unit
from rcgrpo_jax.encoding.batches import EditBatch
from rcgrpo_jax.encoding.encode import encode
from rcgrpo_jax.encoding.triples import SUPERVISED, TripleBatches
from rcgrpo_jax.flow import matching
from rcgrpo_jax.method.region import token_region
from rcgrpo_jax.models.clip import CLIPTextEncoder
from rcgrpo_jax.models.lora import init_adapter, scale_adapter, target_kernels
from rcgrpo_jax.models.t5 import T5Encoder
from rcgrpo_jax.parallel.sharding import parameter_sharding, replicated
from rcgrpo_jax.runs.model import load_editor
from rcgrpo_jax.sft.options import Options
from rcgrpo_jax.weights.export import save_folder
from rcgrpo_jax.weights.lora import save_lora


class Stage:
    """What is trained, its loss and its pictures.

    Args:
        options: The run's, validated.
        folder: The model that training starts from; the stages `vae` and `flow` train FLUX's networks alone.
        mesh: The mesh.
        workdir: Directory of the run.
    """

    def __init__(self, options: Options, folder: FluxKontext | Model, mesh: Mesh, workdir: Path):
        self.options, self.folder, self.mesh, self.workdir = options, folder, mesh, workdir
        self.editor = load_editor(options.model, folder, mesh)

    def batches(self) -> Any:
        """Step -> batch on the host, with `instructions`."""
        options, data, tokenizers = self.options, self.options.data, self.folder.tokenizers()
        source = open_source(data.path, data.polarity, data.mask_value, SUPERVISED)
        return TripleBatches(
            source, data.size, options.batch.size, options.seed, tokenizers, self.editor.options.max_text_tokens
        )

    def arrays(self, batch: Any) -> Any:
        """What the loss reads of a batch: a NamedTuple with `source`, `target` and `mask` among its `[S, ...]`."""
        return batch._replace(instructions=())

    def identity(self, batches: Any) -> dict[str, str]:
        """What tells these data from others when a run is resumed; nothing where they have not been read yet."""
        return {}

    def initial(self, key: PRNGKeyArray) -> dict:
        """The parameters to train, float32, on the mesh."""
        raise NotImplementedError

    def frozen(self) -> dict:
        """The parameters that the loss reads and leaves as they are."""
        raise NotImplementedError

    def loss(self, trained: dict, frozen: dict, key: PRNGKeyArray, example: Any) -> tuple[Array, dict[str, Array]]:
        """The loss of one example (a row of `arrays`), and metrics."""
        raise NotImplementedError

    def picture(self, trained: dict, frozen: dict, example: Any) -> Float[Array, "H W 3"]:
        """What the networks make of one example, in [-1, 1]."""
        raise NotImplementedError

    def save(self, trained: dict, examples: Any) -> Path:
        """Writes the result of the run and returns where; `examples` is what `arrays` gives."""
        raise NotImplementedError

    def _float32(self, name: str) -> dict:
        return self.folder.load(name, jnp.float32, parameter_sharding(self.mesh))


class VAEStage(Stage):
    """Reconstruction of sources and targets, half and half (Kingma and Welling 2014).

    The loss of an image x and its reconstruction y is `mean |x - y| + mean |x - y|^2 + w KL(q || N(0, I))`. Shift and
    scale of the latents are measured at the end, so that a unit of latent is a standard deviation.
    """

    def initial(self, key):
        return self._float32("vae")

    def frozen(self):
        return {}

    def loss(self, trained, frozen, key, example):
        key_which, key_crop, key_sample = jax.random.split(key, 3)
        image = jnp.where(jax.random.bernoulli(key_which), example.target, example.source)  # they share most pixels
        image = self._crop(key_crop, to_unit(image))
        vae, variables = self.editor.vae, {"params": trained}
        mean, log_variance = vae.apply(variables, image, method="moments")
        sample = mean + jnp.exp(log_variance / 2) * jax.random.normal(key_sample, mean.shape)
        error = vae.apply(variables, vae.normalise(sample), method="decode").astype(jnp.float32) - image
        squared = jnp.square(error).mean()
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance).mean()
        loss = jnp.abs(error).mean() + squared + self.options.vae.kl_weight * kl
        return loss, {"psnr": 10 * jnp.log10(4.0 / squared), "kl": kl}

    def _crop(self, key: PRNGKeyArray, image: Float[Array, "H W 3"]) -> Float[Array, "h w 3"]:
        side = self.options.vae.crop
        if not side:
            return image
        height, width, _ = image.shape
        top, left = jax.random.randint(key, (2,), 0, jnp.asarray([height - side + 1, width - side + 1]))
        return jax.lax.dynamic_slice(image, (top, left, 0), (side, side, 3))

    def picture(self, trained, frozen, example):
        return self.editor.vae.apply({"params": trained}, to_unit(example.target))

    def save(self, trained, examples):
        images = to_unit(jnp.concatenate([examples.source, examples.target]))
        mean, _ = jax.jit(partial(self.editor.vae.apply, method="moments"))({"params": trained}, images)
        mean = mean.astype(jnp.float32)
        config = replace(self.editor.vae.config, shift_factor=float(mean.mean()), scaling_factor=float(1 / mean.std()))
        target, networks = self.workdir / "model", {"vae": (config, trained)}
        return save_folder(self.folder.path, target, networks, self.options.save_dtype)


class FlowStage(Stage):
    """Flow matching of the transformer, with its text encoders (Lipman et al. 2023; Esser et al. 2024)."""

    @cached_property
    def text_encoders(self) -> tuple[CLIPTextEncoder, T5Encoder]:
        """The networks without their parameters."""
        dtype, config = jnp.dtype(self.options.model.dtype), self.folder.config
        return CLIPTextEncoder(config("text_encoder"), dtype=dtype), T5Encoder(config("text_encoder_2"), dtype=dtype)

    def initial(self, key):
        return {name: self._float32(name) for name in ("transformer", "text_encoder", "text_encoder_2")}

    def frozen(self):
        return {"vae": self.editor.image_params}

    def networks(self, trained: dict, frozen: dict) -> tuple[dict, dict]:
        """All networks' parameters, and the adapter."""
        return frozen | trained, {}

    def condition(self, params: dict, example: Any) -> tuple[Any, Array]:
        """The condition of one example, and the packed latents of its target."""
        clip, t5 = self.text_encoders
        pooled = clip.apply({"params": params["text_encoder"]}, example.clip[None])[0]
        text = t5.apply({"params": params["text_encoder_2"]}, example.t5[None])[0]
        reference, target = self.encode(params, jnp.stack([example.source, example.target]))
        encoded = {"text": text, "pooled": pooled, "reference": reference}
        return self.editor.networks.condition(encoded, self.options.model.guidance), target

    def encode(self, params: dict, pixels: Array) -> Float[Array, "*b N C"]:
        """Packed latents of pictures."""
        return self.editor.networks.encode_image(params["vae"], to_unit(pixels))

    def loss(self, trained, frozen, key, example):
        params, lora = self.networks(trained, frozen)
        condition, data = self.condition(params, example)
        key_sigma, key_noise = jax.random.split(key)
        sigma = self.editor.networks.sample_sigma(key_sigma, len(data), self.options.flow.extra_shift)
        x, velocity = matching.interpolate(data, jax.random.normal(key_noise, data.shape), sigma)
        grid = self.editor.grid(*example.mask.shape)
        predicted, _ = self.editor.networks.velocity(params["transformer"], lora, x, sigma, condition, grid)
        region = token_region(example.mask, grid)
        everywhere, inside = (matching.matching_loss(predicted, velocity, w) for w in (jnp.ones_like(region), region))
        loss = everywhere + self.options.flow.region_weight * inside
        return loss, {"loss_everywhere": everywhere, "loss_inside": inside}

    def picture(self, trained, frozen, example):
        params, lora = self.networks(trained, frozen)
        condition, _ = self.condition(params, example)
        networks = self.editor.networks
        noise = jax.random.normal(jax.random.key(0), networks.source(condition).shape)
        sigmas = networks.sigmas(self.options.flow.picture_steps, len(noise))
        grid = self.editor.grid(*example.mask.shape)
        states = sample(networks, params["transformer"], lora, noise, condition, sigmas, grid)
        return networks.decode(params["vae"], states[-1], grid)

    def save(self, trained, examples):
        networks = {name: (self.folder.config(name), params) for name, params in trained.items()}
        return save_folder(self.folder.path, self.workdir / "model", networks, self.options.save_dtype)


class EncodedTriples(NamedTuple):
    """What the device reads of an `EditBatch`; texts and sources were encoded before."""

    source: Array
    target: Array
    mask: Array
    encoded: dict[str, Array]


class LoRAStage(FlowStage):
    """Flow matching of an adapter alone: supervised fine-tuning of any family.

    Texts and sources are encoded once and cached.
    """

    def __init__(self, options: Options, folder: Model, mesh: Mesh, workdir: Path):
        super().__init__(options, folder, mesh, workdir)
        target_kernels(folder.param_shapes, options.lora.targets)

    def batches(self):
        options = self.options
        where = (options.data, options.model, self.folder, self.workdir, self.mesh)
        return encode(*where, options.batch.size, options.seed, needs=SUPERVISED)

    def identity(self, batches):
        return {"data_digest": batches.source.digest, "model_digest": self.folder.trained_fingerprint()}

    def arrays(self, batch: EditBatch) -> EncodedTriples:
        return EncodedTriples(batch.pixels, batch.targets, batch.mask, batch.encoded)

    def initial(self, key):
        adapter = init_adapter(key, self.editor.params, self.options.lora)
        return jax.device_put(adapter, replicated(self.mesh))

    def frozen(self):
        return {"transformer": self.editor.params, "vae": self.editor.image_params}

    def networks(self, trained, frozen):
        return frozen, scale_adapter(trained, self.options.lora.scale)

    def condition(self, params, example):
        condition = self.editor.networks.condition(example.encoded, self.options.model.guidance)
        return condition, self.encode(params, example.target)

    def save(self, trained, examples):
        lora, params = self.options.lora, self.editor.params
        return save_lora(self.workdir / "lora", trained, lora, params, dtype=self.options.save_dtype)


STAGES = {"vae": VAEStage, "flow": FlowStage, "lora": LoRAStage}
