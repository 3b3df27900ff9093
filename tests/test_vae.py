"""The autoencoder is diffusers' AutoencoderKL, to rounding."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import diffusers, torch
from torch_parity import parameter_count, randomise, relative_error, state_dict_to_params

from rcgrpo_jax.models.config import VAEConfig
from rcgrpo_jax.models.vae import VAE

CONFIGS = {
    "flux": VAEConfig(block_out_channels=(16, 32, 48, 48), norm_num_groups=8),  # widths that change, and one that stays
    "odd": VAEConfig(latent_channels=3, block_out_channels=(5, 15, 35), layers_per_block=1, norm_num_groups=5),
    "plain": VAEConfig(block_out_channels=(8, 8), norm_num_groups=2, mid_block_add_attention=False),
}


def torch_vae(config: VAEConfig) -> diffusers.AutoencoderKL:
    stages = len(config.block_out_channels)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_add_attention,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def abstract_params(config: VAEConfig, param_dtype=jnp.float32) -> dict:
    pixels = jnp.zeros((1, 2 * config.downscale, 2 * config.downscale, 3))
    return jax.eval_shape(VAE(config, param_dtype=param_dtype).init, jax.random.key(0), pixels)["params"]


@cache
def pair(name: str) -> tuple[diffusers.AutoencoderKL, dict]:
    """A random torch autoencoder and our parameters with its weights."""
    theirs = randomise(torch_vae(CONFIGS[name]), seed=0)
    return theirs, {"params": state_dict_to_params(theirs.state_dict(), abstract_params(CONFIGS[name]))}


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def torch_round_trip(name: str, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised latents, and the pixels decoded from them, both channels-last."""
    theirs, _ = pair(name)
    with torch.no_grad():
        mode = theirs.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist.mode()
        latents = (mode - CONFIGS[name].shift_factor) * CONFIGS[name].scaling_factor
        decoded = theirs.decode(mode).sample
    return latents.permute(0, 2, 3, 1), decoded.permute(0, 2, 3, 1)


def our_round_trip(name: str, pixels: np.ndarray, latents: torch.Tensor, dtype=jnp.float32) -> list[jax.Array]:
    """Our latents of the pixels, and our pixels of the given latents."""
    vae, (_, params) = VAE(CONFIGS[name], dtype=dtype), pair(name)

    @jax.jit
    def both(pixels, latents):
        return [vae.apply(params, pixels, method="encode"), vae.apply(params, latents, method="decode")]

    return both(pixels, latents.numpy())


@pytest.mark.parametrize(
    ("name", "shape"), [("flux", (1, 32, 48, 3)), ("odd", (2, 20, 12, 3)), ("plain", (2, 6, 10, 3))]
)
def test_encode_and_decode_match_diffusers_in_fp32(name, shape):
    pixels = random_pixels(*shape)
    expected = torch_round_trip(name, pixels)
    latents, decoded = our_round_trip(name, pixels, expected[0])
    assert relative_error(latents, expected[0]) < 2e-5
    assert relative_error(decoded, expected[1]) < 2e-5


@pytest.mark.slow
def test_bf16_stays_within_five_percent_of_fp32():
    pixels = random_pixels(1, 32, 48, 3)
    expected = torch_round_trip("flux", pixels)
    latents, decoded = our_round_trip("flux", pixels, expected[0], jnp.bfloat16)
    assert latents.dtype == decoded.dtype == jnp.bfloat16
    assert relative_error(latents, expected[0]) < 0.05
    assert relative_error(decoded, expected[1]) < 0.05


def test_leading_axes_are_a_batch():
    vae, (_, params), pixels = VAE(CONFIGS["odd"]), pair("odd"), random_pixels(2, 3, 8, 12, 3)
    reconstruct = jax.jit(lambda pixels: vae.apply(params, pixels))
    nested = reconstruct(pixels)
    np.testing.assert_allclose(nested.reshape(6, 8, 12, 3), reconstruct(pixels.reshape(6, 8, 12, 3)), atol=1e-5)
    np.testing.assert_allclose(nested[1, 0], reconstruct(pixels[1, 0]), atol=1e-5)


def test_parameters_have_the_asked_dtype():
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(CONFIGS["odd"], jnp.bfloat16))} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_flux_size_has_the_parameters_of_diffusers():
    with torch.device("meta"):
        theirs = torch_vae(VAEConfig())
    assert parameter_count(abstract_params(VAEConfig())) == theirs.num_parameters() == 83_819_683
