"""MagicBrush (arXiv 2306.10012): edits by hand in DALL-E 2, several turns an image.

`mask_img` is the source with the region erased, in another size at times; its authors bring it to the source's by the
nearest pixels. A later turn starts from the target of the one before.
"""

from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.published.base import ALL, Published

MAGICBRUSH = Published(
    name="magicbrush",
    hub="osunlp/MagicBrush",
    licence="cc-by-4.0",
    form=RowForm(
        image="source_img",
        mask="mask_img",
        instruction="instruction",
        target="target_img",
        id=("img_id", "turn_index"),
        mask_form="transparent",
        resize_masks=True,
    ),
    splits={"train": {ALL: 8807}, "dev": {ALL: 528}},
)
