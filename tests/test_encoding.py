"""Encoders run once, changed inputs never meet old results, and a batch is a function of the step."""

import dataclasses
import errno
import json
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from PIL import Image
from safetensors.numpy import load_file
from small_run import EDITS

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.tfds import TfdsSource
from rcgrpo_jax.data.tfds_writer import write_tfds
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor, TextEncoding
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.encoding.batches import Batches
from rcgrpo_jax.encoding.cache import EncodedSource
from rcgrpo_jax.encoding.index import READING
from rcgrpo_jax.encoding.prefetch import THREADS, read_ahead
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.parallel import distributed
from rcgrpo_jax.weights import random_folder

SIZE = (64, 64)


@pytest.fixture
def calls(monkeypatch):
    """Replaces the encoders by stand-ins that note what they are asked for."""
    calls = []

    def encode_text(self, instructions):
        calls.append(instructions)
        shape = len(instructions), self.options.max_text_tokens, 32
        text = jnp.broadcast_to(jnp.array([len(x) for x in instructions], self.dtype)[:, None, None], shape)
        return TextEncoding(text, text[:, 0], np.full(len(instructions), 3))

    def encode_image(self, pixels):
        calls.append(pixels.shape)
        return jnp.zeros((len(pixels), pixels.shape[1] * pixels.shape[2] // 256, 64))

    monkeypatch.setattr(FluxKontextEditor, "encode_text", encode_text)
    monkeypatch.setattr(FluxKontextEditor, "encode_image", encode_image)
    return calls


def make_editor(dtype: str = "float32", tokens: int = 16, path=None) -> FluxKontextEditor:
    return FluxKontextEditor(FluxKontext(path or small_run.model_folder()), EditorOptions(dtype, tokens))


def make_example(**changes) -> EditExample:
    mask = np.zeros((64, 64), np.float32)
    mask[8:40, 8:40] = 1
    example = EditExample("a", np.zeros((64, 64, 3), np.uint8), mask, "Make it red.")
    return dataclasses.replace(example, **changes)


def entries(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_each_example_is_encoded_once(calls, tmp_path):
    source = EditFolder(small_run.data_folder())
    done = []
    first = EncodedSource(source, make_editor(), SIZE, tmp_path / "new" / "cache", progress=lambda *n: done.append(n))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert calls == [[instruction for instruction, _ in small_run.EDITS], (3, 64, 64, 3)]  # together
    calls.clear()
    second = EncodedSource(source, make_editor(), SIZE, tmp_path / "new" / "cache")
    assert not calls
    for i in range(len(source)):
        assert first[i].keys() == second[i].keys()
        for key, value in first[i].items():
            np.testing.assert_array_equal(value, second[i][key])


def test_what_lies_in_a_cache_of_before_is_found(calls, monkeypatch, tmp_path):
    """An entry is named by a hash of all that it depends on: hashed in another way, all data would be encoded anew."""
    monkeypatch.setattr(FluxKontextEditor, "load_encoders", lambda self: None)
    editor = FluxKontextEditor(FluxKontext("small-editor"), EditorOptions("bfloat16"))
    EncodedSource([make_example()], editor, SIZE, tmp_path)
    assert entries(tmp_path) == {"3ded6313ce07f3ad31535904178986a8.safetensors"}


def test_encoded_together_is_encoded_alone(tmp_path):
    """The last of three, two at a time, is filled up; of two equal ones one is encoded."""
    source = EditFolder(small_run.data_folder())
    together = EncodedSource([*(source[i] for i in range(3)), source[0]], make_editor(), SIZE, tmp_path / "together")
    for i in range(3):
        alone = EncodedSource([source[i]], make_editor(), SIZE, tmp_path / "alone")[0]
        for name, value in together[i].items():
            if name == "instruction":
                assert value == alone[name]
            else:
                np.testing.assert_allclose(
                    np.float32(value), np.float32(alone[name]), rtol=1e-4, atol=1e-5, err_msg=name
                )
    assert entries(tmp_path / "together") == entries(tmp_path / "alone")


def test_masks_are_kept_as_bytes_and_come_back_as_they_were(calls, tmp_path):
    mask = (np.arange(64 * 64).reshape(64, 64) % 256).astype(np.float32) / 255
    encoded = EncodedSource([make_example(mask=mask)], make_editor(), SIZE, tmp_path)
    assert encoded[0]["mask"].dtype == np.float32
    np.testing.assert_array_equal(encoded[0]["mask"], mask)
    (file,) = tmp_path.iterdir()
    assert load_file(file)["mask"].dtype == np.uint8


def test_captions_are_kept_where_they_are_asked_for(calls, tmp_path):
    def encoded(caption: str, captions: bool) -> EncodedSource:
        source = [make_example(caption=caption)]
        return EncodedSource(source, make_editor(), SIZE, tmp_path, captions=captions)

    first = encoded("A red box.", True)
    assert Batches(first, 2, 0)[0].captions == ("A red box.",) * 2
    assert encoded("A blue box.", True)[0]["caption"] == "A blue box."  # and no old result
    plain = encoded("A red box.", False)
    assert "caption" not in plain[0]
    assert Batches(plain, 2, 0)[0].captions is None
    assert plain.digest == encoded("A blue box.", False).digest != first.digest
    assert len(entries(tmp_path)) == 3


# Several processes, and several runs, on one cache; tests/test_encode_processes.py has real ones.


@pytest.fixture
def run_on_two(monkeypatch):
    """Runs a function on two threads, each of which is a process to the package."""
    here, barrier, rows = threading.local(), threading.Barrier(2, timeout=60), {}

    def gather(x):
        rows[here.index] = np.asarray(x)
        barrier.wait()
        gathered = np.concatenate([rows[0], rows[1]])
        barrier.wait()
        return gathered

    def run(function):
        def one(index: int):
            here.index = index
            return function(index)

        with ThreadPoolExecutor(2) as pool:
            return [*pool.map(one, range(2))]

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr("jax.process_index", lambda: here.index)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    return run


def numbered(count: int) -> list[EditExample]:
    return [make_example(instruction=f"Make box {i} red.") for i in range(count)]


@pytest.mark.parametrize("kept", [(), (0, 2, 4, 6)], ids=["all", "those-of-one"])
def test_two_processes_share_what_is_missing(calls, run_on_two, tmp_path, kept):
    """Equal examples are encoded by one of them, and what a process had done before a stop is not its share again."""
    examples, done = [*numbered(9), numbered(1)[0]], [[], []]
    for index in kept:
        run_on_two(lambda _, i=index: EncodedSource([examples[i]], make_editor(), SIZE, tmp_path))
    sources = run_on_two(
        lambda p: EncodedSource(examples, make_editor(), SIZE, tmp_path, progress=lambda *n: done[p].append(n))
    )
    missing = 9 - len(kept)
    assert sorted(source.made for source in sources) == [missing // 2, missing - missing // 2]
    assert len(list(tmp_path.glob("*.safetensors"))) == 9
    assert [told[-1] for told in done] == [(5, 5), (5, 5)]
    assert sources[0].digest == sources[1].digest


def test_processes_with_a_disk_each_have_all_on_both(calls, run_on_two, tmp_path):
    sources = run_on_two(lambda p: EncodedSource(numbered(5), make_editor(), SIZE, tmp_path / str(p)))
    assert [source.made for source in sources] == [5, 5]
    assert [source[4]["instruction"] for source in sources] == ["Make box 4 red."] * 2


def test_what_was_written_before_a_stop_is_not_encoded_again(calls, tmp_path, monkeypatch):
    save, saved = EncodedSource._save, []

    def stop(self, file, *given):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(file)
        save(self, file, *given)

    with monkeypatch.context() as patch:
        patch.setattr(EncodedSource, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            EncodedSource(numbered(5), make_editor(), SIZE, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in saved}
    assert EncodedSource(numbered(5), make_editor(), SIZE, tmp_path).made == 2
    assert {file: file.stat().st_mtime_ns for file in saved} == before


def test_the_index_has_what_another_run_found_meanwhile(calls, read, tmp_path):
    one, two, cache = (small_run.write_data(tmp_path / "one"), small_run.write_data(tmp_path / "two"), tmp_path / "c")
    others = []

    def start_another(_) -> None:
        if not others:
            others.append(None)  # before the first has written what it found
            start(two, cache)

    start(one, cache, start_another)
    read.clear()
    start(one, cache)
    start(two, cache)
    assert read == []


def test_what_is_read_ahead_comes_in_order_and_is_never_far_ahead():
    started, taken = [], []

    def work(item: int) -> int:
        started.append(item)
        if item == 40:
            raise UserError("40", "")
        return item * item

    def take() -> None:
        for result in read_ahead(work, range(100)):
            taken.append(result)
            assert len(started) <= len(taken) + 2 * THREADS + 1

    with pytest.raises(UserError, match="40"):
        take()
    assert taken == [item * item for item in range(40)]


# The index: a start that finds the files unchanged reads none of them.


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """The examples that are read, by index."""
    read, getitem = [], EditFolder.__getitem__
    monkeypatch.setattr(EditFolder, "__getitem__", lambda self, i: read.append(i) or getitem(self, i))
    return read


def start(data: Path, cache: Path, validate=lambda _: None) -> EncodedSource:
    return EncodedSource(EditFolder(data), make_editor(), SIZE, cache, validate)


def test_a_second_start_reads_nothing(calls, read, tmp_path):
    data = small_run.write_data(tmp_path / "data")
    first = start(data, tmp_path / "cache")
    read.clear()
    checked = []
    second = start(data, tmp_path / "cache", checked.append)
    assert read == []
    assert second.digest == first.digest
    assert [(x.instruction, x.has_target, x.flawed) for x in checked] == [(text, False, False) for text, _ in EDITS]

    def refuse(example) -> None:
        if example.instruction == EDITS[1][0]:
            raise UserError(f"{example.name}: no", "")

    with pytest.raises(UserError, match="00002-1: no"):
        start(data, tmp_path / "cache", refuse)
    assert read == []


def test_a_second_start_reads_nothing_of_a_tfds_dataset(calls, monkeypatch, tmp_path):
    written = str(write_tfds(EditFolder(small_run.write_data(tmp_path / "data")), "edits", tmp_path))
    first = EncodedSource(TfdsSource(written), make_editor(), SIZE, tmp_path / "cache")
    monkeypatch.setattr(TfdsSource, "__getitem__", lambda self, i: pytest.fail("read"))
    assert EncodedSource(TfdsSource(written), make_editor(), SIZE, tmp_path / "cache").digest == first.digest


def test_what_has_changed_is_read_again(calls, read, tmp_path):
    data, cache = small_run.write_data(tmp_path / "data"), tmp_path / "cache"
    start(data, cache)
    before = entries(cache)
    read.clear()
    os.utime(data / "2.png", ns=(0, 0))  # the same pixels: they are read, and their encodings are there
    start(data, cache)
    assert (read, entries(cache)) == ([2], before)
    read.clear()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(data / "1.png")
    table = data / "metadata.jsonl"
    table.write_text(table.read_text().replace(EDITS[0][0], "Paint it black."))
    start(data, cache)
    assert set(read) == {0, 1}
    assert len(entries(cache)) == len(before) + 2


def test_an_entry_that_is_gone_is_made_again(calls, read, tmp_path):
    data, cache = small_run.write_data(tmp_path / "data"), tmp_path / "cache"
    first = start(data, cache)
    gone = sorted(cache.glob("*.safetensors"))[0]
    gone.unlink()
    read.clear()
    start(data, cache)
    assert len(read) == 1
    assert gone.is_file()
    assert start(data, cache).digest == first.digest


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', '{"a": ["x", "y", "z", 1, false]}', "[" * 100_000])
def test_a_damaged_index_counts_for_nothing(calls, read, tmp_path, text):
    data, cache = small_run.write_data(tmp_path / "data"), tmp_path / "cache"
    start(data, cache)
    (index,) = cache.glob("index-*.json")
    index.write_text(text)
    read.clear()
    start(data, cache)
    assert sorted(read) == [0, 1, 2]
    read.clear()
    start(data, cache)
    assert read == []


def test_an_entry_whose_name_is_none_counts_for_nothing(calls, read, tmp_path):
    data, cache = small_run.write_data(tmp_path / "data"), tmp_path / "cache"
    start(data, cache)
    (index,) = cache.glob("index-*.json")
    index.write_text(json.dumps({stamp: ["zz", *row[1:]] for stamp, row in json.loads(index.read_text()).items()}))
    read.clear()
    start(data, cache)
    assert sorted(read) == [0, 1, 2]


def test_a_cache_that_cannot_be_written_is_read(calls, read, tmp_path, monkeypatch):
    """One of before the index, on a disk for reading alone."""
    data, cache = small_run.write_data(tmp_path / "data"), tmp_path / "cache"
    first = start(data, cache)
    for file in cache.glob("index-*.json"):
        file.unlink()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("write_text", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, refuse)
    assert start(data, cache).digest == first.digest


def test_a_cache_in_a_file_is_refused_before_encoders_are_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(FluxKontextEditor, "load_encoders", lambda self: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache: .*/file/cache cannot be written"):
        EncodedSource([make_example()], make_editor(), SIZE, tmp_path / "file" / "cache")


@pytest.mark.parametrize("size", [0, 100])
def test_an_entry_that_was_cut_short_is_made_anew(calls, tmp_path, size):
    data, cache = small_run.write_data(tmp_path / "data"), tmp_path / "cache"
    start(data, cache)
    file = sorted(cache.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    assert start(data, cache).made == 1
    assert file.read_bytes() == whole


def test_reading_in_another_way_reads_again(calls, read, tmp_path, monkeypatch):
    data, cache = small_run.write_data(tmp_path / "data"), tmp_path / "cache"
    start(data, cache)
    read.clear()
    monkeypatch.setattr("rcgrpo_jax.encoding.cache.READING", READING + 1)
    start(data, cache)
    assert sorted(read) == [0, 1, 2]


def test_other_settings_do_not_share_an_index(calls, read, tmp_path):
    data, cache = small_run.write_data(tmp_path / "data"), tmp_path / "cache"
    start(data, cache)
    read.clear()
    EncodedSource(EditFolder(data), make_editor(tokens=8), SIZE, cache)
    assert set(read) == {0, 1, 2}


def test_a_stamp_changes_with_the_marking(tmp_path):
    data = small_run.write_data(tmp_path / "data")
    assert EditFolder(data).stamp(0) != EditFolder(data, polarity="black").stamp(0)
    assert EditFolder(data).stamp(0) == EditFolder(data).stamp(0)


@pytest.mark.parametrize(
    "change",
    [
        {"instruction": "Make it blue."},
        {"image": np.full((64, 64, 3), 1, np.uint8)},
        {"mask": np.ones((64, 64), np.float32)},
        {"target": np.zeros((64, 64, 3), np.uint8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_example_is_encoded_anew(calls, tmp_path, change):
    EncodedSource([make_example()], make_editor(), SIZE, tmp_path)
    EncodedSource([make_example(**change)], make_editor(), SIZE, tmp_path)
    assert len(entries(tmp_path)) == 2
    EncodedSource([make_example(), make_example(**change)], make_editor(), SIZE, tmp_path)
    assert len(entries(tmp_path)) == 2
    assert len(calls) == 4


def test_changed_settings_make_new_entries(calls, tmp_path):
    other_weights = random_folder.build(tmp_path / "model", seed=1, configs=small_run.TINY)
    cache, example = tmp_path / "cache", make_example()
    settings = [
        (make_editor(), SIZE),
        (make_editor(), (64, 32)),
        (make_editor(dtype="bfloat16"), SIZE),
        (make_editor(tokens=8), SIZE),
        (make_editor(path=other_weights), SIZE),
    ]
    for count, (editor, size) in enumerate(settings, start=1):
        encoded = EncodedSource([example], editor, size, cache)
        assert len(entries(cache)) == count
        assert encoded[0]["pixels"].shape == (*size, 3)
        assert encoded[0]["mask"].shape == size
        assert encoded[0]["text"].shape[0] == editor.options.max_text_tokens
        assert encoded[0]["text"].dtype == jnp.dtype(editor.dtype)


def test_a_damaged_entry_is_named(calls, tmp_path):
    encoded = EncodedSource([make_example()], make_editor(), SIZE, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=file.name) as error:
        encoded[0]
    assert "Remove the file" in error.value.remedy


def test_an_entry_that_could_not_be_finished_is_written_again(calls, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk; the process ignores SIGXFSZ
    try:
        with pytest.raises(UserError, match=r"data\.cache: .* cannot be written \(.*File too large"):
            EncodedSource([make_example()], make_editor(), SIZE, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path) == set()
    assert EncodedSource([make_example()], make_editor(), SIZE, tmp_path)[0]["instruction"] == "Make it red."


def test_an_example_is_checked_before_it_is_encoded(calls, tmp_path):
    def refuse(example: EditExample) -> None:
        raise UserError(f"{example.instruction}: no", "")

    with pytest.raises(UserError, match=r"Make it red\.: no"):
        EncodedSource([make_example()], make_editor(), SIZE, tmp_path, refuse)
    assert not calls


def test_other_data_on_another_process_are_refused(calls, tmp_path, monkeypatch):
    source = EditFolder(small_run.data_folder())
    monkeypatch.setattr(distributed, "sum_over_processes", lambda x: x ^ (x.dtype == np.uint8))  # hashes
    with pytest.raises(UserError, match="example 0 has changed, or is another on another process"):
        EncodedSource(source, make_editor(), SIZE, tmp_path)
    monkeypatch.setattr(distributed, "gather", lambda sizes: np.array([3, 2]))
    with pytest.raises(UserError, match="different numbers of examples, 3, 2"):
        EncodedSource(source, make_editor(), SIZE, tmp_path)


def test_text_weights_count_the_instruction_and_its_end():
    """By the real tokenizer: a token for each word, one for the full stop, one for the end."""
    trainer = small_run.make_trainer()
    for batch in (small_run.make_batch(trainer, step) for step in range(3)):
        words = np.array([len(instruction.replace(".", " .").split()) for instruction in batch.instructions])
        weights = batch.encoded["text_weights"]
        assert weights.shape == (2, 16)
        np.testing.assert_array_equal(weights.sum(-1), words + 1)
        np.testing.assert_array_equal(weights, np.sort(weights, axis=-1)[:, ::-1])


class Numbers:
    """A source of numbered examples."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        arrays = dict.fromkeys(("reference", "text", "pooled", "text_weights", "pixels", "mask"), np.full(2, index))
        return {**arrays, "instruction": str(index)}


def order(batches: Batches, steps: range) -> list[int]:
    return [int(name) for step in steps for name in batches[step].instructions]


def test_every_epoch_is_another_permutation():
    batches = Batches(Numbers(12), prompts=3, seed=0)
    epochs = [order(batches, range(4 * epoch, 4 * epoch + 4)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert list(range(12)) not in epochs
    assert order(Batches(Numbers(12), prompts=3, seed=1), range(4)) != epochs[0]


def test_a_batch_is_a_function_of_the_step():
    whole = order(Batches(Numbers(5), prompts=2, seed=3), range(20))
    backwards = Batches(Numbers(5), prompts=2, seed=3)
    for step in reversed(range(20)):
        assert order(backwards, range(step, step + 1)) == whole[2 * step : 2 * step + 2]


def test_rows_of_a_batch_belong_together():
    batch = Batches(Numbers(7), prompts=4, seed=0)[2]
    for array in (*batch.encoded.values(), batch.pixels, batch.mask):
        np.testing.assert_array_equal(array[:, 0], [int(name) for name in batch.instructions])


def test_targets_come_along_where_every_example_has_one(calls, tmp_path):
    target = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with_target = make_example(target=target)
    source = EncodedSource([with_target], make_editor(), SIZE, tmp_path)
    np.testing.assert_array_equal(Batches(source, 2, seed=0)[0].targets, np.stack([target, target]))
    mixed = EncodedSource([with_target, make_example()], make_editor(), SIZE, tmp_path)
    assert Batches(mixed, 2, seed=0)[0].targets is None


def test_the_digest_tells_other_data_or_another_order(calls, tmp_path):
    one, two = make_example(), make_example(instruction="Make it blue.")
    digests = [
        EncodedSource(source, make_editor(), SIZE, tmp_path).digest for source in ([one, two], [two, one], [one])
    ]
    assert len(set(digests)) == 3
    assert EncodedSource([one, two], make_editor(), SIZE, tmp_path).digest == digests[0]
