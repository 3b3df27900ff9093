"""An evaluation measures what it says, of the edits a user would get, and puts models side by side fairly."""

import importlib.util
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from jax.sharding import Mesh

from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.data.scenes.files import write_folder
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.edit import edit_all
from rcgrpo_jax.evaluation.evaluate import evaluate
from rcgrpo_jax.evaluation.measure import measure
from rcgrpo_jax.evaluation.measures import REGISTERED, note
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.evaluation.tables import Column, group_table, make_tables, markdown, plain
from rcgrpo_jax.experiments import compare
from rcgrpo_jax.method import concentration, region
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter
from rcgrpo_jax.models.mmdit import AttentionOptions, Condition, sown_masses
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.weights.lora import save_lora

COUNT, SIZE, STEPS, BATCH = 3, 64, 2, 2
OPTIONS = EditorOptions(max_text_tokens=16, attention="xla", acd_layers=10)
MISSING = note(REGISTERED["lpips"])


@cache
def editor(devices: int = 1) -> FluxKontextEditor:
    return FluxKontextEditor(FluxKontext(small_run.model_folder()), OPTIONS, mesh(devices))


def mesh(devices: int = 1) -> Mesh:
    return make_mesh({"fsdp": -1}, jax.devices()[:devices])


@cache
def scenes() -> Scenes:
    return Scenes("heldout", COUNT, SIZE)


@cache
def adapter() -> dict:
    """A LoRA that changes the edits."""
    fresh = init_adapter(jax.random.key(0), editor().params, LoRAConfig(4, 8.0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh))))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh)


def run(source=None, indices=range(COUNT), model=None, **options) -> Evaluation:
    return evaluate(model or editor(), source or scenes(), indices, **{"num_steps": STEPS, "batch": BATCH, **options})


@cache
def base() -> Evaluation:
    return run()


# Evaluations


def test_edits_are_those_of_the_editor_from_noise_of_seed_and_index():
    indices = [2, 1]
    found = run(indices=indices, seed=7)
    examples = [scenes()[i] for i in indices]
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(jax.random.key(7), i), (16, 64)) for i in indices])
    pixels = np.stack([x.image for x in examples])
    edited = editor().edit(pixels, [x.instruction for x in examples], noise, STEPS)
    np.testing.assert_allclose(found.images.astype(int), edited.astype(int), atol=1)
    assert found.names == tuple(x.name for x in examples)
    assert found.kinds == ("replace", "remove")
    other = run(indices=indices, seed=2**32 - 1)
    assert (other.images != found.images).mean() > 0.5


def test_measures_one_value_of_everything_for_every_example():
    names = {"success", "overall", "psnr", "ssim", "lpips", "caption", "acd"}
    assert set(base().measures) == names
    assert base().images.shape == (COUNT, SIZE, SIZE, 3)
    for values in base().measures.values():
        assert values.shape == (COUNT,)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


@pytest.mark.slow
def test_batches_and_devices_change_nothing():
    calls = []
    spread = run(model=editor(2), mesh=mesh(2), batch=3, progress=lambda: calls.append(None))  # one row is padding
    assert len(calls) == COUNT
    np.testing.assert_allclose(spread.images.astype(int), base().images.astype(int), atol=1)
    for name, values in base().measures.items():
        np.testing.assert_allclose(spread.measures[name], values, atol=0.02, rtol=0.01, err_msg=name)


def test_a_lora_edits_from_the_same_noise():
    zero = jax.tree.map(jnp.zeros_like, adapter())
    np.testing.assert_allclose(run(lora=zero).images.astype(int), base().images.astype(int), atol=1)
    assert (run(lora=adapter()).images != base().images).mean() > 0.1


def test_edits_in_a_folder_measure_to_the_digit_as_those_in_memory(tmp_path):
    edit_all(editor(), scenes(), range(COUNT), tmp_path, num_steps=STEPS, batch=BATCH)
    found = measure(tmp_path, scenes(), batch=BATCH)
    assert (found.names, found.settings, found.origin) == (base().names, base().settings, {})
    np.testing.assert_array_equal(found.images, base().images)
    assert set(found.measures) == set(base().measures)
    for name, values in base().measures.items():
        np.testing.assert_array_equal(found.measures[name], values)


