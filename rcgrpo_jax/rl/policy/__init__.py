"""Policies by name; the option `policy` chooses one."""

from rcgrpo_jax.rl.policy.neighbour import Neighbour
from rcgrpo_jax.rl.policy.nft import NFT

POLICIES = {"neighbour": Neighbour, "nft": NFT}
