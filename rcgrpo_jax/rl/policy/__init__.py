"""Policies by name; `config.policy` chooses one."""

from rcgrpo_jax.rl.policy.neighbour import Neighbour

POLICIES = {"neighbour": Neighbour}
