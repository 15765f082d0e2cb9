"""The reader of pickled arrays: allowed contents equal Python's own reading, all else is refused by name."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.testing
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.interop.names import ConvertError
from maskformer_fast.interop.unpickle import load

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
ORDERED = collections.OrderedDict(w=np.arange(3.0))
CONTENT = {
    "model": ORDERED,
    "fortran": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
    "strided": np.arange(12, dtype=np.int16).reshape(3, 4)[:, ::2],
    "big_endian": np.arange(3, dtype=">f8"),
    "half": np.array([[1.5]], dtype=np.float16),
    "point": np.array(7, dtype=np.int64),
    "flags": np.array([True, False]),
    "scalar": np.float32(2.5),
    "plain": [1, -2, 2**70, 1.5, None, True, "text", b"bytes", {"a": [{}]}, [], {}],
    "same": ORDERED,
    3: "number as a key",
}


class Call:
    """An object that is pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list):
        assert isinstance(got, list) and len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    else:
        assert type(got) is type(expected)
        if isinstance(expected, np.ndarray):
            assert got.dtype.kind == expected.dtype.kind and got.dtype.itemsize == expected.dtype.itemsize
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_contents_are_read_as_python_reads_them(protocol: int) -> None:
    got = load(io.BytesIO(pickle.dumps(CONTENT, protocol)))
    assert_same(got, CONTENT)
    assert got["same"] is got["model"]


