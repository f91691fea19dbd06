"""Places by path and by URI, against servers that speak S3 and GCS: whole files and folders, leases, and caches."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
from processes import end, start

from s2t_models import loading, locks, node_cache
from s2t_models.artifact import CARD, Artifact, ArtifactError, refuse_foreign
from s2t_models.locks import FolderError, locked
from s2t_models.node_cache import cache_folder, fetched, recorded_digests, sha256_of
from s2t_models.settings import ModelSettings
from s2t_models.storage import (
    DIGESTS,
    ObjectPath,
    StorageError,
    location,
    remove,
    whole,
    write_json,
    written_to,
)


@pytest.fixture(params=["object_store", "google_store"])
def place(request: pytest.FixtureRequest) -> ObjectPath:
    """A folder of a store for one test."""
    return ObjectPath(f"{request.getfixturevalue(request.param)}/{request.node.originalname}")


def test_a_path_and_a_uri_are_told_apart() -> None:
    assert location("runs/train") == Path("runs/train")
    assert location(Path("/runs")) == Path("/runs")
    found = location("s3://bucket/a/b.json/")
    assert isinstance(found, ObjectPath)
    assert (str(found), found.name, found.stem, found.suffix) == ("s3://bucket/a/b.json", "b.json", "b", ".json")
    assert found.parent / "c" == location("s3://bucket/a/c") == found.with_name("c")
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(StorageError, match="neither a path nor a URI such as s3://BUCKET"):
        location("ftp://host/file")
    with pytest.raises(StorageError, match="give a folder on this machine"):
        Path(found)


def test_an_object_is_read_listed_and_removed(place: ObjectPath) -> None:
    assert not place.exists()
    assert list(place.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=f"no such object: '{place}/none'"):
        (place / "none").read_bytes()
    (place / "a.json").write_text("{}")
    (place / "b" / "c.txt").write_bytes(b"c")
    assert place.is_dir()
    assert (place / "a.json").is_file()
    assert [found.name for found in place.iterdir()] == ["a.json", "b"]
    assert [found.name for found in place.glob("*.json")] == ["a.json"]
    assert list(place.files()) == ["a.json", "b/c.txt"]
    remove(place)
    assert not list(place.iterdir())
    (place / "a.json").unlink(missing_ok=True)


def test_what_is_interrupted_leaves_what_was_there(place: ObjectPath) -> None:
    write_json(place / "a.json", {"old": 1})

    def interrupted() -> None:
        with whole(place / "a.json") as part:
            part.write_text("ne")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert json.loads((place / "a.json").read_text()) == {"old": 1}


def test_a_folder_is_marked_last_with_the_digests_of_its_files(place: ObjectPath, monkeypatch) -> None:
    def publish(name: str) -> None:
        with whole(place, "mark.json") as part:
            part.mkdir()
            (part / "mark.json").write_text("{}")
            (part / "sub").mkdir()
            (part / "sub" / name).write_text(name)

    publish("one")
    publish("two")
    assert list(place.files()) == [DIGESTS, "mark.json", "sub/two"]
    assert recorded_digests(place / "sub").keys() == {"two"}
    upload = ObjectPath.upload

    def broken(self: ObjectPath, source: Path) -> str:
        if self.name == "three":
            raise StorageError("the store went away")
        return upload(self, source)

    monkeypatch.setattr(ObjectPath, "upload", broken)
    with pytest.raises(StorageError, match="went away"):
        publish("three")
    assert not (place / "mark.json").exists(), "without its mark a folder is nothing to readers"
    assert recorded_digests(place) == {}
    monkeypatch.undo()
    refuse_foreign(place, "mark.json")
    publish("four")
    assert list(place.files()) == [DIGESTS, "mark.json", "sub/four"]
    (place / DIGESTS).unlink()
    (place / "mark.json").unlink()
    with pytest.raises(ArtifactError, match="exists and holds something else"):
        refuse_foreign(place, "mark.json")


def test_files_are_added_to_a_folder(place: ObjectPath, tmp_path: Path) -> None:
    (place / "before").write_text("x")
    for folder in (place, tmp_path / "new"):
        with written_to(folder) as here:
            (here / "figures").mkdir()
            (here / "figures" / "a.csv").write_text("a")
        assert (folder / "figures" / "a.csv").read_text() == "a"
    assert (place / "before").exists()


def refused(place: ObjectPath) -> str:
    with pytest.raises(FolderError) as refusal, locked(place):
        pass
    return str(refusal.value)


def test_a_folder_of_the_store_is_held_by_one_job(place: ObjectPath) -> None:
    with locked(place):
        words = "another job is at work there; wait for it or choose another --output"
        assert refused(place).startswith(f"{place}: {words} (process {os.getpid()} on")
    with locked(place):
        pass
    assert not (place / locks.LOCK).files()


def test_a_lease_ends_with_its_process_or_its_time(place: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place / locks.LOCK / "other.json"
    here = {"host": locks.socket.gethostname(), "boot": locks._boot()}
    write_json(other, here | {"pid": 2**22 + 1})  # more than Linux gives
    with locked(place):
        assert not other.exists()
    write_json(other, {"host": "elsewhere", "boot": "", "pid": 1})
    assert "process 1 on elsewhere; if it was killed, the folder is free" in refused(place)
    monkeypatch.setattr(locks, "LEASE_S", -1.0)
    with locked(place):
        assert not other.exists()


def test_a_job_that_lost_its_lease_is_stopped(place: ObjectPath) -> None:
    script = f"""
