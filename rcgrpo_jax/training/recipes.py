"""`rcgrpo_jax.rl.recipes` is the name now."""

from rcgrpo_jax.rl.recipes import kontext_512, kontext_1024, small_editor, small_editor_balanced

__all__ = ["kontext_512", "kontext_1024", "small_editor", "small_editor_balanced"]
