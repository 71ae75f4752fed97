"""Chips and slices: peaks that fit their units, names that are read and written."""

import pytest

from codellama_jax.plan import chips


def test_chips_compute_what_their_matrix_units_can():
    for chip in chips.CHIPS.values():
        units = chip.peak_tflops * 1e12 / (2 * chip.mxu**2 * chip.clock_ghz * 1e9)
        assert units == pytest.approx(round(units), rel=0.02), chip.name  # a whole number of them


def test_slices_are_read_and_written():
    for text in ("v5e:16x16", "v5p:4x4x8", "2xv6e:16x16", "tpu7x:4x4x4"):
        assert str(chips.Slice.parse(text)) == text
    assert chips.Slice.parse("2xv6e:16x16").chips == 512
    assert chips.Slice.parse("tpu7x:4x4x4").devices == 128


@pytest.mark.parametrize(
    "text, said",
    [
        ("v5p-128", "is no slice; write chip:shape"),
        ("v9:4x4", "The chips are v4, v5e"),
        ("v5e:4x4x4", "has 2 dimensions"),
        ("v5e:32x32", "256 chips a slice"),
    ],
)
def test_a_slice_that_is_none_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        chips.Slice.parse(text)


@pytest.mark.parametrize(
    "text, rings, wrap",
    [
        ("v5e:16x16", (True, True), ()),
        ("v6e:8x16", (False, True), ()),
        ("v5e:8x8", (False, False), ()),
        ("v5p:4x4x8", (True, True, True), (True, True, True)),
        ("v4:4x4x4", (True, True, True), (True, True, True)),
        ("v5p:2x4x4", (False, False, False), ()),  # less than a cube
    ],
)
def test_cubes_and_sides_of_16_are_rings_and_libtpu_is_told_of_cubes(text, rings, wrap):
    where = chips.Slice.parse(text)
    assert (where.rings, where.wrap) == (rings, wrap)
