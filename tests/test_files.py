"""Files and folders that are found and written: links, and what cannot be read."""

import os

import pytest

from biper.data.folder import files_below
from biper.errors import UsageError
from biper.files import atomically, folder_atomically, require_different, require_empty, require_free
from biper.places import users_folder
from biper.training.run_folder import check_folder


@pytest.fixture
def loop(tmp_path):
    """A link that leads to itself."""
    path = tmp_path / "loop"
    path.symlink_to(path)
    return path


def test_files_below_a_folder(tmp_path):
    top, elsewhere = tmp_path / "top", tmp_path / "elsewhere"
    for folder in (top / "b", top / ".hidden", elsewhere):
        folder.mkdir(parents=True)
        (folder / "image").touch()
        (folder / ".hidden").touch()
    (top / "a").touch()
    (top / "b" / "round").symlink_to(top)  # would not end
    (top / "b" / "up").symlink_to(tmp_path)  # where others' files are
    (top / "linked").symlink_to(elsewhere)
    (top / "twice").symlink_to(elsewhere)
    assert files_below(top) == [top / "a", top / "b" / "image", top / "linked" / "image"]


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    closed = tmp_path / "a" / "closed"
    closed.mkdir(parents=True)
    scan = os.scandir

    def refusing(path):  # as for users other than root
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="closed"):
        files_below(tmp_path)


def test_a_file_takes_a_links_place(tmp_path):
    """So that nothing is written into another run, whose checkpoint a run may have begun with."""
    (tmp_path / "other").write_text("before")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "other")
    with atomically(link) as temporary:
        temporary.write_text("after")
    assert not link.is_symlink()
    assert (link.read_text(), (tmp_path / "other").read_text()) == ("after", "before")


def test_a_folder_behind_a_link_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    require_empty(tmp_path / "link")
    with folder_atomically(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "file").exists()


def test_a_link_that_leads_to_itself(loop, tmp_path):
    with pytest.raises(UsageError, match="loop is no folder"):
        require_empty(loop)
    require_free(loop, lambda _: False)
    require_different({"--one": loop, "--other": tmp_path / "file"})
    with pytest.raises(UsageError, match="--one and --other are both"):
        require_different({"--one": loop, "--other": loop})


@pytest.mark.parametrize("target", ["none", "loop"])
def test_results_behind_a_link_that_leads_nowhere(loop, tmp_path, target):
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match=r"link/run cannot be made: .*link is a link that leads nowhere"):
        check_folder(tmp_path / "link" / "run", resume=False)


def test_folders_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert users_folder("XDG_CACHE_HOME", ".cache") == tmp_path / ".cache" / "biper"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert users_folder("XDG_CACHE_HOME", ".cache") == tmp_path / "other" / "biper"
