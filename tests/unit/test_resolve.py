"""Finding and fetching a checkpoint's files, with the real huggingface_hub client against a hub on
loopback."""

import errno
import json
import os
import re
import resource
import socket
import subprocess
import sys
import warnings

import pytest

from streamllm.weights import resolve as module
from streamllm.weights.errors import CheckpointError, CheckpointNotFound
from streamllm.weights.resolve import resolve
from tests.hub import client, environment, serve

NAME = "org/tiny-llama"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PLAIN = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": os.urandom(300_000),
    # Beside them, as in real repositories, what nobody asked for:
    "consolidated.safetensors": b"not this",
    "pytorch_model.bin": b"nor this",
    "original/model.safetensors": b"nor that",
    "README.md": b"# nor that",
}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    SHARDS[0]: b"first",
    SHARDS[1]: b"second",
    "model-00003-of-00002.safetensors": b"stray",
}


@pytest.fixture
def hub(tmp_path):
    with serve() as hub, client(hub, tmp_path / "cache"):
        yield hub


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def refusal(pattern, *args, kind=CheckpointNotFound, **kwargs):
    """The message of the error, which is one line and matches."""
    with pytest.raises(kind, match=pattern) as caught:
        resolve(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is fetched.


def test_plain(hub):
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

    hub.forget()  # everything is in the cache now, also that there is no index
    source = resolve(NAME)
    source.file("config.json"), source.file("model.safetensors")
    assert source.find("model.safetensors.index.json") is None
    assert hub.asked == [f"HEAD /{NAME}/resolve/main/config.json"]


def test_sharded(hub):
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


def test_a_known_commit_in_the_cache_asks_nothing(hub):
    commit = hub.add(NAME, PLAIN)
    resolve(NAME)
    hub.forget()
    assert resolve(NAME, revision=commit).file("config.json").exists()
    assert hub.asked == []


def test_the_revision_is_resolved_once(hub):
    first = hub.add(NAME, PLAIN)
    source = resolve(NAME)
    hub.add(NAME, PLAIN | {"model.safetensors": b"pushed meanwhile"})
    assert source.file("model.safetensors").read_bytes() == PLAIN["model.safetensors"]
    assert source.commit == first != resolve(NAME).commit


def test_a_model_without_config_still_has_a_commit(hub):
    commit = hub.add(NAME, {"adapter_config.json": b"{}"})
    source = resolve(NAME)
    assert source.commit == commit
    assert source.file("adapter_config.json").read_bytes() == b"{}"
    with pytest.raises(
        CheckpointNotFound, match=f"^{NAME} has no file config.json at {commit}: see what it has at http"
    ):
        source.file("config.json")


def test_a_model_without_organization_and_a_moved_one(hub):
    hub.add("gpt2", PLAIN)
    hub.moved["old/gpt2"] = "gpt2"
    assert resolve("gpt2").file("model.safetensors").stat().st_size == 300_000
    assert resolve("old/gpt2").file("model.safetensors").stat().st_size == 300_000


def test_files_in_folders(hub):
    hub.add(NAME, PLAIN)
    assert resolve(NAME).file("original/model.safetensors").read_bytes() == b"nor that"


def test_has_fetches_nothing(hub):
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


def test_a_cut_download_is_resumed(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # what it writes at a time
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


def test_a_reset_download_is_tried_again(hub):
    hub.add(NAME, PLAIN)
    hub.cut("cdn:model.safetensors", after=100_000, times=2, reset=True)
    assert resolve(NAME).file("model.safetensors").read_bytes() == PLAIN["model.safetensors"]


def test_a_download_that_never_succeeds_ends(hub, cache):
    hub.add(NAME, PLAIN)
    hub.cut("cdn:model.safetensors", after=0, times=1000)
    source = resolve(NAME)
    with pytest.raises(
        CheckpointNotFound,
        match=r"^cannot fetch model.safetensors of org/tiny-llama from http.*check the network",
    ):
        source.file("model.safetensors")
    assert hub.asked.count("GET cdn:model.safetensors") <= 24
    assert not list(cache.rglob("*.incomplete"))


@pytest.mark.parametrize("part", ["main/config.json", "cdn:model.safetensors"])
def test_a_server_that_fails_twice(hub, part):
    hub.add(NAME, PLAIN)
    hub.fail(part, 500, times=2)
    assert resolve(NAME).file("model.safetensors").stat().st_size == 300_000


def test_a_server_that_keeps_failing(hub):
    hub.add(NAME, PLAIN)
    hub.fail("config.json", 503)
    refusal(
        rf"^{hub.url} failed to deliver config.json of {NAME} \(503\), several times: try again later$", NAME
    )
    hub.faults.clear()
    source = resolve(NAME)
    hub.fail("cdn:", 500)
    with pytest.raises(CheckpointNotFound, match=r"failed to deliver model.safetensors .* \(500\)"):
        source.file("model.safetensors")


def test_too_many_requests(hub):
    hub.fail("config.json", 429)
    refusal(r"no more requests for now \(429\): wait", NAME)


def test_a_server_that_is_no_hub(hub):
    hub.fail("config.json", 200, headers={"ETag": '"x"'})
    refusal("does not answer as a hub does: check HF_ENDPOINT", NAME)


def test_a_mirror_without_error_codes(hub):
    hub.add(NAME, PLAIN)
    source = resolve(NAME)
    hub.fail("tokenizer.model", 404)
    assert source.find("tokenizer.model") is None
    assert not source.has("tokenizer.model")
    hub.fail("/other/", 404)
    refusal("check the name and the revision", "other/model")


# Refusals.


def test_gated(hub):
    hub.add(NAME, PLAIN)
    hub.gated[NAME] = "accepted"
    pattern = f"^{NAME} is gated: accept its licence at {hub.url}/{NAME}, then set HF_TOKEN"
    refusal(pattern, NAME)
    refusal(pattern, NAME, token="somebody")
    source = resolve(NAME, token="accepted")
    source.file("model.safetensors")
    assert {r.token for r in hub.requests if r.path.startswith("cdn:")} == {
        None
    }  # the token stays on the hub


def test_token_of_the_environment(hub, monkeypatch):
    hub.add(NAME, PLAIN)
    hub.private[NAME] = "mine"
    refusal(
        "no model of that name at .*, or it is private: check the name; if it is private, set HF_TOKEN", NAME
    )
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert resolve(NAME).commit
    hub.forget()
    resolve(NAME, token=False)
    assert {r.token for r in hub.requests} == {None}


def test_no_such_model(hub):
    message = refusal(
        "^there is no folder 'org/tiny-lama' here and no model of that name at", "org/tiny-lama"
    )
    assert "check the name" in message
    assert hub.asked == ["HEAD /org/tiny-lama/resolve/main/config.json"]


def test_refused_token(hub):
    hub.add(NAME, PLAIN)
    hub.fail("config.json", 401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
    refusal(r"refuses access to org/tiny-llama \(401\): set HF_TOKEN to a valid token", NAME, token="expired")


def test_forbidden(hub):
    hub.add(NAME, PLAIN)
    hub.fail("config.json", 403)
    refusal(r"forbids to read config.json of org/tiny-llama \(403\): set HF_TOKEN", NAME, token="narrow")


def test_no_such_revision(hub):
    hub.add(NAME, PLAIN)
    refusal(
        f"^{NAME} has no revision 'v2': give a branch, a tag or a commit of {hub.url}", NAME, revision="v2"
    )
    refusal("has no revision 'a{40}'", NAME, revision="a" * 40)


def test_no_such_file(hub):
    commit = hub.add(NAME, PLAIN)
    source = resolve(NAME)
    with pytest.raises(
        CheckpointNotFound, match=f"^{NAME} has no file vocab.json at {commit}: see what it has at"
    ):
        source.file("vocab.json")


@pytest.mark.parametrize("revision", ["", "../main", "a b", "/main", "main\n", "-x", "a..b"])
def test_impossible_revisions(hub, revision):
    refusal("can be no revision: give a branch", NAME, revision=revision)
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["a b/c", "org/na--me", "org/na..me", "-org/name", "org/name.git", "org:name"]
)
def test_impossible_names(hub, name):
    refusal("no model of the hub can have that name: give an existing folder, or organization/name", name)
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["./none", "../none", "/none/at/all", "~/none-of-this", "none/", "a/b/c", "a\\b"]
)
def test_paths_that_do_not_exist(hub, name):
    refusal("^there is no folder '.*: check the path", name)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_nothing(hub, name):
    refusal("names no checkpoint: give a folder", name)


def test_an_address(hub):
    refusal("is an address: give the model's name alone", "https://huggingface.co/org/name")


def test_no_network(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with client(url, tmp_path):
        refusal(
            (
                rf"^cannot fetch config.json of {NAME} from {url} \(ConnectError: .*check the network;"
                r" .*HF_HUB_OFFLINE=1$"
            ),
            NAME,
        )


# The cache.


def test_an_unwritable_cache(hub, tmp_path):
    hub.add(NAME, PLAIN)
    (tmp_path / "file").touch()
    with client(hub, tmp_path / "file" / "cache"):
        refusal("^cannot write config.json of .* into the cache .*: make it writable, or set HF_HOME", NAME)


def test_a_full_disk(hub, cache):
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


def test_disk_errors_are_not_tried_again(hub, monkeypatch):
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    hub.add(NAME, PLAIN)
    refusal("^no space left for config.json", NAME)
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
                f"^{NAME} is not in the cache {cache}, and {by} forbids to fetch it: .*'hf download {NAME}'$"
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
            assert source.find("tokenizer.model") is None  # the cache remembers that there is none
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


def test_offline_after_a_download_of_everything(hub, cache):
    from huggingface_hub import snapshot_download

    commit = hub.add(NAME, PLAIN)
    snapshot_download(NAME)
    hub.forget()
    with client(hub, cache, offline=True), warnings.catch_warnings():
        warnings.simplefilter("error")  # the list of the files in the cache says what there is not
        source = resolve(NAME)
        assert source.commit == commit
        assert source.find("tokenizer.model") is None
        assert source.file("model.safetensors").stat().st_size == 300_000
        with pytest.raises(CheckpointNotFound, match=r"has no file tokenizer.model"):
            source.file("tokenizer.model")
    assert hub.asked == []


def test_a_dead_hub_and_a_full_cache(hub, cache):
    hub.add(NAME, PLAIN)
    resolve(NAME).file("model.safetensors")
    with client("http://127.0.0.1:9", cache):
        assert resolve(NAME).file("model.safetensors").stat().st_size == 300_000


def test_bars_for_big_files_only(hub, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # bars although stderr is no terminal
    monkeypatch.setattr(module, "PROGRESS_BYTES", 100_000)
    hub.add(NAME, PLAIN)
    resolve(NAME).file("model.safetensors")
    shown = capsys.readouterr().err
    assert "model.safetensors: 100%" in shown
    assert "config.json" not in shown
    hub.add("org/other", PLAIN)
    resolve("org/other", progress=False).file("model.safetensors")
    assert "%" not in capsys.readouterr().err


def test_the_environment_variables(hub, tmp_path):
    """A process that knows HF_ENDPOINT, HF_HOME and HF_TOKEN as users set them, and HF_HUB_OFFLINE after
    that."""
    commit = hub.add(NAME, PLAIN)
    hub.gated[NAME] = "accepted"
    program = (
        "from streamllm.weights.resolve import resolve\n"
        f"source = resolve({NAME!r})\n"
        "print(source.commit, source.file('model.safetensors').stat().st_size)"
    )
    for variables in (environment(hub, tmp_path, HF_TOKEN="accepted"), environment(None, tmp_path)):
        done = subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split() == [commit, "300000"], done.stderr
    assert (tmp_path / "hub" / "models--org--tiny-llama" / "refs" / "main").read_text() == commit


def test_the_import_is_lazy():
    program = "import sys, streamllm.weights.resolve; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# Folders.


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "x.json").write_text("[]")
    return folder


def test_folder(folder):
    for name in (folder, str(folder), f"{folder}/"):
        source = resolve(name)
        assert source.commit is None
        assert source.file("config.json") == folder / "config.json"
        assert source.file("sub/x.json").read_text() == "[]"
        assert source.find("model.safetensors") is None
        assert source.find("config.json/x") is None
        assert source.has("config.json")
        assert not source.has("model.safetensors")
        with pytest.raises(CheckpointNotFound, match=r"has no file 'model.safetensors'"):
            source.file("model.safetensors")


def test_a_folder_shadows_a_name(hub, tmp_path, monkeypatch):
    hub.add(NAME, PLAIN)
    here = tmp_path / NAME
    here.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(NAME).commit is None
    assert hub.asked == []
    refusal(
        "is a folder here, and a folder has no revision 'v1': leave the revision out",
        NAME,
        revision="v1",
        kind=CheckpointError,
    )


def test_a_file_and_a_missing_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    refusal("is not a folder: give the folder that holds config.json", tmp_path / "model.safetensors")
    refusal("there is no folder", tmp_path / "none")


def test_a_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/checkpoint").file("config.json").exists()


ESCAPES = [
    *(
        "/etc/passwd",
        "//etc/passwd",
        "../config.json",
        "sub/../../config.json",
        "..",
        "sub/..",
        "a\\b",
        "..\\x",
    ),
    *("C:x", "c:/x", "", ".", "./", "a\0b", "a\nb", "x" * 256, "x/" * 600 + "x", "\ud800"),
    *(None, 7, ["a"], {"a": 1}),
]


@pytest.mark.parametrize("relative", ESCAPES, ids=lambda value: repr(value)[:20])
def test_names_that_leave_the_folder(hub, folder, relative):
    hub.add(NAME, PLAIN)
    for source in (resolve(folder), resolve(NAME)):
        hub.forget()
        for ask in (source.file, source.find, source.has):
            with pytest.raises(
                CheckpointError,
                match=r"^the file name .*: a checkpoint may only name files inside its own folder",
            ) as caught:
                ask(relative)
            assert len(str(caught.value)) < 300
        assert hub.asked == []


def test_links(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    (folder / "in").symlink_to("config.json")
    (folder / "nothing").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    source = resolve(folder)
    assert source.file("in").read_text() == "{}"
    for relative in ("out", "up/secret", "up/none"):
        with pytest.raises(CheckpointError, match="is a link out of the folder"):
            source.find(relative)
    with pytest.raises(CheckpointNotFound, match=r"'nothing' of .* is a link to nothing"):
        source.find("nothing")
    with pytest.raises(CheckpointNotFound, match="cannot read 'loop'"):
        source.find("loop")
    (tmp_path / "alias").symlink_to(folder)
    assert resolve(tmp_path / "alias").file("config.json").read_text() == "{}"


def test_what_is_not_a_regular_file_is_never_opened(folder):
    os.mkfifo(folder / "pipe")
    source = resolve(folder)
    with pytest.raises(CheckpointError, match=r"'pipe' of .* is a pipe or a device, not a file"):
        source.find("pipe")
    with pytest.raises(CheckpointError, match=r"'sub' of .* is a folder, not a file"):
        source.find("sub")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(folder):
    (folder / "config.json").chmod(0)
    with pytest.raises(CheckpointNotFound, match=r"no permission to read .*config.json"):
        resolve(folder).find("config.json")


def test_a_snapshot_of_the_cache_as_a_folder(hub, cache, tmp_path):
    hub.add(NAME, PLAIN)
    snapshot = resolve(NAME).file("model.safetensors").parent
    assert (snapshot / "model.safetensors").is_symlink()
    source = resolve(snapshot)
    assert source.commit is None
    assert source.file("model.safetensors").read_bytes() == PLAIN["model.safetensors"]
    (snapshot / "evil").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        source.file("evil")


def test_repr(hub, folder):
    commit = hub.add(NAME, PLAIN)
    assert repr(resolve(NAME)) == f"Source('{NAME}', commit='{commit}')"
    assert str(resolve(NAME)) == f"{NAME} at {commit[:7]}"
    assert re.search(r"^Source\('.*/checkpoint'\)$", repr(resolve(folder)))