def test_acd_is_the_density_of_the_attention_map():
    model, example = editor(), scenes()[0]
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (16, 64))
    text = model.encode_text([example.instruction] * BATCH)
    reference = model.encode_image(np.stack([example.image] * BATCH))
    condition = Condition(text.text[0], text.pooled[0], reference[0], jnp.float32(2.5))
    tokens = region.token_region(jnp.asarray(example.mask), (4, 4))
    with_map = model.transformer.clone(attention=AttentionOptions(acd_map=True))
    variables = {"params": model.params}

    @jax.jit
    def sown():
        args = (noise, jnp.float32(1), condition, (4, 4), tokens)
        return with_map.apply(variables, *args, mutable=["intermediates"])[1]["intermediates"]

    wanted = concentration.density(sown_masses(sown(), "acd_map", 10), tokens).mean()
    found = run(indices=range(BATCH), num_steps=1).measures["acd"][0]
    assert found == pytest.approx(float(wanted), rel=1e-4)
    assert abs(found - 1) > 1e-3


def test_what_is_not_of_scenes_or_not_installed_is_left_out(monkeypatch):
    source = [scenes()[i] for i in range(2)]
    everything = set(base().measures)  # before the patch, which `base` must not be made under
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = run(source, range(2))
    assert set(found.measures) == everything - {"caption", "lpips"}
    resized = run(Scenes("heldout", 2, 2 * SIZE), range(2), size=(SIZE, SIZE))
    assert resized.images.shape == (2, SIZE, SIZE, 3)
    assert "caption" not in resized.measures


def test_is_read_as_it_was_written(tmp_path):
    base().save(tmp_path / "new" / "base.npz")
    read = Evaluation.load(tmp_path / "new" / "base.npz")
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["base.npz"]
    assert (read.names, read.settings, set(read.measures)) == (base().names, base().settings, set(base().measures))
    np.testing.assert_array_equal(read.images, base().images)
    for name, values in base().measures.items():
        np.testing.assert_array_equal(read.measures[name], values)


@pytest.mark.slow
def test_settings_tell_other_data_models_and_rulers(monkeypatch):
    def settings(**options) -> dict:
        return dict(run(indices=[0], num_steps=1, **options).settings)

    first = settings()
    assert settings() == first
    blind = FluxKontextEditor(FluxKontext(small_run.model_folder()), replace(OPTIONS, acd_layers=1))
    assert settings(model=blind)["acd_layers"] != first["acd_layers"]
    assert settings(source=Scenes("validation", 1, SIZE))["data"] != first["data"]
    of = FluxKontext.fingerprint
    for other in ("transformer", "vae", "text_encoder_2", "tokenizer"):  # an edit depends on all of them
        monkeypatch.setattr(
            FluxKontext, "fingerprint", lambda self, x, other=other: "another" * (x == other) or of(self, x)
        )
        assert settings()["model"] != first["model"]


