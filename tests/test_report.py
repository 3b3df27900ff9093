"""A page that a person can read anywhere and trust: nothing from outside, nothing unescaped, the maps as they are."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
import small_run
from PIL import Image
from references import diffusers, torch, transformer_flux

from rcgrpo_jax.cli import report as command
from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.edit import initial_noise
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.evaluation.statistics import Interval
from rcgrpo_jax.evaluation.tables import Table
from rcgrpo_jax.method import concentration, region
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter, scale_adapter
from rcgrpo_jax.report import heatmaps, plots, run_record
from rcgrpo_jax.report.page import Report, Row, data_url, render, write_report
from rcgrpo_jax.rl.config import default_config
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.metrics import MetricsWriter
from rcgrpo_jax.sft import config as sft_config
from rcgrpo_jax.weights.lora import adapter_fingerprint, save_lora

HOSTILE = """<script>alert("1")</script><img src='http://x.test/a.png'> & " ' {{ 7 * 7 }} $\\x$"""
METRICS = [
    {"step": step, "reward/oracle": 0.5 + step / 100, "reward/acd": 1.1, "grad_norm": 0.1 * step, "loss": None}
    for step in range(1, 31)
]
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


def whole_report(text: str = "text", picture: np.ndarray = PICTURE) -> Report:
    """A report with every section, and `text` wherever a user's text can come."""
    interval, values = Interval(0.2, 0.1, 0.3), np.array([0.1, 0.5, 0.9, np.nan])
    return Report(
        title=text,
        facts={text: text},
        settings={text: text},
        script=(text, text),
        commands=[text],
        tables=[Table(text, [[text, "PSNR"], [text, "24.10 [23.00, 25.20]"]])],
        differences={text: {text: interval}},
        examples=[Row(text, [(text, picture), ("edit", picture)])],
        attention=[Row(text, [("ACD 1.2", picture)])],
        attention_top=2.5,
        distributions={f"{text} of": {text: values, "empty": values[3:]}},
        metrics=[{**entry, f"reward/{text}": 1.0} for entry in METRICS],
        grids={text: picture},
    )


class Page(HTMLParser):
    """Reads a page strictly: every element is closed where it should be."""

    VOID = ("meta", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


# The page


def test_the_page_is_well_formed_and_asks_nothing_of_the_network():
    text = render(whole_report())
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    sources = page.values("src", "srcset", "data", "poster")
    assert len(sources) == 5
    assert all(value.startswith("data:image/") for value in sources)
    assert all(value.startswith("#") for value in page.values("href", "xlink:href"))
    assert not re.search(r"https?:|//[a-z]|@import", re.sub(r'"data:[^"]*"', "", text))
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)", text))
    names = page.values("id")
    assert len(names) == len(set(names))


def test_what_a_user_wrote_is_shown_and_never_interpreted():
    page, harmless = Page(render(whole_report(HOSTILE))), Page(render(whole_report("HARMLESS")))
    assert page.tags == harmless.tags
    assert "".join(page.texts).count(HOSTILE) == "".join(harmless.texts).count("HARMLESS") == 21
    assert page.values("alt").count(HOSTILE) == 2
    assert HOSTILE in page.values("aria-label")


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("facts", ["facts"]),
        ("results", ["tables", "differences"]),
        ("examples", ["examples"]),
        ("attention", ["attention"]),
        ("distributions", ["distributions"]),
        ("curves", ["metrics"]),
        ("grids", ["grids"]),
        ("reproduce", ["settings", "script", "commands"]),
    ],
)
def test_a_section_is_there_exactly_when_it_has_content(section, fields):
    assert Page(render(Report("empty"))).values("id") == []
    for name in fields:
        page = Page(render(Report("one", **{name: getattr(whole_report(), name)})))
        assert page.tags.count("section") == 1
        assert section in page.values("id")


def test_a_page_of_large_photographs_stays_small(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 288, 3), np.uint8))
    large = np.asarray(noise.resize((2300, 1280), Image.Resampling.BICUBIC))
    photograph = np.asarray(noise.resize((320, 320), Image.Resampling.BICUBIC))
    row = Row("Make it rain.", [("source", photograph)] * 4)
    write_report(tmp_path / "new" / "page.html", Report("large", examples=[row] * 8, grids={"last": large}))
    assert (tmp_path / "new" / "page.html").stat().st_size < 5e6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_small_pictures_keep_their_pixels():
    kind, _, content = data_url(PICTURE).partition(",")
    assert kind == "data:image/webp;base64"
    np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(content))), PICTURE)


