"""A cluster's checkpoints, by their UUID."""

import stat
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from determined.experimental import client

from shared.errors import UserError
from shared.training.downloads import find_checkpoint

UUID = str(uuid.UUID(int=7))


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """A master with one checkpoint. Returns the folders of its downloads. The first download is truncated."""
    folders = []

    def download(folder):
        folders.append(folder)
        path = Path(folder)
        path.mkdir()
        (path / "state_dict.pth").write_bytes(b"half")
        if len(folders) == 1:
            raise ConnectionError("the connection was lost")
        (path / "state_dict.pth").write_bytes(b"whole")
        return folder

    monkeypatch.setenv("DET_MASTER", "http://127.0.0.1:1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "get_checkpoint", lambda uuid: SimpleNamespace(download=download))
    return folders


def test_a_truncated_download_is_repeated_and_a_complete_one_is_not(downloads):
    with pytest.raises(UserError, match=f"checkpoint {UUID} cannot be downloaded from .*the connection was lost"):
        find_checkpoint(UUID)
    place = find_checkpoint(UUID)
    assert (place / "state_dict.pth").read_bytes() == b"whole"
    assert find_checkpoint(UUID) == place
    assert len(downloads) == 2


def test_nobody_else_can_replace_downloaded_weights(downloads, tmp_path):
    with pytest.raises(UserError):
        find_checkpoint(UUID)
    folder = find_checkpoint(UUID).parent
    assert folder.is_relative_to(tmp_path / "cache")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_uuid_without_a_master_says_what_to_set(monkeypatch):
    monkeypatch.delenv("DET_MASTER", raising=False)
    with pytest.raises(UserError, match="set DET_MASTER"):
        find_checkpoint(UUID)