def test_pickles_of_old_numpy_and_python_2_are_read() -> None:
    stream = pickle.dumps({"w": np.arange(4, dtype=np.float32)}, 2)
    assert b"numpy._core" in stream
    old = stream.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert_same(load(io.BytesIO(old)), {"w": np.arange(4, dtype=np.float32)})
    # Python 2 wrote the bytes as a text (opcode T, four bytes of length).
    text = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    text += b"(K\x01(K\x02tcnumpy\ndtype\n"
    text += b"(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
    text += struct.pack("<I", 8) + struct.pack("<2f", 1.5, -300.25) + b"tb."
    # Only arrays in containers are read, as files have dictionaries of them.
    assert_same(load(io.BytesIO(b"\x80\x02}U\x01w" + text[2:-1] + b"s.")), {"w": np.array([1.5, -300.25], np.float32)})


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(os.system, "touch {path}"), "posix.system"),
        (Call(eval, "open({path!r}, 'w')"), "builtins.eval"),
        (Call(getattr, "", "join"), "builtins.getattr"),
        (Call(np.load, "{path}"), "numpy.load"),
        (Call(np.testing.assert_equal, 1, 1), "numpy.testing"),
        (collections.Counter("ab"), "collections.Counter"),
        (np.ma.zeros(2), "numpy.ma"),
        (Path("x"), "pathlib"),
        (np.array([1, None], dtype=object), "objects"),
        (np.array([Call(os.system, "touch {path}")], dtype=object), "objects"),
        (np.zeros(2, [("field", "f4")]), "V4"),
        (np.array(["text"]), "U4"),
        (np.zeros(2, dtype=complex), "c16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"model": {"w": np.zeros(2), "x": [({"y": v},)]}}])
def test_other_names_are_refused_and_not_run(value: Any, name: str, wrap: Any, protocol: int, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    if isinstance(value, Call):
        value = Call(value.function, *(a.format(path=str(trap)) if isinstance(a, str) else a for a in value.arguments))
    with pytest.raises(ConvertError, match="refused") as caught:
        load(io.BytesIO(pickle.dumps(wrap(value), protocol)))
    assert name in str(caught.value)
    assert not trap.exists()


def test_names_with_dots_are_refused() -> None:
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x0bcore.memmap\x93."
    for stream in (b"cnumpy\nndarray.__class__\n.", dotted, b"cos\nsystem\n."):
        with pytest.raises(ConvertError, match="refused: the pickle imports"):
            load(io.BytesIO(stream))


def array_state(shape: bytes, data: bytes, dtype: bytes = b"S'f4'\nI0\nI1\n") -> bytes:
    """Stream of protocol 0 for an array with the given state."""
    start = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n"
    return start + shape + b"cnumpy\ndtype\n(" + dtype + b"tRI00\n" + data + b"tb."


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (array_state(b"(I4000000000000\nt", b"S'ab'\n"), "expected 16000000000000 bytes"),
        (array_state(b"(I2\nI-1\nt", b"S'ab'\n"), "expected a shape"),
        (array_state(b"(I01\nt", b"S'abcd'\n"), "expected a shape"),
        (array_state(b"I1\n", b"S'abcd'\n"), "expected a shape"),
        (array_state(b"(I1\nt", b"(lI1\na"), "Python objects"),
        (array_state(b"(I1\nt", b"I5\n"), "expected bytes"),
        (array_state(b"(I1\nt", b"S'abcd'\n", b"S'O8'\n"), "objects"),
        (array_state(b"(I1\nt", b"S'abcd'\n", b"S'f99999999999'\n"), "expected one of numbers"),
        (b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.", "an array of the class"),
        (b"c_codecs\nencode\n(S'a'\nS'zlib'\ntR.", "_codecs.encode"),
        (b"cnumpy\nndarray\n(tR.", "refused: a call"),
        (b"cnumpy\ndtype\n(S'__code__'\nI1\nd" + b"b.", "refused: a state"),
        (b"}(((lttI1\ns.", "as keys"),
        (b"(i__main__\nX\n.", "operation INST"),
        (b"P1\n.", "operation PERSID"),
        (b"\x80\x02\x82\x01.", "operation EXT1"),
        (b"\x80\x04]\x94(K\x01\x90.", "operation ADDITEMS"),
        (b"\x80\x02\x8b\xff\xff\xff\x7fabc.", "not a readable pickle"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "not a readable pickle"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00abc.", "not a readable pickle"),
        (b"g7\n.", "not a readable pickle"),
        (b".", "not a readable pickle"),
        (b"", "not a readable pickle"),
        (b"hello, this is a text\n", "not a readable pickle"),
        (b"\x89PNG\r\n\x1a\n", "not a readable pickle|refused"),
        (b"I" + b"9" * 10_000 + b"\n.", "not a readable pickle"),
    ],
)
def test_hostile_and_broken_streams_are_refused(stream: bytes, message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        load(io.BytesIO(stream))


def test_a_deep_tuple_as_a_key_is_refused() -> None:
    # The hash of a deep tuple recurses in C until the process dies; that of shared tuples takes forever.
    deep = b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."
    shared = b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(40))
    for stream in (deep, b"\x80\x02})q\x000" + shared + b"h\x28K\x01s."):
        with pytest.raises(ConvertError, match="as keys"):
            load(io.BytesIO(stream))


@pytest.mark.parametrize("operation", [b"\x8e", b"\x96"], ids=["BINBYTES8", "BYTEARRAY8"])
def test_no_memory_is_taken_for_bytes_that_are_not_there(operation: bytes) -> None:
    stream = b"\x80\x05" + operation + struct.pack("<Q", 1 << 30) + b"abc."
    tracemalloc.start()
    try:
        with pytest.raises(ConvertError, match="the pickle is cut off"):
            load(io.BytesIO(stream))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_one_text_does_not_become_bytes_again_and_again() -> None:
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000
    call = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR"
    assert load(io.BytesIO(b"\x80\x02" + text + b"q\x000" + call + b".")) == b"a" * 100_000
    with pytest.raises(ConvertError, match="more memory than the file"):
        load(io.BytesIO(b"\x80\x02" + text + b"q\x000](" + call * 1000 + b"e."))


def test_memory_bombs_stay_small() -> None:
    # A memo index of four billion, containers that double forty times, and nesting beyond any stack.
    assert load(io.BytesIO(b"\x80\x02]r\xff\xff\xff\xff.")) == []
    doubling = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)) + b"."
    assert len(load(io.BytesIO(doubling))) == 2
    deep = b"\x80\x02}U\x01a" + b"]" * 200_000 + b"a" * 199_999 + b"s."
    assert list(load(io.BytesIO(deep))) == ["a"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(PROTOCOLS)), st.integers(0, 2**32), st.integers(1, 4))
def test_damaged_streams_are_read_or_refused(protocol: int, seed: int, damages: int) -> None:
    stream = bytearray(pickle.dumps(CONTENT, protocol))
    generator = random.Random(seed)
    for _ in range(damages):
        position = generator.randrange(len(stream))
        if generator.random() < 0.7:
            stream[position] = generator.randrange(256)
        else:
            del stream[position : position + generator.randrange(1, 20)]
    try:
        load(io.BytesIO(bytes(stream)))
    except ConvertError as error:
        assert len(str(error)) < 1000


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_refused(protocol: int) -> None:
    stream = pickle.dumps({"w": np.arange(5.0), "x": [1, "a"]}, protocol)
    for end in range(len(stream)):
        with pytest.raises(ConvertError):
            load(io.BytesIO(stream[:end]))
