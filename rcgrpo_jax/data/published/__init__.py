"""The published data sets that can be read: a file each, and a line here."""

from rcgrpo_jax.data.published.base import ALL, Published
from rcgrpo_jax.data.published.cocoedit import COCOEDIT
from rcgrpo_jax.data.published.compbench import COMPBENCH
from rcgrpo_jax.data.published.gedit import GEDIT
from rcgrpo_jax.data.published.humanedit import HUMANEDIT
from rcgrpo_jax.data.published.imgedit import IMGEDIT
from rcgrpo_jax.data.published.magicbrush import MAGICBRUSH
from rcgrpo_jax.data.published.ultraedit import ULTRAEDIT

PUBLISHED = {data.name: data for data in (COMPBENCH, GEDIT, IMGEDIT, MAGICBRUSH, HUMANEDIT, ULTRAEDIT, COCOEDIT)}

__all__ = ["ALL", "PUBLISHED", "Published"]
