"""Region-constrained GRPO for flow-based image editors, in JAX.

The package is laid out by idea: `method` holds the paper's equations as pure functions of arrays, `flow` the schedule,
solver and rollouts, `models` the Flax modules, `weights` the way in from and out to diffusers, `rl` post-training, and
`sft` supervised training. Nothing is imported here, so that `import rcgrpo_jax` costs nothing.
"""

__version__ = "0.1.0"
