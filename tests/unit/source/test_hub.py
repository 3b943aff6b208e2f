"""Downloads from the hub: which files, at which commit, and after broken connections."""

import json

import pytest

from streamllm.weights.errors import CheckpointNotFound
from streamllm.weights.source import resolve
from tests.unit.source.samples import NAME, PLAIN, SHARDED, SHARDS, error_message

# Which files are downloaded.


def test_single_file(hub):
    commit = hub.add(NAME, PLAIN)
    source = resolve(NAME)
    assert (source.name, source.commit) == (NAME, commit)
    assert source.file("model.safetensors").read_bytes() == PLAIN["model.safetensors"]
    assert source.find("model.safetensors.index.json") is None
    assert hub.asked == [
        f"HEAD /{NAME}/resolve/main/config.json",
        f"GET /{NAME}/resolve/main/config.json",
        f"HEAD /{NAME}/resolve/{commit}/model.safetensors",
        "GET cdn:model.safetensors",
        f"HEAD /{NAME}/resolve/{commit}/model.safetensors.index.json",
    ]
    assert hub.fetched == ["config.json", "model.safetensors"]

    hub.forget()  # the cache has everything now, and knows that there is no index
    source = resolve(NAME)
    source.file("config.json"), source.file("model.safetensors")
    assert source.find("model.safetensors.index.json") is None
    assert hub.asked == [f"HEAD /{NAME}/resolve/main/config.json"]


def test_shards(hub):
    hub.add(NAME, SHARDED)
    source = resolve(NAME)
    index = json.loads(source.file("model.safetensors.index.json").read_bytes())
    assert [source.file(shard).read_bytes() for shard in sorted(index["weight_map"].values())] == [
        b"first",
        b"second",
    ]
    assert hub.fetched == ["config.json", *SHARDS, "model.safetensors.index.json"]


@pytest.mark.parametrize(
    "revision", ["v1.0", "refs/pr/1", "feature/longer-context", "commit", "short commit"]
)
def test_revisions(hub, revision):
    hub.add(NAME, PLAIN)
    commit = hub.add(NAME, PLAIN | {"config.json": b'{"v": 1}'}, revision=revision)
    asked = {"commit": commit, "short commit": commit[:7]}.get(revision, revision)
    source = resolve(NAME, revision=asked)
    assert source.commit == commit
    assert source.file("config.json").read_bytes() == b'{"v": 1}'


def test_commit_in_the_cache_needs_no_request(hub):
    commit = hub.add(NAME, PLAIN)
    resolve(NAME)
    hub.forget()
    assert resolve(NAME, revision=commit).file("config.json").exists()
    assert hub.asked == []


def test_revision_is_resolved_once(hub):
    first = hub.add(NAME, PLAIN)
    source = resolve(NAME)
    hub.add(NAME, PLAIN | {"model.safetensors": b"pushed later"})
    assert source.file("model.safetensors").read_bytes() == PLAIN["model.safetensors"]
    assert source.commit == first != resolve(NAME).commit


def test_model_without_config_has_a_commit(hub):
    commit = hub.add(NAME, {"adapter_config.json": b"{}"})
    source = resolve(NAME)
    assert source.commit == commit
    assert source.file("adapter_config.json").read_bytes() == b"{}"
    with pytest.raises(
        CheckpointNotFound, match=f"^{NAME} has no file config.json at {commit}: see its files at http"
    ):
        source.file("config.json")


def test_model_without_organization_and_renamed_model(hub):
    hub.add("gpt2", PLAIN)
    hub.moved["old/gpt2"] = "gpt2"
    assert resolve("gpt2").file("model.safetensors").stat().st_size == 300_000
    assert resolve("old/gpt2").file("model.safetensors").stat().st_size == 300_000


def test_file_in_a_subfolder(hub):
    hub.add(NAME, PLAIN)
    assert resolve(NAME).file("original/model.safetensors").read_bytes() == b"nor that"


def test_has_downloads_nothing(hub):
    commit = hub.add(NAME, PLAIN)
    source = resolve(NAME)
    hub.forget()
    assert source.has("config.json")
    assert source.has("pytorch_model.bin")
    assert not source.has("tokenizer.model")
    assert hub.asked == [
        f"HEAD /{NAME}/resolve/{commit}/{file}" for file in ("pytorch_model.bin", "tokenizer.model")
    ]
    hub.fail("other.json", 500)
    with pytest.raises(CheckpointNotFound, match="several times"):
        source.has("other.json")


# Broken connections and servers.


def test_interrupted_download_is_resumed(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # bytes of one write
    hub.add(NAME, PLAIN)
    hub.cut("cdn:model.safetensors", after=100_000)
    hub.cut("cdn:model.safetensors", after=50_000)
    path = resolve(NAME).file("model.safetensors")
    assert path.read_bytes() == PLAIN["model.safetensors"]
    assert hub.asked[-3:] == [
        "GET cdn:model.safetensors",
        "GET cdn:model.safetensors bytes=100000-",
        "GET cdn:model.safetensors bytes=150000-",
    ]


def test_reset_download_is_repeated(hub):
    hub.add(NAME, PLAIN)
    hub.cut("cdn:model.safetensors", after=100_000, times=2, reset=True)
    assert resolve(NAME).file("model.safetensors").read_bytes() == PLAIN["model.safetensors"]


def test_download_that_always_fails_ends(hub, cache):
    hub.add(NAME, PLAIN)
    hub.cut("cdn:model.safetensors", after=0, times=1000)
    source = resolve(NAME)
    with pytest.raises(
        CheckpointNotFound,
        match=r"^cannot download model.safetensors of org/tiny-llama from http.*check the network",
    ):
        source.file("model.safetensors")
    assert hub.asked.count("GET cdn:model.safetensors") <= 24
    assert not list(cache.rglob("*.incomplete"))


@pytest.mark.parametrize("part", ["main/config.json", "cdn:model.safetensors"])
def test_server_that_fails_twice(hub, part):
    hub.add(NAME, PLAIN)
    hub.fail(part, 500, times=2)
    assert resolve(NAME).file("model.safetensors").stat().st_size == 300_000


def test_server_that_always_fails(hub):
    hub.add(NAME, PLAIN)
    hub.fail("config.json", 503)
    error_message(
        rf"^{hub.url} failed to deliver config.json of {NAME} \(503\), several times: try again later$", NAME
    )
    hub.faults.clear()
    source = resolve(NAME)
    hub.fail("cdn:", 500)
    with pytest.raises(CheckpointNotFound, match=r"failed to deliver model.safetensors .* \(500\)"):
        source.file("model.safetensors")


def test_too_many_requests(hub):
    hub.fail("config.json", 429)
    error_message(r"no more requests for now \(429\): wait", NAME)


def test_server_that_is_not_a_hub(hub):
    hub.fail("config.json", 200, headers={"ETag": '"x"'})
    error_message("does not answer as a hub does: check HF_ENDPOINT", NAME)


def test_mirror_without_error_codes(hub):
    hub.add(NAME, PLAIN)
    source = resolve(NAME)
    hub.fail("tokenizer.model", 404)
    assert source.find("tokenizer.model") is None
    assert not source.has("tokenizer.model")
    hub.fail("/other/", 404)
    error_message("check the name and the revision", "other/model")
