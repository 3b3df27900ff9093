"""HumanEdit (arXiv 2412.04280): 1024 x 1024 photographs, edited and checked by people.

`MASK_IMG` is the source with the region painted black. Its authors' conversion takes every black pixel for the region;
here dark things of the source are left out (`mask_forms`).
"""

from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.published.base import ALL, Published

HUMANEDIT = Published(
    name="humanedit",
    hub="BryanW/HumanEdit",
    licence="cc-by-4.0",
    form=RowForm(
        image="INPUT_IMG",
        mask="MASK_IMG",
        instruction="EDITING_INSTRUCTION",
        target="OUTPUT_IMG",
        caption="OUTPUT_DESCRIPTION",
        task="EDITING_TYPE",
        id=("IMAGE_ID",),
        mask_form="pure-black",
    ),
    splits={"train": {ALL: 5751}},
    tasks=("action", "add", "counting", "relation", "remove", "replace"),
)
