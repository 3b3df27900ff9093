"""RC-GRPO on the small editor that ships with the package: minutes on two cores.

    rcgrpo train --config configs/small_editor.py --workdir runs/small_editor

The recipe of docs/findings.md; `rcgrpo demo` runs fewer and larger steps of it on fewer scenes.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import small_editor


def get_config() -> ConfigDict:
    return small_editor()