@pytest.mark.parametrize("start", [0, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("rest", [b"", bytes(64)])
def test_a_damaged_file_is_no_evaluation(tmp_path, start, rest):
    """Cut off, or with a hole."""
    file = tmp_path / "base.npz"
    base().save(file)
    content = file.read_bytes()
    start = int(start * len(content))
    file.write_bytes(content[:start] + rest + (content[start + len(rest) :] if rest else b""))
    with pytest.raises(UserError, match="not an evaluation"):
        Evaluation.load(file)


def test_without_targets_what_takes_none_is_measured():
    without = [replace(scenes()[i], target=None) for i in range(2)]
    found = run(without, range(2))
    assert set(found.measures) == {"psnr", "ssim", "lpips", "acd"}
    np.testing.assert_array_equal(found.images, base().images[:2])


def test_refuses_what_it_cannot_measure():
    with pytest.raises(UserError, match=r"heldout-00001-\w+: no target image, and examples before it have theirs"):
        run([scenes()[0], replace(scenes()[1], target=None)], [0, 1], batch=1)
    with pytest.raises(UserError, match=r"heldout-00000-add: its target is flawed on purpose"):
        run([replace(scenes()[0], flawed=True)], [0])
    with pytest.raises(UsageError, match="no examples"):
        run(indices=[])
    with pytest.raises(UsageError, match="40 x 64 pixels found; multiples of 16") as error:
        run(size=(64, 40))
    assert "32x64" in error.value.remedy


# Tables


def made(success, psnr, names=("a", "b", "c"), **settings) -> Evaluation:
    measures = {"success": np.array(success, np.float32), "psnr": np.array(psnr, np.float32)}
    return Evaluation(names, measures, np.zeros((len(names), 1, 1, 3), np.uint8), settings)


COLUMNS = (Column("success", "success", 2, "↑"), Column("psnr", "PSNR", 1, "↑"), Column("lpips", "LPIPS", 3, "↓"))


def test_tables_have_a_row_a_variant_and_differences_in_pairs():
    variants = {
        "base": [made([0.1, 0.5, 0.9], [20, 30, 25])],
        "global": [made([0.2, 0.6, 1.0], [20, 29, 26])] * 2,
        "region": [made([0.2, 0.6, 1.0], [20, 29, 26])],
    }
    assert markdown(make_tables(variants, COLUMNS)).splitlines() == [
        "**Mean of 3 edits [95 % interval]**",
        "",
        "| variant | seeds | success ↑ | PSNR ↑ |",
        "| --- | --- | --- | --- |",
        "| base | 1 | 0.50 [-0.49, 1.49] | 25.0 [12.6, 37.4] |",
        "| global | 2 | 0.60 [-0.39, 1.59] | 25.0 [13.6, 36.4] |",
        "| region | 1 | 0.60 [-0.39, 1.59] | 25.0 [13.6, 36.4] |",
        "",
        "**Difference from base, in pairs (* excludes zero)**",
        "",
        "| variant | success ↑ | PSNR ↑ |",
        "| --- | --- | --- |",
        "| global | +0.10 [+0.10, +0.10] * | +0.0 [-2.5, +2.5] |",
        "| region | +0.10 [+0.10, +0.10] * | +0.0 [-2.5, +2.5] |",
        "",
        "**Difference from the row above, in pairs**",
        "",
        "| variants | success ↑ | PSNR ↑ |",
        "| --- | --- | --- |",
        "| global - base | +0.10 [+0.10, +0.10] * | +0.0 [-2.5, +2.5] |",
        "| region - global | +0.00 [+0.00, +0.00] | +0.0 [+0.0, +0.0] |",
        "",
        "**Difference of each seed from base, in pairs; intervals over edits**",
        "",
        "| variant | seed | success ↑ | PSNR ↑ |",
        "| --- | --- | --- | --- |",
        *[f"| global | {seed} | +0.10 [+0.10, +0.10] * | +0.0 [-2.5, +2.5] |" for seed in (0, 1)],
    ]


def test_success_is_told_by_kind_where_names_tell_it():
    names = ("x-00000-add", "x-00001-remove", "x-00002-add")
    *_, table = make_tables({"base": [made([0.2, 0.5, 0.4], [20, 30, 25], names)]}, COLUMNS)
    assert table.title == "Edit success by kind"
    assert table.lines[0] == ["variant", "add", "remove"]
    assert [cell.split()[0] for cell in table.lines[1]] == ["base", "0.300", "0.500"]


def test_groups_are_compared_by_median_and_in_pairs():
    groups = {"global": np.array([1.0, 3.0, 4.0]), "RDP": np.array([0.5, 2.5, 3.4])}
    table = group_table("drift", groups)
    assert table.title == "drift, 3 groups"
    assert [line[:2] for line in table.lines[1:]] == [["global", "3"], ["RDP", "2.5"]]
    assert table.lines[1][2] == ""
    assert table.lines[2][2] == "-0.533 [-0.677, -0.39] *"  # t = 4.303, standard error 0.0333


def test_plain_tables_are_aligned():
    text = plain(make_tables({"base": [base()], "a longer name": [base()]})).splitlines()
    assert text[0] == f"Mean of {COUNT} edits [95 % interval]"
    assert "LPIPS ↓" in text[1]
    assert {line.index("[") for line in text[2:4]} == {text[2].index("[")}
    assert all(line == line.rstrip() for line in text)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (made([1, 1, 1], [1, 1, 1], names=("a", "b", "d"), steps=28), "other names of examples"),
        (made([1, 1], [1, 1], names=("a", "b"), steps=28), "examples 3 and 2"),
        (made([1, 1, 1], [1, 1, 1], steps=8), "steps 28 and 8"),
    ],
)
def test_only_like_is_compared_with_like(other, problem):
    with pytest.raises(UserError, match=f"{problem} found; the same examples and settings were wanted"):
        make_tables({"base": [made([1, 1, 1], [1, 1, 1], steps=28)], "other": [other]})