def test_a_page_that_cannot_be_written_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path, Report("a folder"))


# Plots


def test_curves_show_what_the_run_has():
    drawn = plots.curves(METRICS)
    labels = [re.search(r'aria-label="([^"]*)"', svg)[1] for svg in drawn]
    assert labels == ["Rewards", "Gradient norm"]
    assert ">oracle<" in drawn[0]
    assert ">acd<" in drawn[0]
    assert plots.curves([]) == []
    assert len(plots.curves(METRICS[:1])) == 2  # a run that has just begun


def test_the_running_mean_skips_what_is_missing():
    values = np.array([1.0, np.nan, 4.0, 8.0, np.nan, np.nan, np.nan])
    expected = [1, 1, 2.5, 6, 6, 8, np.nan]
    np.testing.assert_allclose(plots._running_mean(values, 3), expected)


def test_plots_take_the_pages_ink_and_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    svg = plots.distributions({"global": np.array([1.0, 2.0, 9.0]), "region": np.array([0.5])}, "drift")
    assert "currentColor" in svg
    assert plots._INK not in svg
    assert "global, median 2<" in svg
    assert "region, median 0.5<" in svg
    assert dict(matplotlib.rcParams) == before


def test_a_full_mark_excludes_zero():
    def fills(low: float, high: float) -> int:
        svg = plots.intervals({"arm": Interval((low + high) / 2, low, high)}, "PSNR")
        return svg.count(f"fill: {plots.COLOURS[0].lower()}")

    assert fills(0.1, 0.3) > fills(-0.1, 0.3)
    assert fills(-0.3, -0.1) > fills(np.nan, np.nan)


# Attention maps

STEPS, GUIDANCE = 2, 2.5
GRID = (4, 4)


@pytest.fixture(scope="module")
def edits() -> SimpleNamespace:
    """Two examples, and everything that an edit of them needs."""
    options = EditorOptions(max_text_tokens=16, attention="xla", acd_layers=2)
    editor = FluxKontextEditor(FluxKontext(small_run.model_folder()), options)
    examples = [EditFolder(small_run.data_folder())[i] for i in range(2)]
    return SimpleNamespace(
        editor=editor,
        images=np.stack([x.image for x in examples]),
        instructions=[x.instruction for x in examples],
        masks=np.stack([x.mask for x in examples]),
        noise=np.random.default_rng(0).standard_normal((2, 16, 64), np.float32),
    )


def maps_of(edits, lora=None) -> heatmaps.AttentionMaps:
    return heatmaps.attention_maps(*vars(edits).values(), STEPS, GUIDANCE, lora)


