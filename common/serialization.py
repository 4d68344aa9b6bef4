"""Wire format: msgpack with extension types for arrays and large integers, and a schema version in front. No pickle anywhere.

    b"SL" | schema version (1 byte) | msgpack body
    array = ExtType(1, msgpack([dtype, shape, raw little-endian bytes]))
    int over 64 bits = ExtType(2, little-endian two's complement)

Bounds on what is decoded: `MAX_BYTES` per message (except among a trainer's ranks, which know the size beforehand),
containers at most 1024 deep (msgpack's own bound) and never declared longer than their message, and numeric dtypes only, so
that a hostile message can neither exhaust memory nor smuggle objects. `decode_json` bounds the small JSON that roles exchange.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgpack
import numpy as np

from sluice.common.errors import SerializationError

SCHEMA_VERSION = 1
MAX_BYTES = 128 * 1024 * 1024
"""A group of 64 completions of 128k tokens has 67 MB; decoded, no value takes more than about 64 times its bytes."""
MAX_JSON_BYTES = 1024 * 1024
_HEADER = b"SL" + bytes([SCHEMA_VERSION])
_ARRAY, _LARGE_INT = 1, 2
_MAX_INT_BYTES = 1786
"""4300 digits: Python reads and prints no longer ones."""
_DTYPES = frozenset(["|b1", "|u1", "|i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8"])


def encode(value: Any) -> bytes:
    """Encode a value of None, bool, int, float, str, bytes, list, tuple, dict with str keys, and numeric arrays."""
    try:
        return _HEADER + msgpack.packb(value, default=_encode_other, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise SerializationError(f"cannot encode a {type(value).__name__}: {error}") from error


def decode(data: bytes, *, max_bytes: int | None = MAX_BYTES) -> Any:
    """Invert `encode`; tuples become lists. Raises SerializationError on anything that `encode` did not write.

    max_bytes: longer messages are refused; none = no bound.
    """
    if data[:2] != _HEADER[:2]:
        raise SerializationError(f"not a Sluice message: starts with {bytes(data[:8])!r}")
    if data[2:3] != _HEADER[2:]:
        raise SerializationError(
            f"schema version {data[2:3]!r}, this build reads {SCHEMA_VERSION}: upgrade the older role"
        )
    if max_bytes is not None and len(data) > max_bytes:
        raise SerializationError(f"message of {len(data)} bytes, more than {max_bytes}")
    try:
        # timestamp=1: msgpack's own extension type never reaches ext_hook; as a float it is at least a plain number
        return msgpack.unpackb(
            memoryview(data)[3:], ext_hook=_decode_extension, raw=False, strict_map_key=True, timestamp=1
        )
    except SerializationError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise SerializationError(f"damaged message of {len(data)} bytes: {error}") from error


def decode_int(text: bytes) -> int:
    """Decode a whole number of at most 18 digits. Raises SerializationError."""
    if not re.fullmatch(rb"-?[0-9]{1,18}", text):
        raise SerializationError(f"{bytes(text[:40])!r} is not a whole number")
    return int(text)


def decode_json(data: bytes) -> Any:
    """Decode a small JSON value. Raises SerializationError."""
    if len(data) > MAX_JSON_BYTES:
        raise SerializationError(f"JSON of {len(data)} bytes, more than {MAX_JSON_BYTES}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SerializationError(f"damaged JSON of {len(data)} bytes: {error}") from None


def _encode_other(value: Any) -> Any:
    if isinstance(value, int):
        return msgpack.ExtType(
            _LARGE_INT, value.to_bytes(min(value.bit_length() // 8 + 1, _MAX_INT_BYTES), "little", signed=True)
        )
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"no wire form for {type(value).__name__}")
    array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
    if array.dtype.str not in _DTYPES:
        raise TypeError(f"no wire form for arrays of {value.dtype}")
    return msgpack.ExtType(_ARRAY, msgpack.packb([array.dtype.str, value.shape, array.tobytes()]))


def _decode_extension(code: int, data: bytes) -> Any:
    if code == _LARGE_INT and len(data) <= _MAX_INT_BYTES:
        return int.from_bytes(data, "little", signed=True)
    if code != _ARRAY:
        raise SerializationError(f"unknown extension type {code}")
    dtype, shape, raw = msgpack.unpackb(data, raw=False)
    if dtype not in _DTYPES:
        raise SerializationError(f"refused array dtype {dtype!r}")
    if not isinstance(raw, bytes) or math.prod(shape) * np.dtype(dtype).itemsize != len(raw):
        raise SerializationError(f"array of shape {shape} and dtype {dtype} does not fit its {len(raw)} bytes")
    return np.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)  # a copy: torch needs writable memory
