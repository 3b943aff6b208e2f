"""The hub's cache: errors of the disk, and loading offline."""

import errno
import resource
import subprocess
import sys
import warnings

import pytest

from streamllm.weights.errors import CheckpointNotFound
from streamllm.weights.source import hub as hub_module
from streamllm.weights.source import resolve
from tests.hub import client, environment
from tests.unit.source.samples import NAME, PLAIN, SHARDED, SHARDS, error_message


def test_cache_that_is_not_writable(hub, tmp_path):
    hub.add(NAME, PLAIN)
    (tmp_path / "file").touch()
    with client(hub, tmp_path / "file" / "cache"):
        error_message(
            "^cannot write config.json of .* into the cache .*: make it writable, or set HF_HOME", NAME
        )


def test_full_disk(hub, cache):
    hub.add(NAME, PLAIN)
    source = resolve(NAME)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointNotFound, match=r"^no space left for model.safetensors of .*: free some, or set HF_HOME"
        ):
            source.file("model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(cache.rglob("*.incomplete"))
    assert source.file("model.safetensors").stat().st_size == 300_000


def test_errors_of_the_disk_are_not_retried(hub, monkeypatch):
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    hub.add(NAME, PLAIN)
    error_message("^no space left for config.json", NAME)
    assert len(calls) == 1


@pytest.mark.parametrize("by", ["local_files_only", "HF_HUB_OFFLINE"])
def test_offline(hub, cache, by):
    def offline(revision=None):
        return resolve(NAME, revision=revision, local_files_only=by == "local_files_only")

    commit = hub.add(NAME, SHARDED)
    with (
        client(hub, cache, offline=by == "HF_HUB_OFFLINE"),
        pytest.raises(
            CheckpointNotFound,
            match=(
                f"^{NAME} is not in the cache {cache}, and {by} forbids to download it: .*'hf download {NAME}'$"
            ),
        ),
    ):
        offline()

    source = resolve(NAME)
    source.file(SHARDS[0])
    assert source.find("tokenizer.model") is None
    hub.add(NAME, SHARDED | {"config.json": b'{"newer": 1}'})
    hub.forget()
    with client(hub, cache, offline=by == "HF_HUB_OFFLINE"):
        source = offline()
        assert source.commit == offline(revision=commit).commit == commit
        assert source.file("config.json").read_bytes() == b"{}"
        assert source.file(SHARDS[0]).read_bytes() == b"first"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert source.find("tokenizer.model") is None  # the cache knows that there is none
        with pytest.raises(
            CheckpointNotFound,
            match=f"^{SHARDS[1]} of {NAME} is not in the cache .*'hf download {NAME} {SHARDS[1]}'$",
        ):
            source.file(SHARDS[1])
        with pytest.warns(
            UserWarning, match="the cache does not say whether org/tiny-llama has a file chat_template.jinja"
        ):
            assert source.find("chat_template.jinja") is None
        with pytest.raises(
            CheckpointNotFound, match=f"^revision v2 of {NAME} is not in the cache .* --revision v2'$"
        ):
            offline(revision="v2")
        with pytest.raises(CheckpointNotFound, match=r"^revision f{40} of"):
            offline(revision="f" * 40)
    assert hub.asked == []


def test_offline_after_a_complete_download(hub, cache):
    from huggingface_hub import snapshot_download

    commit = hub.add(NAME, PLAIN)
    snapshot_download(NAME)
    hub.forget()
    with client(hub, cache, offline=True), warnings.catch_warnings():
        warnings.simplefilter("error")  # the cache has a list of all files
        source = resolve(NAME)
        assert source.commit == commit
        assert source.find("tokenizer.model") is None
        assert source.file("model.safetensors").stat().st_size == 300_000
        with pytest.raises(CheckpointNotFound, match=r"has no file tokenizer.model"):
            source.file("tokenizer.model")
    assert hub.asked == []


def test_cache_suffices_if_the_hub_is_down(hub, cache):
    hub.add(NAME, PLAIN)
    resolve(NAME).file("model.safetensors")
    with client("http://127.0.0.1:9", cache):
        assert resolve(NAME).file("model.safetensors").stat().st_size == 300_000


def test_progress_bars_only_for_large_files(hub, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # bars although stderr is no terminal
    monkeypatch.setattr(hub_module, "MIN_PROGRESS_BYTES", 100_000)
    hub.add(NAME, PLAIN)
    resolve(NAME).file("model.safetensors")
    shown = capsys.readouterr().err
    assert "model.safetensors: 100%" in shown
    assert "config.json" not in shown
    hub.add("org/other", PLAIN)
    resolve("org/other", progress=False).file("model.safetensors")
    assert "%" not in capsys.readouterr().err


def test_environment_variables(hub, tmp_path):
    """A process with HF_ENDPOINT, HF_HOME and HF_TOKEN, then one with HF_HUB_OFFLINE."""
    commit = hub.add(NAME, PLAIN)
    hub.gated[NAME] = "accepted"
    program = (
        "from streamllm.weights.source import resolve\n"
        f"source = resolve({NAME!r})\n"
        "print(source.commit, source.file('model.safetensors').stat().st_size)"
    )
    for variables in (environment(hub, tmp_path, HF_TOKEN="accepted"), environment(None, tmp_path)):
        done = subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split() == [commit, "300000"], done.stderr
    assert (tmp_path / "hub" / "models--org--tiny-llama" / "refs" / "main").read_text() == commit


def test_huggingface_hub_is_imported_lazily():
    program = "import sys, streamllm.weights.source; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