def explicit_maps(monkeypatch, edits, example: int) -> np.ndarray:
    """`sum_v A(v, u)` of every step and block of diffusers' own pipeline, `[K, blocks, N_img]`, in float64."""
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(small_run.model_folder(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    attend, maps = transformer_flux.dispatch_attention_fn, []

    def spy(query, key, value, **options):
        text, image = slice(0, 16), slice(16, 32)
        scores = torch.einsum("bvhd,buhd->bhvu", query.double(), key.double()) / query.shape[-1] ** 0.5
        attention = scores.softmax(-1)[:, :, text, image]
        maps.append((attention / attention.sum(-1, keepdim=True)).mean(1).sum(1)[0].numpy())
        return attend(query, key, value, **options)

    monkeypatch.setattr("diffusers.models.transformers.transformer_flux.dispatch_attention_fn", spy)
    pipeline(
        image=Image.fromarray(edits.images[example]),
        prompt=edits.instructions[example],
        latents=torch.from_numpy(edits.noise[example : example + 1]),
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=16,
        max_area=64 * 64,
        _auto_resize=False,
    )
    return np.stack(maps).reshape(STEPS, -1, 16)


def test_maps_and_densities_are_those_of_the_explicit_attention(monkeypatch, edits):
    found = maps_of(edits)
    selected = edits.editor.transformer.attention.acd_layers
    for i in range(2):
        a = explicit_maps(monkeypatch, edits, i)[:, -selected:]
        np.testing.assert_allclose(found.maps[i], a.mean((0, 1)), rtol=1e-4)
        mask = np.asarray(region.token_region(edits.masks[i], GRID))
        densities = (a @ mask / mask.sum()) / a.mean(-1)  # [K, L]
        np.testing.assert_allclose(found.acd[i], densities.mean(), rtol=1e-4)
        np.testing.assert_allclose(found.acd[i], concentration.density(found.maps[i], jnp.asarray(mask)), rtol=1e-5)
    np.testing.assert_allclose(found.maps.sum(-1), 16, rtol=1e-5)  # one for each text token
    np.testing.assert_allclose(found.relative().mean(-1), 1, rtol=1e-5)


@pytest.mark.slow
def test_the_edits_under_the_maps_are_the_editors_and_a_lora_changes_both(edits):
    adapter = init_adapter(jax.random.key(0), edits.editor.params, LoRAConfig(rank=2))
    lora = jax.tree.map(lambda x: x + 0.1, adapter)
    arguments = (edits.images, edits.instructions, edits.noise, STEPS, GUIDANCE)
    for name in (None, lora):
        expected = edits.editor.edit(*arguments, name).astype(int)
        assert np.abs(maps_of(edits, name).edited - expected).max() <= 1
    assert np.abs(maps_of(edits, lora).maps - maps_of(edits).maps).max() > 1e-3


def test_an_overlay_is_brightest_where_the_map_is_and_outlines_the_region():
    mask = np.zeros((64, 64), np.float32)
    mask[:16, :16] = 1
    relative = np.full((4, 4), 0.5, np.float32)
    relative[2, 2] = 3
    picture = heatmaps.overlay(np.full((64, 64, 3), 128, np.uint8), relative.reshape(-1), (4, 4), mask, top=3.0)
    assert picture.shape == (192, 192, 3)  # enlarged threefold
    y, x = np.unravel_index(picture.astype(int).sum(-1).argmax(), picture.shape[:2])
    assert (y // 48, x // 48) == (2, 2)
    red = (picture == (230, 30, 30)).all(-1)
    assert red[:48, :48].any()
    assert not red[48:].any()
    assert not red[:, 48:].any()


# The command


def write_run(workdir, config: dict) -> None:
    """A run of three steps with a checkpoint and a picture."""
    with MetricsWriter(workdir, resume_step=0) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"reward/oracle": step / 10, "grad_norm": 1.0})
    if config:
        with Checkpointer(workdir / "checkpoints", save_every=1, keep=1) as checkpointer:
            checkpointer.save(3, {"x": jnp.zeros(1)}, config, force=True)
    (workdir / "images").mkdir()
    Image.fromarray(PICTURE).save(workdir / "images" / "step_000002.png")
    (workdir / "images" / "step_000003.png").write_bytes(b"\x89PNG torn")


def write_evaluation(folder, shift: float = 0.1, lora: dict | None = None) -> None:
    examples = EditFolder(small_run.data_folder())
    images = np.stack([x.image for x in examples])
    settings = {
        "steps": 2, "guidance": 2.5, "seed": 7, "size": [64, 64], "acd_layers": 2, "text_tokens": 16,
        "dtype": "float32", "quantization": "none", "model": FluxKontext(small_run.model_folder()).whole_fingerprint(),
    }  # fmt: skip
    origins = {"base": {}, "lora": {"lora": adapter_fingerprint(lora)} if lora else {}}
    for name, better in (("base", 0.0), ("lora", shift)):
        measures = {"success": np.float32([0.1, 0.4, 0.6]) + better, "psnr": np.float32([20, 25, 21.5])}
        Evaluation(tuple(x.name for x in examples), measures, images, settings, origins[name]).save(
            folder / f"{name}.npz"
        )


def page_of(*argv: object) -> tuple[Page, str]:
    command.run([str(arg) for arg in argv])
    page = Page(next(arg for arg in argv if str(arg).endswith(".html")).read_text(encoding="utf-8"))
    return page, "".join(page.texts)


def test_a_run_becomes_a_page(tmp_path, capsys):
    config = small_run.make_config(rewards__oracle=2.0, explore__kind="global").to_dict()
    write_run(tmp_path, {**config, "data_digest": "abc"})
    command.run([f"--workdir={tmp_path}"])
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    page = Page((tmp_path / "report.html").read_text())
    text = "".join(page.texts)
    assert {"facts", "curves", "grids", "reproduce"} <= set(page.values("id"))
    assert not {"results", "examples", "attention"} & set(page.values("id"))
    for shown in (
        "3 of 4",
        "global, 0.3",
        "oracle (weight 2.0)",
        "rank 4, alpha 8.0",
        "step 2",
        "abc",
        "2 prompts x 4",
    ):
        assert shown in text


@pytest.mark.parametrize("kind", ["region", "global", "mixed"])
def test_facts_name_what_was_perturbed(kind):
    config = small_run.make_config(explore__kind=kind, explore__alpha_edit=0.25, explore__sigma=0.125).to_dict()
    said = run_record.facts(run_record.RunRecord(config, [], {}))["Exploration"]
    assert ("0.25 inside" in said) == (kind != "global")
    assert ("global, 0.125" in said) == (kind != "region")


@pytest.mark.parametrize(
    ("stage", "result"), [("flow", ["--model=again/model"]), ("lora", ["--model=/models/a", "--lora=again/lora"])]
)
def test_the_commands_evaluate_what_a_stage_of_supervised_training_leaves(tmp_path, stage, result):
    config = sft_config.default_config()
    config.stage, config.model.path = stage, "/models/a"
    write_evaluation(tmp_path)
    settings = Evaluation.load(tmp_path / "base.npz").settings
    train, evaluate = run_record.commands(config.to_dict(), "DATA", settings, "black")
    assert train.startswith("rcgrpo sft ")
    assert evaluate.split()[-1] == "--polarity=black"
    assert run_record.commands(config.to_dict(), "DATA", settings, "white", "15")[-1].endswith(" --mask_value=15")
    config.data.mask_value = "2,5"
    assert run_record.commands(config.to_dict(), "", settings)[-1].endswith(" --mask_value=2,5")
    assert [word for word in evaluate.split() if word.startswith(("--model=", "--lora="))] == result


def test_a_run_before_its_first_checkpoint_and_picture_becomes_a_page_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 0, "loss": 0.5}) + '\n{"step": 2, "lo')
    page, _ = page_of("--workdir", tmp_path, "--out", tmp_path / "page.html")
    assert {"facts", "curves"} <= set(page.values("id"))
    assert not {"grids", "reproduce"} & set(page.values("id"))


