"""The region-based part of UltraEdit (arXiv 2407.05282): generated edits of 512 x 512 pictures.

A mask that is white throughout stands for an edit of the whole picture. The hub shows 108 thousand rows, and no exact
number is known here.
"""

from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.published.base import Published

ULTRAEDIT = Published(
    name="ultraedit",
    hub="BleachNick/UltraEdit_Region_Based_100k",
    licence="cc-by-4.0",
    form=RowForm(
        image="source_image",
        mask="mask_image",
        instruction="edit_prompt",
        target="edited_image",
        caption="target_caption",
    ),
    splits={"RegionBase": {}},
)