import time
from s2t_models import locks
from s2t_models.storage import location, remove
locks.RENEW_S = 0.05
with locks.locked(location({str(place)!r})):
    for _ in range(300):  # until it is not in the middle of renewing
        remove(location({str(place / locks.LOCK)!r}))
        time.sleep(0.2)
"""
    status, _, said = end(start("-c", script))
    assert status == locks.LOST
    assert said == f"{place}: this job did not reach the store for 60 s, and another has taken the folder\n"


def test_of_many_that_come_at_once_one_at_most_holds(place: ObjectPath) -> None:
    holding, most, ended = [0], [0], []
    ready = threading.Barrier(6)

    def come() -> None:
        ready.wait()
        try:
            with locked(place):
                holding[0] += 1
                most[0] = max(most[0], holding[0])
                threading.Event().wait(0.2)
                holding[0] -= 1
            ended.append("held")
        except FolderError:
            ended.append("refused")

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] <= 1
    assert len(ended) == 6


def test_a_store_that_does_not_answer_is_one_line(object_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"s3://nowhere/a.json: there is no such bucket"):
        (ObjectPath("s3://nowhere") / "a.json").write_text("")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"s3://runs/x/a.json: the store cannot be reached; see that its address"):
        (ObjectPath("s3://runs/x") / "a.json").write_text("")


def test_a_model_is_fetched_once_and_known_without_its_weights(
    place: ObjectPath, untrained_artifact: Path, recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2T_CACHE", str(tmp_path / "cache"))
    with whole(place / "artifact", CARD) as part:
        shutil.copytree(untrained_artifact, part)
    there, here = Artifact.load(str(place / "artifact")), Artifact.load(untrained_artifact)
    assert there.card == here.card
    base = ModelSettings(path="embedded:slm", dtype="float32", device="cpu")
    assert loading.weights_hash(there.model(base)) == loading.weights_hash(here.model(base))
    assert loading.tokenizer_hash(there.model(base)) == loading.tokenizer_hash(here.model(base))
    assert not list(cache_folder().glob("fetched/*/model/*.safetensors")), "the driver needs no weights"
    folder = loading.resolve(there.model(base))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert loading.resolve(there.model(base)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    state, ours = there.head().state_dict(), here.head().state_dict()
    assert all((state[name] == ours[name]).all() for name in ours)
    (place / "artifact" / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(StorageError, match=r"model.safetensors: is not the file that was published there"):
        loading.resolve(there.model(base))


def test_a_folder_that_was_copied_there_by_other_means_is_hashed_once(place: ObjectPath) -> None:
    embedded = loading.resolve(ModelSettings(path="embedded:slm"))
    for path in embedded.iterdir():
        (place / path.name).upload(path)
    model = ModelSettings(path=str(place))
    assert loading.weights_hash(model) == loading.weights_hash(ModelSettings(path="embedded:slm"))
    assert loading.resolve(model).parent.parent == cache_folder() / "fetched"
    assert fetched(place) == loading.resolve(model)


def test_a_large_file_is_hashed_again_only_where_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    monkeypatch.setattr("s2t_models.node_cache.LARGE", 1)
    hashed: list[Path] = []
    original = node_cache._hash

    def counted(path: Path) -> str:
        hashed.append(path)
        return original(path)

    monkeypatch.setattr(node_cache, "_hash", counted)
    first = sha256_of(path)
    assert sha256_of(path) == first
    path.write_bytes(b"other")
    assert sha256_of(path) != first
    assert len(hashed) == 2


def test_the_hubs_own_digests_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("s2t_models.node_cache._hash", lambda path: pytest.fail("it was hashed"))
    assert sha256_of(tmp_path / "model.safetensors") == "ab" * 32
