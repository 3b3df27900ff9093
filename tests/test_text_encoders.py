"""T5 and CLIP are transformers' T5EncoderModel and CLIPTextModel, to rounding."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import Reference, torch, transformers
from torch_parity import parameter_count, randomise, relative_error, state_dict_to_params

from rcgrpo_jax.models.clip import CLIPTextEncoder, eos_position
from rcgrpo_jax.models.config import CLIPTextConfig, T5Config
from rcgrpo_jax.models.t5 import T5Encoder, relative_position_buckets

T5 = T5Config(
    vocab_size=50,
    d_model=24,
    d_kv=8,  # heads x d_kv is not d_model
    d_ff=40,
    num_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,  # within the longer test sequence
)
CLIP = CLIPTextConfig(
    vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, eos_token_id=57
)


def torch_t5(config: T5Config) -> transformers.T5EncoderModel:
    fields = dict(vars(config), feed_forward_proj="gated-gelu")
    return transformers.T5EncoderModel(transformers.T5Config(**fields))


def torch_clip(config: CLIPTextConfig) -> transformers.CLIPTextModel:
    fields = dict(vars(config), hidden_act="quick_gelu", bos_token_id=0)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields))


def abstract_params(model: T5Encoder | CLIPTextEncoder) -> dict:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


@cache
def t5_pair() -> tuple[transformers.T5EncoderModel, dict]:
    theirs = randomise(torch_t5(T5), seed=0)
    return theirs, {"params": state_dict_to_params(theirs.state_dict(), abstract_params(T5Encoder(T5)))}


@cache
def clip_pair(eos_token_id: int) -> tuple[CLIPTextConfig, transformers.CLIPTextModel, dict]:
    config = replace(CLIP, eos_token_id=eos_token_id)
    theirs = randomise(torch_clip(config), seed=0)
    params = state_dict_to_params(theirs.state_dict(), abstract_params(CLIPTextEncoder(config)))
    return config, theirs, {"params": params}


def random_tokens(vocab_size: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, shape).astype(np.int32)


def clip_tokens(batch: int, length: int = 77) -> np.ndarray:
    """Texts of several lengths that end with 57 and hold the larger id 58 before or after it."""
    tokens = random_tokens(56, batch, length)
    for row, end in enumerate(np.linspace(5, length - 2, batch).astype(int)):
        tokens[row, end:] = 57
        tokens[row, end + (1 if row % 2 else -2)] = 58
    return tokens


@pytest.mark.parametrize("shape", [(1, 7), (2, 33)])
def test_t5_matches_transformers_in_fp32(shape):
    theirs, params = t5_pair()
    tokens = random_tokens(T5.vocab_size, *shape)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).last_hidden_state
    assert relative_error(jax.jit(T5Encoder(T5).apply)(params, tokens), expected) < 1e-5


def test_t5_in_bf16_stays_within_five_percent_of_fp32():
    theirs, params = t5_pair()
    tokens = random_tokens(T5.vocab_size, 2, 33)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).last_hidden_state
    ours = jax.jit(T5Encoder(T5, dtype=jnp.bfloat16).apply)(params, tokens)
    assert ours.dtype == jnp.bfloat16
    assert relative_error(ours, expected) < 0.05


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64)])
def test_t5_buckets_are_those_of_transformers(num_buckets, max_distance):
    positions = torch.arange(600)
    expected = Reference("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket(
        positions[None, :] - positions[:, None], True, num_buckets, max_distance
    )
    np.testing.assert_array_equal(relative_position_buckets(600, num_buckets, max_distance), expected.numpy())


@pytest.mark.parametrize("eos_token_id", [2, 57])
@pytest.mark.parametrize("batch", [1, 4])
def test_clip_pooled_vector_matches_transformers_in_fp32(eos_token_id, batch):
    config, theirs, params = clip_pair(eos_token_id)
    tokens = clip_tokens(batch)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).pooler_output
    assert relative_error(jax.jit(CLIPTextEncoder(config).apply)(params, tokens), expected) < 1e-5


def test_clip_in_bf16_stays_within_five_percent_of_fp32():
    config, theirs, params = clip_pair(57)
    tokens = clip_tokens(4)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).pooler_output
    ours = jax.jit(CLIPTextEncoder(config, dtype=jnp.bfloat16).apply)(params, tokens)
    assert ours.dtype == jnp.bfloat16
    assert relative_error(ours, expected) < 0.05


def test_clip_ends_at_the_largest_id_or_at_the_first_end_token():
    tokens = jnp.array([[3, 57, 58, 57], [58, 3, 57, 57]])
    assert eos_position(tokens, eos_token_id=2).tolist() == [2, 0]
    assert eos_position(tokens, eos_token_id=57).tolist() == [1, 2]


def test_clip_refuses_more_tokens_than_positions():
    config, _, params = clip_pair(57)
    with pytest.raises(ValueError, match="78 tokens; CLIP has 77 positions"):
        CLIPTextEncoder(config).apply(params, clip_tokens(1, length=78))


@pytest.mark.parametrize("encoder", ["t5", "clip"])
def test_leading_axes_are_a_batch(encoder):
    if encoder == "t5":
        model, params, tokens = T5Encoder(T5), t5_pair()[1], random_tokens(T5.vocab_size, 6, 9)
    else:
        model, params, tokens = CLIPTextEncoder(CLIP), clip_pair(57)[2], clip_tokens(6, length=20)
    encode = jax.jit(model.apply)
    batched, nested = encode(params, tokens), encode(params, tokens.reshape(2, 3, -1))
    assert nested.shape == (2, 3, *batched.shape[1:])
    np.testing.assert_allclose(nested.reshape(batched.shape), batched, atol=1e-5)
    np.testing.assert_allclose(encode(params, tokens[4]), batched[4], atol=1e-5)


@pytest.mark.parametrize(
    "model", [T5Encoder(T5, param_dtype=jnp.bfloat16), CLIPTextEncoder(CLIP, param_dtype=jnp.bfloat16)]
)
def test_parameters_have_the_asked_dtype(model):
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(model))} == {jnp.dtype(jnp.bfloat16)}


def test_flux_sizes_have_the_parameters_of_transformers():
    with torch.device("meta"):
        t5, clip = torch_t5(T5Config()), torch_clip(CLIPTextConfig())
    assert parameter_count(abstract_params(T5Encoder(T5Config()))) == t5.num_parameters() == 4_762_310_656
    assert parameter_count(abstract_params(CLIPTextEncoder(CLIPTextConfig()))) == clip.num_parameters() == 123_060_480
