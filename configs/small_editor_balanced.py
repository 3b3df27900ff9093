"""Two rewards in balance on the small editor: the centre that the settings of docs/findings.md were compared around.

    rcgrpo train --config configs/small_editor_balanced.py --workdir runs/balanced

`configs/small_editor.py` has what was found since.
"""

from ml_collections import ConfigDict

from rcgrpo_jax.rl.recipes import small_editor_balanced


def get_config() -> ConfigDict:
    return small_editor_balanced()
