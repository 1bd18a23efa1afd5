"""The fields of packed programs: written by name, and read by a library that has the same ones."""

import pytest
import torch

import biper
from biper.packed import fields
from biper.packed import runtime as kernels
from biper.packed.pack import pack
from biper.packed.program import After, Program, Value

TAIL = dict.fromkeys(f"{fields.HEAD} {fields.INSTRUCTIONS['TAIL']}".split(), 0)
COMPILED = pytest.mark.skipif(kernels.compiled() is None, reason="needs the compiled instructions")


class Library:
    """Of a version that states fields, or of one from before there were any."""

    def __init__(self, stated):
        if stated is not None:
            self.biper_fields = lambda: stated.encode()


@pytest.fixture
def fresh():
    """What is known of the library is asked again, now and afterwards."""
    for cached in (kernels.compiled, kernels.available):
        cached.cache_clear()
    yield
    for cached in (kernels.compiled, kernels.available):
        cached.cache_clear()


@COMPILED
def test_the_library_and_python_have_one_table():
    assert kernels._fields(kernels.compiled()) == fields.table()


@pytest.mark.parametrize(
    "stated",
    [
        None,
        "",
        fields.table().replace("WIDTH ", "WIDTH 1"),
        fields.table().replace(" stride_h stride_w", " stride_w stride_h"),
        fields.table() + " more",
        fields.table().replace("TAIL", "TALE"),
    ],
)
@torch.no_grad()
def test_a_library_of_another_version_is_refused(stated, monkeypatch, caplog, fresh):
    monkeypatch.setattr(kernels, "built", lambda name: Library(stated))
    assert kernels.available() == (kernels.TORCH,)
    assert "they are of another version of biper; install it again" in caplog.text
    model, x = biper.create_model("resnet20_1w1a", stage=2).eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pack(model)(x), model(x), rtol=0, atol=1e-4)


def test_rows_are_written_by_name():
    row = fields.instruction("TAIL", TAIL | {"in": 3, "pad": 7})
    assert row == [2, 3, *[0] * (len(TAIL) - 2), 7]
    assert fields.header({"gathered": 4, "scratch": 3, "values": 2, "instructions": 1}) == [1, 2, 3, 4]


@pytest.mark.parametrize("odd", ["code", "window", "pads"])
def test_a_superfluous_field_is_an_error(odd):
    with pytest.raises(ValueError, match=rf"fields of TAIL that are missing or unknown: {odd}$"):
        fields.instruction("TAIL", TAIL | {odd: 1})


@pytest.mark.parametrize("missing", TAIL)
def test_a_missing_field_is_an_error(missing):
    with pytest.raises(ValueError, match=rf"fields of TAIL that are missing or unknown: {missing}$"):
        fields.instruction("TAIL", {name: n for name, n in TAIL.items() if name != missing})


def test_a_header_is_checked_too():
    with pytest.raises(ValueError, match=r"HEADER .*gatherd, gathered"):
        fields.header({"instructions": 1, "values": 2, "scratch": 3, "gatherd": 4})


def test_a_program_names_the_fields_of_the_table(monkeypatch):
    monkeypatch.setitem(fields.INSTRUCTIONS, "TAIL", "kernel stride padding")
    with pytest.raises(ValueError, match="pad, padding"):
        Program().tail(Value((8, 4, 4)), (8, 4, 4), After())


def test_no_row_is_longer_than_the_library_reads():
    assert max(len(f"code {fields.HEAD} {own}".split()) for own in fields.INSTRUCTIONS.values()) <= fields.WIDTH
