"""Pickles as data: a reader that builds arrays, numbers, strings, lists and dicts, and calls nothing.

A pickle is a program, and the ordinary reader runs whatever it names. This one knows the instructions that plain values
need and four names, those that numpy writes an array with. What stands behind the names is in this file and only
collects its arguments; every other instruction or name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

Plain = np.ndarray | list[Any] | str | int | float | None
_INSTRUCTIONS = """PROTO FRAME STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE BUILD"""
_CODES = frozenset(getattr(pickle, name)[0] for name in _INSTRUCTIONS.split())
_FAILURES = (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError,
             OverflowError, struct.error, MemoryError, RecursionError, AssertionError)


class _Dtype:
    """The type of an array: a plain number of known width."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if kind not in ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"):
            raise pickle.UnpicklingError(f"it has an array of {kind!r}, not of numbers")
        self.value = np.dtype(kind)

    def build(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, by_columns, raw = state
        if not isinstance(dtype, _Dtype) or not all(type(side) is int and side >= 0 for side in shape):
            raise pickle.UnpicklingError("it has an array whose type or shape is none")
        if not isinstance(raw, bytes) or len(raw) != dtype.value.itemsize * math.prod(shape):
            raise pickle.UnpicklingError("it has an array whose bytes do not fill its shape")
        self.value = np.frombuffer(raw, dtype.value).reshape(shape, order="F" if by_columns else "C")


_CALLED: dict[str, Callable[..., Any]] = {"dtype": _Dtype, "_reconstruct": lambda *_: _Array()}
_KNOWN = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
          ("numpy", "dtype"), ("_codecs", "encode")}


class _Reader(pickle._Unpickler):
    """The reader in Python, whose instructions are a table; names stay strings until they are called.

    A file may name one text any number of times, so the bytes that are made of texts are counted: an honest one makes
    no more than it has.
    """

    stack: list[Any]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._room = 2 * len(content)

    def _latin1(self, text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError(f"it asks for a text in {encoding!r}")
        self._room -= len(text)
        if self._room < 0:
            raise pickle.UnpicklingError("its texts become more bytes than it has itself")
        return text.encode("latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return name

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        name = self.stack[-1]
        if name != "encode" and name not in _CALLED:
            raise pickle.UnpicklingError(f"it calls {name!r}")
        self.stack[-1] = self._latin1(*arguments) if name == "encode" else _CALLED[name](*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], _Array) and isinstance(state[-1], str):  # as Python 2 wrote it
            state = (*state[:-1], self._latin1(state[-1]))
        self.stack[-1].build(state)

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **{code: read for code, read in pickle._Unpickler.dispatch.items() if code in _CODES},
        pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build}


def read_plain_pickle(content: bytes) -> dict[str, Plain]:
    """The dict that a pickle holds: arrays, numbers, strings, and lists of numbers and strings by name.

    Strings of Python 2 are read as latin-1. Raises ValueError, to follow "the file ...", for everything else.
    """
    try:
        found = _Reader(content).load()
    except _FAILURES as error:
        why = {pickle.UnpicklingError: str(error), KeyError: f"it has the instruction {error}"}.get(
            type(error), f"{type(error).__name__}: {error}")
        raise ValueError(f"is no pickle of plain values ({why}), and nothing in it was run; get the published file "
                         "again") from error
    if not isinstance(found, dict):
        raise ValueError("is no pickle of a dict; get the published file again")
    return {_text(name): _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Plain:
    if isinstance(value, _Array):
        return value.value if value.value is not None else np.zeros(0)
    if isinstance(value, list) and all(isinstance(one, (str, bytes, int, float)) for one in value):
        return [_text(one) if isinstance(one, bytes) else one for one in value]
    if value is None or isinstance(value, (str, bytes, int, float)):
        return _text(value) if isinstance(value, bytes) else value
    kind = type(value).__name__.strip("_").lower()
    raise ValueError(f"has a {kind} where arrays, numbers, strings and flat lists of them are read; get the published "
                     "file again")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
