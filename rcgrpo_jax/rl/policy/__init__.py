"""Policies by name; the option `policy` chooses one."""

from rcgrpo_jax.rl.policy.gaussian import Gaussian
from rcgrpo_jax.rl.policy.neighbour import Neighbour
from rcgrpo_jax.rl.policy.nft import NFT

POLICIES = {"neighbour": Neighbour, "gaussian": Gaussian, "nft": NFT}
