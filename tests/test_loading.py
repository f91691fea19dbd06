"""Loading models and tokenizers: what is refused, and when two tokenizers are the same."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import AutoTokenizer, BartConfig, Gemma3Config, T5Config

from s2t_models import loading
from s2t_models.hosting import pinned
from s2t_models.recipe import RecipeError, load_recipe
from s2t_models.settings import ModelSettings

EMBEDDED = loading.resolve(ModelSettings(path="embedded:slm"))


def folder(path: Path, without: tuple[str, ...] = ()) -> ModelSettings:
    """A copy of the embedded SLM's folder without some of its files."""
    shutil.copytree(EMBEDDED, path, ignore=shutil.ignore_patterns(*without))
    return ModelSettings(path=str(path), dtype="float32", device="cpu")


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> ModelSettings:
    settings = folder(path)
    content = json.loads((path / "tokenizer.json").read_text())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content, sort_keys=True))
    return settings


def test_a_tokenizer_is_the_same_however_it_was_written(tmp_path: Path) -> None:
    def as_an_older_library(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        del content["model"]["ignore_merges"], content["model"]["byte_fallback"], content["version"]
        content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}

    one, other = folder(tmp_path / "one"), changed(tmp_path / "other", as_an_older_library)
    assert (tmp_path / "one/tokenizer.json").read_bytes() != (tmp_path / "other/tokenizer.json").read_bytes()
    assert loading.tokenizer_hash(one) == loading.tokenizer_hash(other)
    assert loading.tokenizer_difference(one, other) is None
    AutoTokenizer.from_pretrained(one.path).save_pretrained(tmp_path / "saved")
    shutil.copy(EMBEDDED / "model.safetensors", tmp_path / "saved")
    shutil.copy(EMBEDDED / "config.json", tmp_path / "saved")
    assert loading.tokenizer_hash(ModelSettings(path=str(tmp_path / "saved"))) == loading.tokenizer_hash(one)


def test_tokenizers_that_do_other_things_are_told_apart_by_name(tmp_path: Path) -> None:
    def swap_two_tokens(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]

    def drop_a_merge(content: dict[str, Any]) -> None:
        content["model"]["merges"].pop()

    def drop_a_token(content: dict[str, Any]) -> None:
        del content["model"]["vocab"]["".join(content["model"]["merges"].pop())]

    def other_special_tokens(content: dict[str, Any]) -> None:
        content["added_tokens"][1]["lstrip"] = True

    one = folder(tmp_path / "one")
    x = loading.load_tokenizer(one).get_vocab()["x"]
    for change, words in (
        (swap_two_tokens, f"token {x} is 'x' in one of them alone"),
        (drop_a_merge, "they differ in merges"),
        (drop_a_token, "one has 832 tokens, the other 831"),
        (other_special_tokens, "they differ in special tokens"),
    ):
        other = changed(tmp_path / change.__name__, change)
        assert loading.tokenizer_hash(one) != loading.tokenizer_hash(other)
        assert loading.tokenizer_difference(one, other) == words


def tekken(path: Path, piece: bytes) -> ModelSettings:
    settings = folder(path, without=("tokenizer*", "*.jinja"))
    pieces = [*(bytes([i]) for i in range(256)), piece]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(b).decode(), "token_str": None} for i, b in enumerate(pieces)]
    config = {"pattern": "[a-z]+", "num_vocab_tokens": 257, "default_vocab_size": 257, "default_num_special_tokens": 0}
    (path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": []}))
    return settings


def test_folders_without_a_known_tokenizer_file_are_not_all_alike(tmp_path: Path) -> None:
    one, other = tekken(tmp_path / "one", b"ab"), tekken(tmp_path / "other", b"cd")
    assert loading.tokenizer_hash(one) != loading.tokenizer_hash(other)
    nothing = folder(tmp_path / "nothing", without=("tokenizer*", "*.jinja"))
    with pytest.raises(RecipeError, match="nothing: holds no tokenizer"):
        loading.tokenizer_hash(nothing)
    garbled = folder(tmp_path / "garbled")
    (tmp_path / "garbled/tokenizer.json").write_text("{")
    with pytest.raises(RecipeError, match="garbled: its tokenizer cannot be loaded: "):
        loading.tokenizer_hash(garbled)


def test_a_hash_is_made_again_only_where_the_files_changed(tmp_path: Path) -> None:
    settings = folder(tmp_path / "one")
    before = loading.tokenizer_hash(settings)
    with patch.object(loading, "load_tokenizer", side_effect=AssertionError):
        assert loading.tokenizer_hash(settings.model_copy(update={"slots": 3})) == before
    path = tmp_path / "one/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    os.utime(path, (1, 1))
    assert loading.tokenizer_hash(settings) != before


def test_what_is_no_decoder_only_model_is_refused_by_name(tmp_path: Path) -> None:
    settings = folder(tmp_path / "one")
    for config, words in (
        (T5Config(), "t5 is no decoder-only language model"),
        (BartConfig(), "bart is no decoder-only language model"),
        (Gemma3Config(), "gemma3 is a multimodal model"),
    ):
        config.save_pretrained(tmp_path / "one")
        with pytest.raises(RecipeError, match=f"one: {words}"):
            loading.load_model(settings)
    (tmp_path / "one/config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(RecipeError, match=r"one: its config\.json cannot be used: .*unheard_of"):
        loading.load_model(settings)


def test_the_hubs_digests_and_commit_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository as the hub's own client caches it: weights are links to blobs that are named by their sha256."""
    commit, digest = "c0ffee" * 6 + "c0ff", "ab" * 32
    repository = tmp_path / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    (repository / "blobs" / digest).write_bytes(b"weights that are never read")
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in EMBEDDED.glob("*.json"):
        shutil.copy(path, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    settings = ModelSettings(path="someone/small")
    assert loading.pinned(settings).revision == commit
    recipe = load_recipe("embedded", ["slm.path=someone/small"])
    assert (pinned(recipe).slm.revision, pinned(recipe).teacher.revision) == (commit, None)
    assert loading.load_tokenizer(settings).get_vocab() == loading.load_tokenizer(embedded_settings()).get_vocab()
    with pytest.raises(RecipeError, match="someone/small: neither a folder here nor to be had from the hub"):
        loading.weights_hash(settings)  # the hub is not to be had in tests
    (snapshot / "model.safetensors").symlink_to(repository / "blobs" / digest)
    monkeypatch.setattr("s2t_models.node_cache._hash", lambda path: pytest.fail(f"{path} was hashed"))
    assert loading.weights_hash(settings) == hashlib.sha256(bytes.fromhex(digest)).hexdigest()
    assert loading.weights_hash(loading.pinned(settings)) == loading.weights_hash(settings)


def embedded_settings() -> ModelSettings:
    return ModelSettings(path="embedded:slm")
