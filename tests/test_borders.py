"""What comes from outside is of its type and fits into memory, or is refused by name."""

from dataclasses import dataclass
from typing import Annotated

import pytest
from annotated_types import Gt

from rcgrpo_jax import borders
from rcgrpo_jax.borders import STRICT, check_memory, conform, parse_json, read_object
from rcgrpo_jax.errors import UserError


@dataclass(frozen=True)
class Shape:
    __pydantic_config__ = STRICT
    layers: Annotated[int, Gt(0)] = 3
    scale: float = 1.0
    axes: tuple[int, ...] = (1,)


def test_values_of_their_types_come_through():
    found = conform({"layers": 5, "scale": 2, "axes": [1, 2]}, Shape, "config.json", "")
    assert found == Shape(5, 2.0, (1, 2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"layers": True}, "config.json: layers: True found, a valid integer wanted."),
        ({"layers": 8.0}, "config.json: layers: 8.0 found, a valid integer wanted."),
        ({"layers": "8"}, "config.json: layers: '8' found, a valid integer wanted."),
        ({"layers": None}, "config.json: layers: None found, a valid integer wanted."),
        ({"layers": 0}, "config.json: layers: 0 found, greater than 0 wanted."),
        ({"scale": float("nan")}, "config.json: scale: nan found, a finite number wanted."),
        ({"axes": 3}, "config.json: axes: 3 found, a valid array wanted."),
        ({"layers": parse_json("[" * 300 + "]" * 300)}, "config.json: layers: lists or objects in more"),
        ([1], r"config.json: the whole: \[1\] found, an object wanted."),
        ({"layers": 0, "scale": "x"}, "layers: 0 found, .*\n  scale: 'x' found, a valid number wanted."),
    ],
)
def test_a_value_of_another_type_is_named_with_its_place(value, message):
    with pytest.raises(UserError, match=message):
        conform(value, Shape, "config.json", "Correct it.")


def test_endless_nesting_is_no_json():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


@pytest.mark.parametrize("content", [b"[1]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_without_an_object_is_refused(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        read_object(file, "Copy it again.")


def test_a_file_of_another_kind_is_called_by_its_name(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1042301\n")
    with pytest.raises(UserError, match=r"config\.json: not JSON \(a Git LFS pointer\)") as error:
        read_object(file, "Copy it again.")
    assert "git lfs pull" in error.value.remedy


def test_what_no_memory_holds_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(borders, "memory_bytes", lambda: 2**30)
    check_memory("data.size: 8 x 8", 2**30, "")
    with pytest.raises(UserError, match=r"data.size: 8 x 8 takes 2.0 GiB at least; this machine has 1.0 GiB."):
        check_memory("data.size: 8 x 8", 2**31, "Ask for less.")


def test_memory_counts_this_machine():
    assert 2**28 < borders.memory_bytes() < 2**50
