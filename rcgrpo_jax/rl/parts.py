"""Candidates in parts: a micro-batch of a rollout has as many of every group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def split_groups(candidates: Any, at_a_time: int) -> list[Any]:
    """A tree of `[P, G, ...]` in parts of so many candidates of each group."""
    leaves, tree = jax.tree.flatten(candidates)
    parts = (jnp.split(x, x.shape[1] // at_a_time, axis=1) for x in leaves)
    return [jax.tree.unflatten(tree, part) for part in zip(*parts, strict=True)]


def join(*parts: Any) -> Any:
    """Trees of `[P, g, ...]`, side by side."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
