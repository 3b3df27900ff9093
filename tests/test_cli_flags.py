"""Values of flags that absl lets pass and nobody can mean: two for one, none, not finite, other digits, too large."""

import numpy as np
import pytest
import small_run
from absl import flags

from rcgrpo_jax import borders
from rcgrpo_jax.cli.arguments import parse, parse_size
from rcgrpo_jax.cli.edit import read_noise
from rcgrpo_jax.cli.lora_flags import define_lora, read_lora
from rcgrpo_jax.data.scenes.source import parse_scenes
from rcgrpo_jax.editors.open import check_fits, open_model
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.parallel.slurm import whole_number
from rcgrpo_jax.plan.topology import open_topology

ARABIC, WIDE = "\N{ARABIC-INDIC DIGIT FOUR}", "\N{FULLWIDTH DIGIT FOUR}"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("count", 1, "", flag_values=values)
    flags.DEFINE_float("share", 0.5, "", 0.0, 1.0, flag_values=values)
    flags.DEFINE_string("name", None, "", values)
    flags.DEFINE_bool("search", False, "", values)
    flags.DEFINE_list("kinds", ["a"], "", values)
    flags.DEFINE_multi_string("each", [], "", values)
    flags.DEFINE_multi_float("scale", [], "", flag_values=values)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--count=1", "--count=2"], "--count: given 2 times; one value was wanted."),
        (["--count=1", "--count", "1"], "--count: given 2 times"),
        (["--name=a", "-name=b", "--name=c"], "--name: given 3 times"),
        (["--search", "--nosearch"], "--search: given 2 times"),
        (["--kinds=a,b", "--kinds=c"], "--kinds: given 2 times"),
        (["--name="], "--name: blank; a value was wanted."),
        (["--name", " "], "--name: blank"),
        (["--each=a", "--each="], "--each: blank"),
        (["--share=nan"], "--share: nan found; a number was wanted."),
        (["--scale=1", "--scale=-inf"], "--scale: -inf found"),
    ],
)
def test_values_that_are_refused(argv, problem):
    with pytest.raises(UsageError, match=problem):
        parse("test", "", argv, define)


@pytest.mark.parametrize("argv", [["--lora=a", "--lora_scale=1", "--lora_scale=2"], ["--lora_scale=1"]])
def test_each_lora_has_one_strength(argv):
    values, _ = parse("test", "", argv, define_lora)
    with pytest.raises(UsageError, match=r"--lora_scale: \d strengths for \d LoRAs"):
        read_lora(values, None)


def test_flags_that_take_several_values_do():
    values, _ = parse("test", "", ["--each=a", "--each=b", "--kinds=a,b", "--scale=1", "--scale=0.5"], define)
    assert (values.each, values.kinds, values.scale) == (["a", "b"], ["a", "b"], [1.0, 0.5])


@pytest.mark.parametrize("flag", ["config.seed", "config"])
def test_a_field_of_the_configuration_is_one_value_too(capsys, tmp_path, flag):
    file = small_run.config_file(tmp_path / "config.py")
    value = {"config": file, "config.seed": 3}[flag]
    argv = ["train", *[f"--config={file}"] * (flag != "config"), f"--workdir={tmp_path / 'run'}"]
    argv += [f"--{flag}={value}"] * 2
    code, problem, _ = small_run.fail(capsys, *argv)
    assert (code, problem) == (2, f"--{flag}: given 2 times; one value was wanted.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", [WIDE + "x128", ARABIC + "x128", "128x12" + WIDE, "1" * 5000 + "x16"])
def test_sizes_have_digits_of_ascii(text):
    with pytest.raises(UsageError, match="WIDTHxHEIGHT in pixels was wanted"):
        parse_size(text)


@pytest.mark.parametrize("text", ["\N{SUPERSCRIPT TWO}", ARABIC, WIDE, "1" * 5000, "-1", "", None, "1\n"])
def test_numbers_of_the_environment_have_too(text):
    assert whole_number(text) is None
    assert whole_number("12") == 12


@pytest.mark.parametrize("text", [f"train:{ARABIC}", "train:" + "1" * 5000, f"train:3:{WIDE}"])
def test_counts_of_scenes_have_too(text):
    with pytest.raises(UsageError, match="was wanted"):
        parse_scenes(text)


@pytest.mark.parametrize("name", [f"v5e:4x{ARABIC}", "v5e:" + "1" * 5000, "v5e:99999x99999", "99999*h100:8"])
def test_slices_that_cannot_be_meant(name):
    with pytest.raises(UsageError, match="--topology"):
        open_topology(name)


@pytest.mark.parametrize(
    ("size", "steps", "count", "problem"),
    [
        ((10**6, 10**6), 1, 1, "--size: 1000000x1000000 takes"),
        ((1024, 1024), 10**12, 1, "--steps: 1000000000000 takes"),
        ((1024, 1024), 1, 10**6, "--size: 1024x1024 takes"),
    ],
)
def test_pictures_and_steps_that_no_memory_holds(monkeypatch, size, steps, count, problem):
    monkeypatch.setattr(borders, "memory_bytes", lambda: 2**40)
    model = open_model(small_run.model_folder())
    check_fits(model, (1024, 1024), 28, "bfloat16")
    with pytest.raises(UserError, match=problem):
        check_fits(model, size, steps, "bfloat16", count)


@pytest.mark.parametrize("argv", [["--size=1000000"], [f"--count={10**12}"]])
def test_scenes_that_neither_memory_nor_disk_holds(capsys, tmp_path, argv):
    code, problem, _ = small_run.fail(capsys, "data", "scenes", f"--out={tmp_path / 'out'}", *argv)
    assert code == 1
    assert problem.startswith(argv[0].partition("=")[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 64000), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 400 + b",), }",
        b"((((((((" * 200,
        b"\xff\xfe",
    ],
)
def test_noise_whose_header_claims_too_much_is_not_allocated(tmp_path, header):
    file = tmp_path / "noise.npy"
    file.write_bytes(np.lib.format.magic(1, 0) + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + bytes(64))
    with pytest.raises(UserError, match=r"--noise: .* cannot be read as .npy"):
        read_noise(str(file), (16, 64))
