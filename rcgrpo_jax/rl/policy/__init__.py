"""Policies by name; the option `policy` chooses one."""

from rcgrpo_jax.rl.policy.neighbour import Neighbour

POLICIES = {"neighbour": Neighbour}
