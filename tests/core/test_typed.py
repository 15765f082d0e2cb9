"""Dataclasses from plain containers: what is read, what is refused by name, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from maskformer_fast.core.typed import TypedReader, did_you_mean, to_plain


class OwnError(ValueError):
    pass


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate: expected >= 0, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    inner: Inner
    parts: tuple[Inner, ...] = ()
    options: dict[str, str | int | bool] = field(default_factory=dict)
    limit: int | None = None
    pair: tuple[int, float] | None = None


STRICT = TypedReader(error=OwnError, locate_checks=True)
LENIENT = TypedReader(absent_is_default=True, convert_floats=True)
PLAIN: dict[str, Any] = {
    "name": "x", "kind": "b", "inner": {"size": [3, 4], "rate": 1.0}, "parts": [{"size": [1, 2], "rate": 0.0}],
    "options": {"level": 3, "fast": True, "text": "t"}, "limit": None, "pair": [1, 2.0],
}  # fmt: skip
OPTIONS: dict[str, str | int | bool] = {"level": 3, "fast": True, "text": "t"}
VALUE = Outer("x", "b", Inner((3, 4), 1.0), (Inner((1, 2), 0.0),), OPTIONS, None, (1, 2.0))


@pytest.mark.parametrize("reader", [STRICT, LENIENT])
def test_what_was_written_reads_back_equal(reader: TypedReader) -> None:
    assert to_plain(VALUE) == PLAIN
    assert reader.read(Outer, PLAIN, "file") == VALUE


@dataclass(frozen=True)
class Sized:
    side: int | tuple[int, int] | None = None


@pytest.mark.parametrize("side", [None, 3, (4, 5)])
def test_one_value_or_a_list_of_some_is_read_and_written(side: int | tuple[int, int] | None) -> None:
    plain = {"side": list(side) if isinstance(side, tuple) else side}
    assert to_plain(Sized(side)) == plain and STRICT.read(Sized, plain, "") == Sized(side)
    for wrong, message in (("3", "side: expected an integer or a list of 2 or null, got '3'"),
                           ([1, 2, 3], r"side: expected a list of 2, got \[1, 2, 3\]"),
                           ([1, 2.5], r"side\[1\]: expected an integer, got 2\.5")):
        with pytest.raises(OwnError, match=message):
            STRICT.read(Sized, {"side": wrong}, "")


def test_an_integer_in_a_float_field_is_written_as_a_float() -> None:
    written = to_plain(Inner((1, 2), 3))
    assert repr(written) == "{'size': [1, 2], 'rate': 3.0}"


def test_absent_keys_keep_defaults_only_where_the_reader_says_so() -> None:
    data = {"name": "x", "kind": "a", "inner": {"size": [1, 2]}}
    assert LENIENT.read(Outer, data, "") == Outer("x", "a", Inner((1, 2)))
    with pytest.raises(OwnError, match=r"^file\.parts: expected a value, got none$"):
        STRICT.read(Outer, data, "file")


@pytest.mark.parametrize("number", [1, "1e0", 1.0])
def test_integers_and_text_become_floats_only_where_the_reader_says_so(number: Any) -> None:
    data = {"size": [1, 2], "rate": number}
    rate = LENIENT.read(Inner, data, "").rate
    assert rate == 1.0 and type(rate) is float
    if type(number) is not float:
        with pytest.raises(OwnError, match=r"^file\.rate: expected a finite number, got "):
            STRICT.read(Inner, data, "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nam": "x"}, r"^file\.nam: expected one of name, kind, .*, got an unknown key \(did you mean name\?\)$"),
        ({"name": 3}, r"^file\.name: expected text, got 3$"),
        ({"kind": "c"}, r"^file\.kind: expected one of 'a', 'b', got 'c'$"),
        ({"inner": []}, r"^file\.inner: expected a mapping, got \[\]$"),
        ({"inner": {"size": [1], "rate": 0.0}}, r"^file\.inner\.size: expected a list of 2, got \[1\]$"),
        ({"parts": {}}, r"^file\.parts: expected a list, got \{\}$"),
        ({"parts": [{"size": [1, True], "rate": 0.0}]}, r"^file\.parts\[0\]\.size\[1\]: .* an integer, got True$"),
        ({"options": {"level": 0.5}}, r"level: expected text or an integer or true or false, got 0\.5$"),
        ({"limit": "1"}, r"^file\.limit: expected an integer, got '1'$"),
        ({"pair": [1, float("nan")]}, r"^file\.pair\[1\]: expected a finite number, got nan$"),
        ({"name": ["x" * 300]}, r"^file\.name: expected text, got \['x{198}\.\.\.$"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OwnError, match=message):
        STRICT.read(Outer, PLAIN | changes, "file")


def test_the_checks_of_a_class_are_located_only_where_the_reader_says_so() -> None:
    data = {"size": [1, 2], "rate": -1.0}
    with pytest.raises(OwnError, match=r"^file\.inner\.rate: expected >= 0, got -1\.0$"):
        STRICT.read(Outer, PLAIN | {"inner": data}, "file")
    with pytest.raises(ValueError, match=r"^rate: expected >= 0, got -1\.0$"):
        LENIENT.read(Outer, PLAIN | {"inner": data}, "file")


def test_hints_name_what_is_near() -> None:
    assert did_you_mean("lrr", ["lr", "seed"]) == " (did you mean lr?)"
    assert did_you_mean("lrr", ["seed"]) == ""
