"""GEdit-Bench (arXiv 2504.17761): 606 instructions of users, each in English and in Chinese, without masks.

The rows name the task, the language, and whether every model of the paper gave an answer (`Intersection_exist`). They
have the picture twice: `input_image`, of about 512 x 512 pixels, which its judge is shown, and `input_image_raw`.
"""

from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.published.base import Published

TASKS = {  # with the rows of each language
    "background_change": 40, "color_alter": 40, "material_alter": 40, "motion_change": 40, "ps_human": 70,
    "style_change": 60, "subject-add": 60, "subject-remove": 57, "subject-replace": 60, "text_change": 99,
    "tone_transfer": 40,
}  # fmt: skip

GEDIT = Published(
    name="gedit",
    hub="stepfun-ai/GEdit-Bench",
    licence="mit",
    form=RowForm(
        image="input_image",
        mask="",
        instruction="instruction",
        task="task_type",
        id=("instruction_language", "Intersection_exist", "key"),
    ),
    splits={"train": {task: 2 * rows for task, rows in TASKS.items()}},
    tasks=tuple(TASKS),
    containers=("arrow", "parquet"),
    layout="the Arrow or Parquet files of the hub",
)
