"""Compiled libraries are kept, and only those that this user wrote, whole, are loaded."""

import os

import pytest
from conftest import needs_compiler

from biper.cpu import cache, compiler
from biper.errors import CompilerMissing

pytestmark = needs_compiler


@pytest.fixture
def load(monkeypatch, tmp_path):
    """What `answer` of a small library gives, and the cache that it is kept in."""
    (tmp_path / "tiny.c").write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(compiler, "HERE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    return lambda: compiler.load.__wrapped__("tiny").answer()


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "flipped": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_compiled_anew(load, tmp_path, damage):
    assert load() == 42
    (library,) = (tmp_path / "cache" / "biper").iterdir()
    content = library.read_bytes()
    library.unlink()  # what this process has loaded stays as it is
    library.write_bytes(DAMAGES[damage](content))
    assert not cache.is_kept(library)
    assert load() == 42
    assert cache.is_kept(library)
    assert list(library.parent.iterdir()) == [library]


def test_a_library_that_others_can_write_to_is_compiled_anew(load, tmp_path):
    assert load() == 42
    (library,) = (tmp_path / "cache" / "biper").iterdir()
    library.chmod(0o666)
    assert not cache.is_kept(library)
    assert load() == 42
    assert cache.is_kept(library)


def test_a_library_of_somebody_else_is_not_loaded(load, tmp_path, monkeypatch):
    load()
    (library,) = (tmp_path / "cache" / "biper").iterdir()
    assert cache.is_kept(library)
    monkeypatch.setattr(cache.os, "getuid", lambda: library.stat().st_uid + 1)
    assert not cache.is_kept(library)


def test_a_link_in_a_librarys_place_is_not_followed(load, tmp_path):
    load()
    (library,) = (tmp_path / "cache" / "biper").iterdir()
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    assert not cache.is_kept(library)
    assert load() == 42
    assert not library.is_symlink()


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_that_others_can_write_to_is_not_used(load, tmp_path, mode):
    folder = tmp_path / "cache" / "biper"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    assert load() == 42
    assert not list(folder.iterdir())
    (other,) = tmp_path.glob("biper-*")
    assert other.stat().st_mode & 0o777 == 0o700
    assert len(list(other.iterdir())) == 1


def test_without_a_folder_that_is_safe_nothing_is_compiled(load, tmp_path):
    for folder in (tmp_path / "cache" / "biper", tmp_path / f"biper-{os.getuid()}"):
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    with pytest.raises(CompilerMissing, match="could be written to by others"):
        load()


def test_the_compilers_arguments_are_kept(load, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    script = tmp_path / "my cc"
    script.write_text(f'#!/bin/sh\necho "$1" >> {calls}\nexec cc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", f"'{script}' -O1")
    assert load() == 42
    assert calls.read_text() == "-O1\n-O1\n"


@pytest.mark.parametrize(("named", "says"), [("gcc 'x", "No closing quotation"), ("cc -m31", "does not work here")])
def test_a_compiler_that_cannot_be_meant_is_refused(load, monkeypatch, named, says):
    monkeypatch.setenv("CC", named)
    with pytest.raises(CompilerMissing, match=says):
        load()
