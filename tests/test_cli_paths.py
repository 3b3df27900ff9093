"""Paths as people type them: `~` is the home directory everywhere, and no command writes over what it reads."""

import os
from pathlib import Path

import pytest
import small_run
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from PIL import Image

from rcgrpo_jax.cli import ablate
from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.config_file import load_config
from rcgrpo_jax.cli.data import COMMANDS as DATA_COMMANDS
from rcgrpo_jax.cli.main import COMMANDS
from rcgrpo_jax.cli.paths import (
    PathParser,
    check_apart,
    check_file,
    check_workdir,
    expand_fields,
    expand_home,
    is_path_field,
    path_flag,
)
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.report.page import Report, write_report
from rcgrpo_jax.rl import config
from rcgrpo_jax.runs.workdir import LOCK, hold, make_folder
from rcgrpo_jax.sft import config as sft_config

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~/runs/a", "{home}/runs/a"),
        ("~", "{home}"),
        ("tfds:~/data/1.0.0@train", "tfds:{home}/data/1.0.0@train"),
        ("~root/a", os.path.expanduser("~root/a")),
        ("runs/~/a", "runs/~/a"),
        ("./~/a", "./~/a"),
        ("scenes:train:4", "scenes:train:4"),
    ],
)
def test_the_home_directory(home, path, expanded):
    assert expand_home("--out", path) == expanded.format(home=home)


def test_a_home_that_is_nobodys_is_refused():
    with pytest.raises(UsageError, match=r"--out: '~nobody-here/a' found, and ~nobody-here is nobody's") as error:
        expand_home("--out", "~nobody-here/a")
    assert error.value.remedy == "Write ./~nobody-here/a if the name itself begins with ~."


def test_path_flags_and_fields_are_expanded(home):
    values, _ = parse("test", "", ["--out=~/a"], lambda values: path_flag("out", "", values))
    assert values.out == f"{home}/a"
    (home / "c.py").write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'a': 1})")
    assert load_config("~/c.py", "").a == 1
    given = ConfigDict({"model": {"path": "~/m", "dtype": "~"}, "data": {"path": 3, "cache": "~/c"}, "lora": {}})
    expand_fields(given)
    assert given.to_dict() == {
        "model": {"path": f"{home}/m", "dtype": "~"}, "data": {"path": 3, "cache": f"{home}/c"}, "lora": {},
    }  # fmt: skip
    assert ablate.read_variant("a: model.path=~/m acd.weight=0.5").changes == {
        "model.path": f"{home}/m", "acd.weight": 0.5,
    }  # fmt: skip


TEXTS = {  # flags and fields whose text is no path
    "instruction", "mask_value", "size", "coordinator", "num_processes", "process_id", "topology", "variant", "config",
    "reward", "option", "plugin", "success", "threshold", "step", "question", "adapter",
    "judge", "judge_option",
}  # fmt: skip
COLUMNS = {"image", "mask", "instruction", "target", "caption", "task", "split"}  # of data prepare: names in a table


@pytest.mark.parametrize(
    "command", [*(name for name in COMMANDS if name != "data"), *(f"data_{name}" for name in DATA_COMMANDS)]
)
def test_every_flag_of_text_is_a_path_or_known_not_to_be(monkeypatch, command):
    """A new flag that names a file must not forget `~`."""
    defined = {}

    def keep(*args, **kwargs):
        values = flags.FlagValues()
        args[3](values)
        defined.update({name: values[name] for name in values})
        raise UsageError("", "")

    module = __import__(f"rcgrpo_jax.cli.{command}", fromlist=["run"])
    for place in (module, __import__("rcgrpo_jax.cli.config_file", fromlist=["parse"])):
        if hasattr(place, "parse"):
            monkeypatch.setattr(place, "parse", keep)
    for action in getattr(module, "ACTIONS", [None]):
        with pytest.raises(UsageError):
            module.run([action] if action else [])
    plain = {name for name, flag in defined.items() if type(flag.parser) is flags.ArgumentParser}
    assert defined
    assert plain <= (COLUMNS if command == "data_prepare" else TEXTS)
    assert any(isinstance(flag.parser, PathParser) for flag in defined.values())


def test_every_path_of_a_configuration_is_known():
    defaults = (module.default_config().to_dict() for module in (config, sft_config))
    fields = [field for default in defaults for field in flatten_dict(default, sep=".")]
    names = ("path", "cache", "init", "folder", "file", "samples")
    paths = {field for field in fields if field.rpartition(".")[2] in names}
    assert all(map(is_path_field, [*paths, "reward_options.rubric.template"]))


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["demo", "--out=a\udcff"], "--out"),
        (["convert", "a", "a\udcff"], "DST"),
        (["train", "--config=config.py", "--workdir=a\udcff"], "--workdir"),
        (["ablate", "--config=config.py", "--out=a\udcff"], "--out"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_checkpoints_need_a_name_that_is_text(capsys, argv, field):
    small_run.config_file(Path("config.py"))
    code, problem, _ = small_run.fail(capsys, *argv)
    assert (code, problem) == (2, f"{field}: 'a\\udcff' found; a name in UTF-8 was wanted.")
    assert [path.name for path in Path().iterdir()] == ["config.py"]


# Outputs


def link(kind: str, path: Path) -> Path:
    """Another name of a file."""
    other = path.with_name(f"other{path.suffix}")
    match kind:
        case "symlink":
            other.symlink_to(path)
        case "hard link":
            os.link(path, other)
        case "relative":
            (path.parent / "a").mkdir()
            return path.parent / "a" / ".." / path.name
        case "same":
            return path
    return other


@pytest.mark.parametrize("kind", ["same", "symlink", "hard link", "relative"])
def test_an_output_is_no_input_by_another_name(home, kind):
    image = home / "image.png"
    image.write_bytes(PNG)
    with pytest.raises(UsageError, match=r"--out: .* is --image .*, which is read"):
        check_file("out", link(kind, image), ".png", {"--noise": None, "--image": image})


@pytest.mark.parametrize(
    ("name", "content", "suffix"),
    [
        ("notes.txt", b"", ".html"),
        ("metrics.jsonl", b'{"step": 1}', ".html"),
        ("page.html", b'{"step": 1}', ".html"),
        ("out.png", b"text", ".png"),
        ("config.json", b'{\n  "_class_name": "Flux"', ".json"),
        ("page.png", PNG, ".html"),
    ],
)
def test_an_output_does_not_replace_another_kind_of_file(home, name, content, suffix):
    file = home / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=name):
        check_file("out", file, suffix)
    assert file.read_bytes() == content