def test_an_evaluation_adds_results_and_pictures(tmp_path):
    write_run(tmp_path / "run", small_run.make_config().to_dict())
    write_evaluation(tmp_path / "evaluation")
    arguments = ("--workdir", tmp_path / "run", "--evaluation", tmp_path / "evaluation", "--out", tmp_path / "a.html")
    page, text = page_of(*arguments)
    assert "results" in page.values("id")
    assert "examples" not in page.values("id")
    assert "Difference from base" in text
    assert "edit success ↑, difference from base" in page.values("aria-label")
    page, text = page_of(*arguments, "--data", small_run.data_folder())
    assert "lora, edit success 0.500, PSNR 25.00" in text
    assert "2 steps of euler, guidance 2.5, seed 7" in text
    for instruction, _ in small_run.EDITS:
        assert instruction in text
    assert f"--data={small_run.data_folder()} --steps=2 --solver=euler --guidance=2.5 --seed=7 --size=64x64" in text


def test_an_evaluation_of_pictures_of_another_program_is_shown_too(tmp_path):
    write_run(tmp_path / "run", small_run.make_config().to_dict())
    write_evaluation(tmp_path / "evaluation")
    kept = Evaluation.load(tmp_path / "evaluation" / "base.npz")
    alone = replace(kept, settings={"size": [64, 64], "data": "abc"})
    alone.save(tmp_path / "pictures" / "theirs.npz")
    arguments = ("--workdir", tmp_path / "run", "--out", tmp_path / "a.html", "--data", small_run.data_folder())
    page, text = page_of(*arguments, "--evaluation", tmp_path / "pictures")
    assert {"results", "examples"} <= set(page.values("id"))
    assert "3 edits of 64 x 64 pixels" in text
    assert ", guidance 2.5, seed" not in text
    assert "rcgrpo evaluate" not in text  # a model's edits are not what was measured


