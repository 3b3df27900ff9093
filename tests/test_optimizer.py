"""AdamW as the configuration has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcgrpo_jax.options import OptimizerOptions
from rcgrpo_jax.runs.state import apply_gradients, new_state


@pytest.mark.parametrize(("eps", "share"), [(None, 10 / 11), (1e-15, 1.0), (1e-7, 0.5)])
def test_gradients_as_small_as_eps_move_less(eps, share):
    """The first update is the learning rate times g / (|g| + eps)."""
    options = OptimizerOptions(weight_decay=0.0, **({} if eps is None else {"eps": eps}))
    state = new_state(options, {"B": jnp.zeros(2)}, jax.random.key(0))
    state = apply_gradients(state, {"B": jnp.array([1e-7, -1e-7])}, options)
    np.testing.assert_allclose(state.params["B"], np.array([-1, 1]) * share * options.learning_rate, rtol=1e-4)
