"""A curve has one value a step after any crash; the picture of a step can be read."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rcgrpo_jax.errors import UserError, is_everywhere
from rcgrpo_jax.progress import Progress
from rcgrpo_jax.runs.grid import GridRow, comparison_grid
from rcgrpo_jax.runs.metrics import MetricsWriter, check_finite, read_metrics


def write(workdir, steps, resume_step=0, **extra):
    with MetricsWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.scalars(step, {"loss": step / 4, **extra})


def events(workdir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loaded = accumulator.EventAccumulator(str(workdir / "tensorboard"), size_guidance={"images": 0})
    return loaded.Reload()


def test_a_step_is_one_line_on_disk_at_once(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.scalars(1, {"loss": jnp.float32(0.5), "reward/total": np.float64(1.25), "count": 3})
        (entry,) = read_metrics(tmp_path / "metrics.jsonl")  # before the writer is closed
    assert {**entry, "time": 0} == {"step": 1, "time": 0, "loss": 0.5, "reward/total": 1.25, "count": 3.0}
    assert entry["time"] > 0


def test_values_that_are_not_finite_are_null_in_valid_json(tmp_path):
    write(tmp_path, [1], nan=jnp.nan, inf=-math.inf)

    def refuse(token):
        raise AssertionError(token)

    entry = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert entry["nan"] is None
    assert entry["inf"] is None
    assert entry["loss"] == 0.25


def test_values_that_are_not_finite_are_gaps_in_tensorboard(tmp_path, caplog):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step, value in enumerate((1.0, math.nan, math.inf, 2.0), start=1):
            writer.scalars(step, {"reward/judge": value})
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("reward/judge")] == [(1, 1.0), (4, 2.0)]
    assert not caplog.records


def test_a_resumed_run_repeats_no_step(tmp_path):
    write(tmp_path, range(1, 8), run=0)
    write(tmp_path, range(5, 10), resume_step=4, run=1)
    found = [(entry["step"], entry["run"]) for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [(step, 0.0) for step in range(1, 5)] + [(step, 1.0) for step in range(5, 10)]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("run")] == found


def test_a_new_run_starts_an_empty_curve(tmp_path):
    write(tmp_path, [1, 2])  # killed before its first checkpoint
    write(tmp_path, [1])
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4', "{", "4", '"'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]
    write(tmp_path, [4], resume_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_broken_line_elsewhere_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a JSON object with a step: 'not json'"):
        read_metrics(path)


def test_images_reach_tensorboard_unchanged(tmp_path):
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.images(3, {"candidates": image})
    (event,) = events(tmp_path).Images("candidates")
    assert event.step == 3
    np.testing.assert_array_equal(Image.open(io.BytesIO(event.encoded_image_string)), image)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "train/loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_lost_run_is_stopped_by_name_and_step(name, value):
    with pytest.raises(UserError, match=f"Step 12: {name} is {value}") as caught:
        check_finite({"reward": 1.0, name: jnp.float32(value)}, 12)
    assert is_everywhere(caught.value)


def test_other_metrics_may_be_missing():
    check_finite({"loss": 0.0, "train/grad_norm": jnp.float32(1), "reward/editscore": math.nan}, 1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Log(io.StringIO):
    """A log file that remembers what was flushed."""

    flushed = ""

    def flush(self):
        self.flushed = self.getvalue()


def test_progress_in_a_log_is_one_flushed_line_a_step():
    log = Log()
    with Progress(100, 11, "train", file=log) as progress:
        progress.update({"reward": jnp.float32(0.41), "loss": -1.5e-6}, samples=8)
        assert log.flushed == log.getvalue() != ""
        progress.update()
    first, second = log.getvalue().splitlines()
    assert first.startswith("train: step 12/100  reward 0.41  loss -1.5e-06  ")
    assert first.endswith(" samples/s")
    assert second == "train: step 13/100"


def test_progress_on_a_terminal_is_a_bar():
    terminal = Terminal()
    with Progress(100, 11, "train", file=terminal) as progress:
        progress.update({"reward": 0.41}, samples=8)
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("train:  12%")
    assert "12/100" in last
    assert "reward=0.41" in last
    assert "samples/s" in last


def make_row(instruction="make it red", size=(24, 36), group=3, mask=None, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 128, (group + 1, *size, 3), np.uint8)  # no pixel is red
    if mask is None:
        mask = np.zeros(size, np.float32)
        mask[6:18, 9:27] = 1
    return GridRow(instruction, images[0], mask, images[1:], [f"{x:.3f}" for x in rng.normal(size=group)])


def is_red(grid):
    return (grid == (230, 30, 30)).all(-1)


def corner_of(grid, image):
    """(x, y) of the one place where `image` stands in the grid."""
    height, width, _ = image.shape
    starts = np.argwhere((grid == image[0, 0]).all(-1))
    (corner,) = [(x, y) for y, x in starts if np.array_equal(grid[y : y + height, x : x + width], image)]
    return corner


def test_candidates_stand_in_order_enlarged_by_whole_pixels():
    row = make_row()
    grid = comparison_grid([row])
    assert grid.dtype == np.uint8
    enlarged = [image.repeat(5, 0).repeat(5, 1) for image in row.candidates]  # 36 -> 180 >= 160
    corners = [corner_of(grid, image) for image in enlarged]
    assert corners == sorted(corners)
    assert len({y for _, y in corners}) == 1
    assert len({x for x, _ in corners}) == len(corners)


def test_the_region_is_outlined_inside_and_two_pixels_wide():
    red = is_red(comparison_grid([make_row()]))
    ys, xs = np.nonzero(red)
    assert (np.ptp(ys) + 1, np.ptp(xs) + 1) == (12 * 5, 18 * 5)
    region = red[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    assert region[:2].all()
    assert region[-2:].all()
    assert region[:, :2].all()
    assert region[:, -2:].all()
    assert not region[2:-2, 2:-2].any()


def test_an_empty_mask_draws_nothing_and_a_full_one_frames_the_image():
    assert not is_red(comparison_grid([make_row(mask=np.zeros((24, 36)))])).any()
    framed = is_red(comparison_grid([make_row(mask=np.ones((24, 36)))]))
    assert framed.sum() == 180 * 120 - 176 * 116


def test_rows_of_several_sizes_and_scripts_fit_one_picture():
    texts = ["a " * 300, "x" * 2000, "猫を青く 🎨 العربية", "lone \ud800 surrogate", "two\nlines\tand a \x00 null", ""]
    sizes = [(24, 36), (16, 16), (200, 300), (700, 40), (5, 900), (160, 160)]
    rows = [
        make_row(text, size, group=i + 1, mask=np.zeros(size))
        for i, (text, size) in enumerate(zip(texts, sizes, strict=True))
    ]
    grid = comparison_grid(rows, title="step 12 " * 100)
    border = np.concatenate(
        [grid[:4].reshape(-1, 3), grid[-4:].reshape(-1, 3), grid[:, :8].reshape(-1, 3), grid[:, -8:].reshape(-1, 3)]
    )
    assert (border == 255).all()  # no text and no image runs out of the picture
    assert grid.shape[1] == 2 * 16 + 7 * (320 + 8) - 8
    np.testing.assert_array_equal(grid, comparison_grid(rows, title="step 12 " * 100))


def test_captions_of_narrow_images_stand_side_by_side():
    grid = comparison_grid([make_row(size=(320, 20), group=2, mask=np.zeros((320, 20)))])
    assert grid.shape[1] == 2 * 16 + 3 * (160 + 8) - 8


def test_captions_stand_above_their_images_and_widen_the_columns():
    row = make_row()
    pictures = [
        comparison_grid([GridRow(row.instruction, row.source, row.mask, row.candidates, [first, "b", "c"])])
        for first in ("a", "x", "colour 0.123  preservation 0.456  acd 1.012")
    ]
    assert (pictures[0] != pictures[1]).any()
    assert pictures[2].shape[1] > pictures[0].shape[1]


def test_a_long_job_may_print_fewer_lines():
    file = io.StringIO()
    with Progress(100, description="convert", lines=4, file=file) as progress:
        for _ in range(100):
            progress.update()
    assert [line.split()[2] for line in file.getvalue().splitlines()] == ["25/100", "50/100", "75/100", "100/100"]
