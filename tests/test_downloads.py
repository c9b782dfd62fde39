"""Weights from URLs are the named ones, and complete."""

import hashlib
import io
from pathlib import Path

import pytest
import torch
from stores import changing_store, http_store

from shared.errors import UserError
from shared.training.checkpoints import read_weights


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache"


def saved(value: float) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.full((4,), value)}, file)
    return file.getvalue()


def read(url: str) -> float:
    return read_weights(url, "hyperparameters.weights", "nothing else")[0]["w"][0].item()


def test_two_urls_that_end_in_one_name_are_two_files(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / "web" / name).mkdir(parents=True)
        (tmp_path / "web" / name / "model.pth").write_bytes(saved(value))
    with http_store(tmp_path / "web") as url:
        assert [read(f"{url}/{name}/model.pth") for name in ("a", "b", "a", "b")] == [1.0, 2.0, 1.0, 2.0]
        assert read(f"{url}/a/model.pth?version=2") == 1.0


def test_a_url_is_downloaded_once():
    with changing_store([saved(1.0), saved(2.0)]) as url:
        assert [read(f"{url}/model.pth") for _ in range(3)] == [1.0, 1.0, 1.0]


def test_a_download_that_a_lost_connection_cut_off_is_made_again(cache):
    whole = saved(3.0)
    with changing_store([whole[:100], whole], length=len(whole)) as url:
        with pytest.raises(UserError, match=rf"weights: .*connection was lost: 100 of {len(whole)} bytes came"):
            read(f"{url}/model.pth")
        assert not list(cache.rglob("*.pth"))
        assert read(f"{url}/model.pth") == 3.0


def test_a_download_that_cannot_be_read_is_made_again():
    with changing_store([b"<html>wait a minute</html>", saved(4.0)]) as url:
        with pytest.raises(UserError, match="cannot be read as weights"):
            read(f"{url}/model.pth")
        assert read(f"{url}/model.pth") == 4.0


def test_a_file_that_has_not_the_digest_in_its_name_is_refused(cache):
    digest = "0123abcd"
    with changing_store([saved(5.0)]) as url:
        with pytest.raises(UserError, match=f"its SHA-256 begins with .*, and its name says {digest}"):
            read(f"{url}/model-{digest}.pth")
        assert not list(cache.rglob("*.pth"))
    whole = saved(6.0)
    digest = hashlib.sha256(whole).hexdigest()
    with changing_store([whole]) as url:
        assert read(f"{url}/model-{digest}.pth") == 6.0
        assert read(f"{url}/model-20230101.pth") == 6.0  # a date


def test_a_file_of_torch_hub_s_cache_is_taken_if_its_name_proves_it(tmp_path):
    hub = tmp_path / "torch/hub/checkpoints"
    hub.mkdir(parents=True)
    digest = hashlib.sha256(saved(7.0)).hexdigest()
    (hub / f"model-{digest}.pth").write_bytes(saved(7.0))
    (hub / "model.pth").write_bytes(saved(8.0))
    assert read(f"http://127.0.0.1:1/model-{digest}.pth") == 7.0
    for name in ("model.pth", f"other-{digest}.pth"):
        with pytest.raises(UserError, match="cannot be downloaded"):
            read(f"http://127.0.0.1:1/{name}")


def test_nobody_else_can_replace_a_download(cache):
    with changing_store([saved(1.0)]) as url:
        read(f"{url}/model.pth")
    assert [folder.stat().st_mode & 0o777 for folder in cache.iterdir()] == [0o700]


def test_a_file_url_is_read_where_it_is(tmp_path, cache):
    path = Path(tmp_path / "a model.pth")
    for value in (1.0, 2.0):
        path.write_bytes(saved(value))
        assert read(path.as_uri()) == value
    assert not list(cache.rglob("*.pth"))