# The command


def evaluate_command(out, *argv: str) -> None:
    values = {
        "model": small_run.model_folder(),
        "out": out,
        "data": "scenes:heldout:3",
        "size": "64x64",
        "steps": STEPS,
    }
    values |= {"text_tokens": 16, "dtype": "float32"}
    command.run(small_run.last_of_each(*(f"--{name}={value}" for name, value in values.items()), *argv))


@pytest.mark.slow
def test_the_command_compares_base_and_lora(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "make_mesh", lambda sizes, devices: make_mesh(sizes, devices[:1]))
    of = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "lpips" in name else of(name, *rest))
    lora = save_lora(tmp_path / "lora", adapter(), LoRAConfig(4, 8.0), editor().params)
    out = tmp_path / "out"
    evaluate_command(out, f"--lora={lora}")
    printed = capsys.readouterr().out
    assert "Difference from base" in printed
    assert MISSING in printed
    assert "LPIPS ↓" not in printed
    assert {x.name for x in out.iterdir()} == {"base.npz", "lora.npz", "table.md", "grid.png"}
    assert "last 3 blocks" in printed  # all it has
    assert MISSING in (out / "table.md").read_text()
    pair = [Evaluation.load(out / f"{name}.npz") for name in ("base", "lora")]
    assert pair[0].names == pair[1].names
    assert markdown(make_tables({"base": pair[:1], "lora": pair[1:]})) in (out / "table.md").read_text()


def test_the_command_measures_pictures_of_other_programs(tmp_path, capsys):
    write_folder(scenes(), tmp_path / "data")
    source = EditFolder(tmp_path / "data")
    for i in range(COUNT):
        for folder, picture in (("theirs", source[i].image), ("right", source[i].target)):
            save_image(tmp_path / folder / f"{source[i].name}.png", picture)
    out = tmp_path / "out"
    argv = [f"--pictures={tmp_path / name}" for name in ("theirs", "right")]
    command.run([*argv, f"--data={tmp_path / 'data'}", f"--out={out}"])
    printed = capsys.readouterr().out
    assert "Difference from theirs" in printed
    assert "ACD is not measured" in printed
    assert "caption is not measured" in printed  # of a folder, no caption is known
    assert {x.name for x in out.iterdir()} == {"theirs.npz", "right.npz", "table.md", "grid.png"}
    theirs, right = (Evaluation.load(out / f"{name}.npz") for name in ("theirs", "right"))
    np.testing.assert_allclose(theirs.measures["success"], 0, atol=1e-3)
    np.testing.assert_allclose(right.measures["success"], 1, atol=1e-3)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--lora=nowhere"], "lora: nowhere does not exist"),
        (["--data=scenes:heldout:0"], "count 0 found"),
        (["--data=scenes:heldot"], "'heldot' found"),
        (["--data=scenes:heldout:3:0.4"], "40% flawed targets"),
        (["--size=100x64"], "100 x 64 pixels found"),
        (["--guidance=nan"], "--guidance: nan"),
        (["--out={data}/metadata.jsonl"], "--out: "),
    ],
    ids=" ".join,
)
def test_the_command_says_what_is_wrong(tmp_path, argv, problem):
    argv = [x.format(data=small_run.data_folder()) for x in argv]
    with pytest.raises(UserError, match=problem):
        evaluate_command(tmp_path / "out", *argv)
    assert not list(tmp_path.rglob("*.npz"))