def test_an_output_replaces_what_the_command_wrote_before(home):
    write_report(home / "page.html", Report("one"))
    check_file("out", home / "page.html", ".html")
    Image.new("RGB", (1, 1)).save(home / "out.PNG")
    check_file("out", home / "out.PNG", ".png")
    (home / "empty.json").touch()
    check_file("json", home / "empty.json", ".json")
    check_file("json", home / "new" / "plan.json", ".json")
    for number, plan in enumerate(sorted((small_run.ROOT / "docs" / "plans").glob("*.json"))):
        copy = home / f"{number}.json"
        copy.write_bytes(plan.read_bytes())
        check_file("json", copy, ".json")


@pytest.mark.parametrize(
    ("out", "data", "allowed"),
    [
        ("data", "data", False),
        ("data/images", "data", False),
        ("link", "data", False),
        ("data", "data/metadata.jsonl", False),
        ("data", "tfds:data@test", False),
        ("data/results", "data", True),
        ("data/new/place", "data", True),
        ("elsewhere", "data", True),
        ("data", "scenes:heldout:3", True),
        ("data", None, True),
        ("loop", "data", True),  # which nothing can be written to
        ("loop/results", "data", True),
    ],
)
def test_results_do_not_go_among_what_is_read(home, out, data, allowed):
    for file in ("data/images/0.png", "data/results/grid.png", "data/results/base.npz", "data/metadata.jsonl"):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    (home / "link").symlink_to("data/images")
    (home / "loop").symlink_to("loop")
    if allowed:
        return check_apart("--out", Path(out), {"--data": data}, ("*.npz", "grid.png"))
    with pytest.raises(UsageError, match=r"--out: .* is .*--data .*, which is read"):
        check_apart("--out", Path(out), {"--data": data}, ("*.npz", "grid.png"))


def test_a_run_does_not_replace_what_it_starts_from(home):
    (home / "run" / "model").mkdir(parents=True)
    given = ConfigDict({"stage": "flow", "model": {"path": "run/model"}, "data": {"path": "scenes:train"}, "lora": {}})
    with pytest.raises(UsageError, match=r"the run's result: run/model is model.path run/model, which is read"):
        check_workdir(Path("run"), given)
    check_workdir(Path("other"), given)
    given.data.path = "."
    check_workdir(Path("other"), given)
    given.data.cache = "run/model/cache"
    check_workdir(Path("other"), given)
    given.data.cache = "run/model"
    with pytest.raises(UsageError, match=r"data\.cache: run/model is model\.path run/model, which is read"):
        check_workdir(Path("other"), given)
    del given.data.cache
    given.data.path = "scenes:train"
    with pytest.raises(UsageError, match=r"--workdir: run/model is model.path run/model"):
        check_workdir(Path("run/model"), given)


def test_a_run_below_its_data_goes_on(home):
    config = ConfigDict({"model": {"path": "model"}, "data": {"path": "data"}})
    run = home / "data" / "run"
    make_folder(run, "workdir")
    with hold(run):
        pass
    assert [file.name for file in run.iterdir()] == [LOCK]
    check_workdir(run, config)
    (run / "metadata.jsonl").touch()
    with pytest.raises(UsageError, match=r"--workdir: .* is in data\.path data"):
        check_workdir(run, config)


def test_export_does_not_write_among_the_checkpoints(capsys, home):
    (home / "run" / "checkpoints" / "4").mkdir(parents=True)
    code, problem, _ = small_run.fail(capsys, "export", "--workdir=run", "--out=run/checkpoints/4")
    assert code == 2
    assert problem.startswith("--out: run/checkpoints/4 is in checkpoints of --workdir run/checkpoints")
    assert not list((home / "run").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "file", ["metadata.jsonl", "images/cat.png", "instructions/cat.txt", "dataset_info.json"]
)  # of another data set
def test_scenes_do_not_replace_other_examples(capsys, home, file):
    (home / "data" / file).parent.mkdir(parents=True)
    (home / "data" / file).write_text('{"image": "images/cat.png"}')
    code, problem, _ = small_run.fail(capsys, "data", "scenes", "--out=data", "--count=1", "--size=32")
    assert (code, problem) == (1, f"--out: data holds another data set (data/{file}).")
    assert [path.name for path in (home / "data").rglob("*") if path.is_file()] == [Path(file).name]


def test_scenes_replace_scenes(capsys):
    argv = ["data", "scenes", "--out=~/data", "--count=1", "--size=32"]
    assert small_run.run_command(capsys, *argv)[0] == 0
    Path("data/metadata.jsonl").write_text(Path("data/metadata.jsonl").read_text() * 2)
    assert small_run.run_command(capsys, *argv, "--split=heldout")[0] == 0
    assert len(Path("data/metadata.jsonl").read_text().splitlines()) == 1
    assert not Path("~").exists()