@pytest.mark.slow
def test_attention_maps_of_base_and_lora(tmp_path, edits):
    """Those of the adapter that was evaluated; another is refused."""
    config = LoRAConfig(rank=2, alpha=4.0)
    adapter = jax.tree.map(lambda x: x + 0.1, init_adapter(jax.random.key(0), edits.editor.params, config))
    save_lora(tmp_path / "lora", adapter, config, edits.editor.params, dtype="float32")
    lora = scale_adapter(adapter, config.scale)
    write_run(tmp_path / "run", small_run.make_config().to_dict())
    write_evaluation(tmp_path / "evaluation", lora=lora)
    arguments = (
        "--workdir", tmp_path / "run", "--evaluation", tmp_path / "evaluation", "--out", tmp_path / "a.html",
        "--data", small_run.data_folder(), "--attention", 2, "--lora", tmp_path / "lora",
    )  # fmt: skip
    page, text = page_of(*arguments)
    assert "attention" in page.values("id")
    noise = initial_noise(7, np.arange(2), (16, 64))
    edits = SimpleNamespace(**{**vars(edits), "noise": noise})
    for name, expected in (("base", maps_of(edits)), ("lora", maps_of(edits, lora))):
        shown = [float(x) for x in re.findall(rf"{name}, ACD ([\d.]+)", text)]
        np.testing.assert_allclose(shown, expected.acd, atol=0.006)
    assert np.abs(maps_of(edits, lora).acd - maps_of(edits).acd).max() > 0.02  # the two could be told apart
    save_lora(tmp_path / "lora", jax.tree.map(lambda x: x + 0.1, adapter), config, edits.editor.params)
    with pytest.raises(UserError, match=r"--lora: .* is not what --evaluation is of"):
        page_of(*arguments)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--workdir={}/none"], "none is no directory"),
        (["--workdir={}/empty"], "neither steps in metrics.jsonl nor a checkpoint"),
        (["--workdir={}/run", "--evaluation={}/empty"], "empty has no .npz files"),
        (["--workdir={}/run", "--evaluation={}/evaluation", "--data=scenes:train:5"], "example 0 is train-00000-add"),
        (["--workdir={}/run", "--evaluation={}/ablation", "--data={data}"], "have no pictures"),
        (["--workdir={}/run", "--attention=2"], "--evaluation, --data and --lora were wanted"),
        (["--workdir={}/run", "--evaluation={}/evaluation", "--data={data}", "--attention=1", "--lora=x"],
         "no checkpoint of `rcgrpo train`"),
        ([], "missing --workdir"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_told(tmp_path, argv, problem):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", {})
    write_evaluation(tmp_path / "evaluation")
    kept = Evaluation.load(tmp_path / "evaluation" / "base.npz")
    replace(kept, images=kept.images[:0]).save(tmp_path / "ablation" / "0.npz")
    with pytest.raises(UserError if argv else UsageError, match=re.escape(problem)):
        command.run([arg.format(tmp_path, data=small_run.data_folder()) for arg in argv])
    assert not list(tmp_path.glob("**/*.html"))


def test_the_configuration_file_gives_the_configuration_again():
    post = small_run.make_config(explore__kind="global", seed=3)
    post.rewards = {"oracle": 1.0}
    post.reward_options.oracle.noise = 0.25
    supervised = sft_config.default_config()
    supervised.update(stage="flow")
    supervised.data.size = (128, 64)
    for config in (post, supervised, default_config()):
        saved = json.loads(json.dumps({**config.to_dict(), "data_digest": "abc"}))
        script = run_record.config_script(saved)
        scope: dict = {}
        exec(script, scope)
        assert json.loads(json.dumps(scope["get_config"]().to_dict())) == json.loads(json.dumps(config.to_dict()))
        assert "abc" not in script
    assert "config." not in script  # the defaults need no line
