"""The wire format: what goes in comes out, and damaged or hostile bytes raise one error."""

from __future__ import annotations

import contextlib
import json
import math
import random
import tracemalloc
from dataclasses import asdict, replace

import msgpack
import numpy as np
import pytest
from builders import for_each, make_completion, task_payload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sluice.common.errors import SerializationError
from sluice.common.serialization import MAX_JSON_BYTES, SCHEMA_VERSION, decode, decode_json, encode
from sluice.common.types import Completion, Group, SamplingParams, Scores, Task, oldest_version

settings.register_profile(
    "sluice", deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("sluice")

DTYPES = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(10**80), 10**80)
    | st.sampled_from([2**63, 2**64, -(2**63) - 1, 2**71 - 1, 2**71, -(2**71), 10**4300 - 1])
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.binary(max_size=20)
)
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
NESTED = st.recursive(
    PLAIN | ARRAYS,
    lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text("abcé", max_size=4), child, max_size=4),
    max_leaves=15,
)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b)
    else:
        assert a == b


def array_message(dtype, shape, raw):
    """A message that holds one array of chosen, perhaps impossible, fields."""
    body = msgpack.packb([dtype, shape, raw])
    return b"SL" + bytes([SCHEMA_VERSION]) + msgpack.packb(msgpack.ExtType(1, body))


@given(NESTED)
def test_nested_values_come_back_as_they_were(value):
    assert_same(decode(encode(value)), value)


@for_each("dtype", [*DTYPES, ">u2", ">i4", ">f4", ">f8", ">i8", ">f2"])
@for_each("view", [np.s_[:], np.s_[:0], np.s_[1, 2], np.s_[::2], np.s_[::-1], np.s_[:, 1:3], np.s_[:, ::-2]])
def test_arrays_of_any_byte_order_and_layout_keep_their_values_and_become_little_endian(dtype, view):
    array = np.arange(24).reshape(4, 6).astype(dtype)
    for strided in (array[view], array.T[view], np.asfortranarray(array)[view]):
        assert_same(decode(encode(np.asarray(strided))), np.asarray(strided, array.dtype.newbyteorder("<")))


def test_decoded_arrays_are_writable_own_their_memory_and_keep_every_bit():
    bits = np.array([0x7FC00001, 0x80000000, 0xFF800000], np.uint32)
    message = encode(bits.view(np.float32))
    first = decode(message)
    first[:] = 7
    assert decode(message).tobytes() == bits.tobytes()


def test_numpy_scalars_become_plain_numbers_and_tuples_lists():
    value = {"a": np.float32(0.5), "b": np.int64(3), "c": (1, (2,)), "d": np.bool_(True)}
    assert_same(decode(encode(value)), {"a": 0.5, "b": 3, "c": [1, [2]], "d": True})


NO_WIRE_FORM = [object(), {1, 2}, 1 + 2j, 10**4400, "\ud800", np.array([object()]), np.array(["text"]), np.array([1j])]
NO_WIRE_FORM += [np.array(["2026-01-01"], "datetime64[D]"), np.zeros(1, [("a", "i4")]), np.longdouble(1)]


@for_each("value", NO_WIRE_FORM)
def test_what_has_no_wire_form_is_refused_by_name(value):
    with pytest.raises(SerializationError, match="cannot encode a"):
        encode({"nested": value} if not isinstance(value, np.ndarray) else value)


def test_values_nested_without_end_are_refused():
    value: list = []
    value.append(value)
    with pytest.raises(SerializationError):
        encode(value)


@for_each(
    ("message", "reason"),
    [
        *(
            (data, "not a Sluice message")
            for data in (b"", b"S", b"SX\x01\xc0", b"\x80\x04}.", b"{}", b"cos\nsystem\n")
        ),
        (b"SL\x02\xc0", r"schema version b'\\x02', this build reads 1: upgrade the older role"),
        (b"SL", "schema version b''"),
        (b"SL\x01", "damaged message of 3 bytes"),
        (b"SL\x01\xc0\xc0", "damaged"),
        (b"SL\x01\xc1", "damaged"),
        (b"SL\x01\x81\x01\x02", "damaged"),
        (b"SL\x01" + b"\x91" * 100_000 + b"\xc0", "damaged"),
        (b"SL\x01" + msgpack.packb(msgpack.ExtType(7, b"x")), "unknown extension type 7"),
        (
            b"SL\x01" + msgpack.packb(msgpack.ExtType(2, bytes(2000))),
            "unknown extension type 2",
        ),  # could not be printed
        (b"SL\x01" + msgpack.packb(msgpack.ExtType(1, b"x")), "damaged"),
    ],
)
def test_foreign_incomplete_and_damaged_messages_are_refused_with_the_reason(message, reason):
    with pytest.raises(SerializationError, match=reason):
        decode(message)


