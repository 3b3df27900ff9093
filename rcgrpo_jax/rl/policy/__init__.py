"""Policies by name; the option `policy` chooses one."""

from rcgrpo_jax.rl.policy.gaussian import Gaussian
from rcgrpo_jax.rl.policy.neighbour import Neighbour

POLICIES = {"neighbour": Neighbour, "gaussian": Gaussian}
