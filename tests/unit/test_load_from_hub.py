"""streamllm.load("org/name"): from a hub on loopback, then offline."""

import json
import subprocess
import sys

import pytest
import torch

import streamllm
from tests import tiny
from tests.hub import client, environment, serve

PROGRAM = """
import json, sys, torch, streamllm
for name, revision in json.loads(sys.argv[1]):
    try:
        model, tokenizer = streamllm.load(name, revision=revision)
        print(json.dumps(model(torch.tensor([tokenizer.encode("streams")]))[0, -1].tolist()))
    except streamllm.CheckpointError as error:
        print(json.dumps(str(error)))
"""
PLAIN, SHARDED = tiny.checkpoint(), tiny.checkpoint(shards=3)
OTHERS = {
    "consolidated.safetensors": b"?",
    "pytorch_model.bin": b"?",
    "original/model.safetensors": b"?",
    "README.md": b"?",
}


@pytest.fixture
def hub():
    with serve() as hub:
        yield hub


def loaded(asked, variables):
    """The logits of each (name, revision), or the error, in a new process with these environment variables."""
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(asked)]
    done = subprocess.run(arguments, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def expected(folder, files):
    """The logits of a local checkpoint with these files."""
    model, tokenizer = streamllm.load(tiny.write(folder, files))
    return model(torch.tensor([tokenizer.encode("streams")]))[0, -1].tolist()


def test_load_from_the_hub_then_offline(hub, tmp_path):
    hub.add("org/plain", PLAIN | OTHERS)
    commit = hub.add("org/sharded", SHARDED | OTHERS)
    hub.add("org/sharded", tiny.checkpoint(weights=tiny.tensors(seed=1)), revision="refs/pr/1")
    asked = [
        ("org/plain", None),
        ("org/sharded", None),
        ("org/sharded", commit),
        ("org/sharded", "refs/pr/1"),
    ]
    results = loaded([*asked, ("org/none", None)], environment(hub, tmp_path / "home"))

    plain = expected(tmp_path / "plain", PLAIN)
    other = expected(tmp_path / "other", tiny.checkpoint(weights=tiny.tensors(seed=1)))
    for result, wanted in zip(results, (plain, plain, plain, other), strict=False):
        assert result == pytest.approx(wanted, abs=1e-5)
    assert plain != pytest.approx(other, abs=1e-2)
    assert "check the name" in results[4]
    assert hub.fetched == sorted({*PLAIN, *SHARDED})  # none of OTHERS

    hub.forget()
    offline = loaded([*asked, ("org/none", None)], environment(None, tmp_path / "home"))
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(offline[:4], results[:4], strict=True))
    assert offline[4].startswith("org/none is not in the cache")
    assert hub.asked == []


def test_each_file_is_downloaded_once_and_a_second_load_sends_one_request(hub, tmp_path):
    hub.add("org/sharded", SHARDED | OTHERS)
    with client(hub, tmp_path):
        streamllm.load("org/sharded")
        bodies = [request for request in hub.asked if request.startswith("GET") and "/tree/" not in request]
        assert len(bodies) == len(set(bodies)) == len(SHARDED)
        assert sum("/tree/" in request for request in hub.asked) == 1  # for additional_chat_templates
        hub.forget()
        streamllm.load("org/sharded")
        assert hub.asked == ["HEAD /org/sharded/resolve/main/config.json"]


def test_all_chat_templates_come_from_the_hub_and_from_its_cache(hub, tmp_path):
    names = {
        "chat_template.jinja": b"D",
        **{f"additional_chat_templates/{n}.jinja": n.encode() for n in "ab"},
    }
    hub.add("org/chat", PLAIN | names | {"additional_chat_templates/README.md": b"?"})
    expected = {"default": "D", "a": "a", "b": "b"}
    with client(hub, tmp_path):
        assert streamllm.load_tokenizer("org/chat").chat_template == expected
        assert streamllm.load_tokenizer("org/chat", local_files_only=True).chat_template == expected
    assert not any("README" in request for request in hub.asked)


def test_pickles_are_refused_without_downloading_them(hub, tmp_path):
    files = {name: data for name, data in PLAIN.items() if name != tiny.SINGLE}
    hub.add("org/old", files | {"pytorch_model.bin": b"pickle"})
    with (
        client(hub, tmp_path),
        pytest.raises(streamllm.CheckpointError, match=r"only as pytorch_model.bin, a pickle"),
    ):
        streamllm.load("org/old")
    assert "pytorch_model.bin" not in hub.fetched


def test_shard_that_the_hub_lacks(hub, tmp_path):
    lost = "model-00002-of-00003.safetensors"
    hub.add("org/broken", {name: data for name, data in SHARDED.items() if name != lost})
    with (
        client(hub, tmp_path),
        pytest.raises(streamllm.CheckpointNotFound, match=rf"^org/broken has no file {lost}"),
    ):
        streamllm.load("org/broken")


def test_offline_without_the_weights(hub, tmp_path):
    hub.add("org/plain", PLAIN)
    with client(hub, tmp_path):
        streamllm.load_tokenizer("org/plain")
    with (
        client(hub, tmp_path, offline=True),
        pytest.warns(UserWarning, match="going on without it"),
        pytest.raises(
            streamllm.CheckpointNotFound, match=r"^model.safetensors of org/plain is not in the cache"
        ),
    ):
        streamllm.load("org/plain")


def test_small_files_are_checked_before_weights_are_downloaded(hub, tmp_path):
    for name, lacking in (("org/no-tokenizer", "tokenizer.json"), ("org/no-config", "config.json")):
        hub.add(name, {file: data for file, data in PLAIN.items() if file != lacking})
        with client(hub, tmp_path), pytest.raises(streamllm.CheckpointNotFound):
            streamllm.load(name)
    hub.add("org/bad-generation", PLAIN | {"generation_config.json": b"{"})
    with client(hub, tmp_path), pytest.raises(streamllm.CheckpointError):
        streamllm.load("org/bad-generation")
    assert tiny.SINGLE not in hub.fetched