@for_each(
    ("dtype", "shape", "raw"),
    [
        ("|O", [1], b"12345678"),
        ("<U4", [1], b"\0" * 16),
        ("|V8", [1], b"\0" * 8),
        *((dtype, [1], b"\0" * 4) for dtype in (">f4", ["<f4"], None)),
        *(("<f4", shape, b"\0" * 4) for shape in ([2], [-1], [-1, -1], [1.0], [1] * 100, 1, "1", None, [[1]], ["1"])),
        ("<f4", [-2, -2], b"\0" * 16),
        *(("<f4", shape, b"") for shape in ([0, 2**63], [0, 2**64 - 1], [0, 2**62, 2**62])),
        ("<f4", [2**62, 2**62], b"\0" * 4),
        ("<f4", [4], 4),
        *(("<f4", [1], raw) for raw in ("text", [1, 2, 3, 4], [1000, 2, 3, 4], None)),
    ],
)
def test_hostile_array_headers_are_refused(dtype, shape, raw):
    with pytest.raises(SerializationError):
        decode(array_message(dtype, shape, raw))


def test_a_foreign_timestamp_comes_back_as_a_number_never_as_an_object():
    assert decode(b"SL\x01" + msgpack.packb(msgpack.Timestamp(5, 0))) == 5.0


@given(st.binary(max_size=200))
def test_random_bytes_raise_only_serialization_errors(data):
    for message in (data, b"SL\x01" + data, b"SL\x01" + msgpack.packb(msgpack.ExtType(1, data))):
        with contextlib.suppress(SerializationError):
            decode(message)


def test_mutated_messages_raise_only_serialization_errors_and_truncated_ones_always():
    draw = random.Random(20260731)
    value = {"ids": np.arange(6, dtype=np.int32).reshape(2, 3), "x": [1, None, "é", 2.5, b"\0"], "e": np.zeros((0, 2))}
    original = encode(value)
    for length in range(len(original)):
        with pytest.raises(SerializationError):
            decode(original[:length])
    for _ in range(5000):
        data = bytearray(original)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        with contextlib.suppress(SerializationError):
            decode(bytes(data))


@for_each(
    "value",
    [
        Task(
            group_id="t7",
            prompt_ids=np.array([1, 2, 3], np.int32),
            prompt=[{"role": "user", "content": "1+1"}],
            target=None,
            columns={"level": 3, "tags": ["a"]},
            sampling=SamplingParams(n=8, max_tokens=40, temperature=0.7, top_p=0.9, top_k=5, stop=("x",), seed=2**62),
        ),
        Completion(
            token_ids=np.array([4, 5, 6], np.int32),
            rollout_logprobs=np.array([-0.1, -np.inf, 0.0], np.float32),
            policy_versions=((3, 1), (5, 2)),
            finish_reason="length",
            text="<answer>4</answer>",
        ),
        replace(make_completion(length=5), tool_spans=((1, 2), (4, 1))),
    ],
)
def test_what_travels_round_trips(value):
    assert_same(asdict(type(value).from_wire(decode(encode(value.to_wire())))), asdict(value))


def test_a_completion_without_tool_spans_looks_as_it_always_did():
    assert "tool_spans" not in make_completion().to_wire(), "an older role must be able to read it"


def test_groups_are_joined_from_their_decoded_parts():
    completions = [make_completion(version=2), make_completion(version=1, length=5)]
    reference = [np.full(3, -1, np.float32), np.full(5, -2, np.float32)]
    scores = Scores(reward=[0.5, None], by_function={"f": [0.5, None], "g": [0.5, None]})
    results = {
        "task": decode(task_payload("t1", target="a")),
        "rollout": {"completions": [c.to_wire() for c in completions]},
        "reward": scores.to_wire(),
        "reference": reference,
    }
    group = Group.from_results(
        decode(encode(results)), policy_version=oldest_version(completions), timestamps={"ready": 1.0}
    )
    assert (group.group_id, group.policy_version, group.prompt, group.target) == ("t1", 1, "1+1", "a")
    assert [e.reward for e in group.episodes] == [0.5, None]
    assert group.episodes[0].rewards == {"f": 0.5, "g": 0.5}
    assert_same(group.episodes[1].ref_logprobs, reference[1])
    assert_same(group.episodes[1].completion.token_ids, completions[1].token_ids)


def test_a_message_over_the_bound_is_refused_where_there_is_one() -> None:
    message = encode({"token_ids": np.zeros(100, np.int32)})
    with pytest.raises(SerializationError, match="more than 400"):
        decode(message, max_bytes=400)
    assert len(decode(message, max_bytes=None)["token_ids"]) == 100


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xdb", b"\xc6"], ids=["array", "map", "text", "bytes"])
def test_a_container_longer_than_its_message_costs_no_memory(head):
    tracemalloc.start()
    with pytest.raises(SerializationError):
        decode(b"SL\x01" + head + b"\xff\xff\xff\xff" + b"\x00" * 100)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@given(
    st.binary(max_size=100) | st.recursive(st.none() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_json_is_bounded_and_raises_one_error(data):
    with contextlib.suppress(SerializationError):
        decode_json(data)
    for hostile in (b"[" * 100_000, b'{"a":' * 100_000, b" " * (MAX_JSON_BYTES + 1)):
        with pytest.raises(SerializationError):
            decode_json(hostile)
