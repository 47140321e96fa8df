"""A Spec comes back as it was written; patterns; what is neither sparsity nor storage type is one clear error."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook import Spec
from billhook.errors import BillhookError
from billhook.plan.spec import Pattern
from billhook.plan.storage import BLOCKS, bits, block, stored_bytes

relaxed = settings(deadline=None, max_examples=40)
TYPES = [*BLOCKS, "int2/32", "int4/64", "int8/128"]


@pytest.mark.parametrize("text, keep, of", [("2:4", 2, 4), ("1:2", 1, 2), ("5:8", 5, 8), ("1023:1024", 1023, 1024)])
def test_patterns_are_parsed_and_printed(text, keep, of):
    pattern = Pattern.parse(text)
    assert (pattern.keep, pattern.of, pattern.structured, str(pattern)) == (keep, of, True, text)
    assert not Pattern.parse("unstructured").structured
    assert Pattern.parse(str(Pattern())) == Pattern()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "2:",
        ":4",
        "4:4",
        "0:4",
        "5:4",
        "2:4:8",
        "-1:4",
        "2.0:4",
        "two:four",
        "2 : 4",
        "٢:٤",
        "1:1025",
        "9" * 5000 + ":4",
    ],
)
def test_strings_that_are_no_pattern_are_refused(text):
    with pytest.raises(BillhookError, match=r"neither 'unstructured' nor N:M") as caught:
        Pattern.parse(text)
    assert len(str(caught.value)) < 300


@relaxed
@given(st.one_of(st.floats(0, 1), st.sampled_from(["2:4", "1:4", "7:10", "1:1024", *TYPES])))
def test_a_spec_is_read_as_it_was_written(value):
    assert Spec.parse(value).to_json() == value
    assert Spec.parse(Spec.parse(value).to_json()) == Spec.parse(value)


def test_the_sparsity_of_a_pattern_follows_from_it():
    assert Spec.parse("1:4") == Spec(0.75, Pattern(1, 4))
    assert Spec.parse("7:10").sparsity == 3 / 10
    assert (Spec.parse("1:4").keep_of, Spec.parse("1:4").block) == ((1, 4), 4)
    assert (Spec.parse(0.5).keep_of, Spec.parse(0.5).block, Spec.parse(0.5).bits) == (None, 1, None)


@pytest.mark.parametrize("m", [2, 3, 4, 8, 10, 100])
def test_layers_of_a_pattern_keep_their_own_number(m):
    for removed in range(m + 1):
        spec = Spec.of_sparsity(removed / m, Pattern(1, m))
        assert spec.sparsity == removed / m
        assert spec.keep_of == ((m - removed, m) if 0 < removed < m else None)


@pytest.mark.parametrize(
    "value, message",
    [
        (math.nan, r"must be a number in \[0, 1\], got nan"),
        (-0.01, r"must be a number in \[0, 1\]"),
        (1.01, r"must be a number in \[0, 1\]"),
        (10**400, r"must be a number in \[0, 1\]"),
        (True, r"must be a number in \[0, 1\], got True"),
        (None, r"must be a number in \[0, 1\], got None"),
        ([0.5], r"must be a number in \[0, 1\]"),
        ("4:4", "neither 'unstructured' nor N:M"),
        ("Q4_K", r"Unknown storage type 'Q4_K'\. Did you mean 'q4_k'\?"),
        ("iq3_xxx", r"Unknown storage type 'iq3_xxx'\. Did you mean 'iq3_xxs'\?"),
        ("int4", r"Unknown storage type 'int4'\. Did you mean 'int4/64'\?"),
        ("int8", r"Did you mean 'int8/64'\?"),
        ("int9/64", "intB/GROUP with B from 2 to 8"),
        ("int4/0", "Unknown storage type"),
        ("0.5", "Unknown storage type '0.5'"),
        ("x" * 5000, "Unknown storage type"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_that_are_no_spec_are_refused(value, message):
    with pytest.raises(BillhookError, match=message) as caught:
        Spec.parse(value)
    assert len(str(caught.value)) < 500


def test_a_spec_that_contradicts_itself_is_refused():
    with pytest.raises(BillhookError, match=r"Pattern 2:4 removes 0\.5, not 0\.75"):
        Spec(0.75, Pattern(2, 4))
    with pytest.raises(BillhookError, match=r"a sparsity or a storage type \(q4_k\), not both"):
        Spec(0.5, type="q4_k")


def test_bits_count_scales_and_minima():
    expected = {"bf16": 16, "q8_0": 8.5, "q4_0": 4.5, "q4_k": 4.5, "q3_k": 3.4375, "q2_k": 2.625, "q6_k": 6.5625}
    expected |= {"iq4_xs": 4.25, "iq3_s": 3.4375, "iq3_xxs": 3.0625, "iq2_xxs": 2.0625, "iq1_m": 1.75, "iq1_s": 1.5625}
    expected |= {"int4/64": 4 + 16 / 64, "int2/32": 2 + 16 / 32, "int8/128": 8 + 16 / 128}
    assert {name: bits(name) for name in expected} == expected
    assert Spec.parse("q4_k").bits == 4.5
    assert (block("q4_k"), block("q4_0"), block("int4/64"), block("f32")) == (256, 32, 64, 1)
    assert stored_bytes("q4_k", (3, 512)) == 3 * 2 * 144
    assert stored_bytes("int3/64", (1, 64)) == (64 * 3 + 16) // 8
    assert stored_bytes("int3/16", (2, 48)) == 2 * (5 * 4 + 3 * 2)  # the codes of a row fill whole words


def test_block_sizes_are_those_of_gguf():
    constants = pytest.importorskip("gguf.constants", reason="needs gguf")
    sizes = {kind.name.lower(): size for kind, size in constants.GGML_QUANT_SIZES.items()}
    assert all(sizes[name] == size for name, size in BLOCKS.items() if name != "q2_0")  # younger than the package
