"""Names, revisions, tokens and models that the hub or we refuse: one sentence with the next step."""

import socket

import pytest

from streamllm.weights.errors import CheckpointNotFound
from streamllm.weights.source import resolve
from tests.hub import client
from tests.unit.source.samples import NAME, PLAIN, error_message


def test_gated_model(hub):
    hub.add(NAME, PLAIN)
    hub.gated[NAME] = "accepted"
    pattern = f"^{NAME} is gated: accept its licence at {hub.url}/{NAME}, then set HF_TOKEN"
    error_message(pattern, NAME)
    error_message(pattern, NAME, token="another account")
    source = resolve(NAME, token="accepted")
    source.file("model.safetensors")
    # The token is sent to the hub only.
    assert {r.token for r in hub.requests if r.path.startswith("cdn:")} == {None}


def test_token_from_the_environment(hub, monkeypatch):
    hub.add(NAME, PLAIN)
    hub.private[NAME] = "mine"
    error_message(
        "no model of that name at .*, or it is private: check the name; if it is private, set HF_TOKEN", NAME
    )
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert resolve(NAME).commit
    hub.forget()
    resolve(NAME, token=False)
    assert {r.token for r in hub.requests} == {None}


def test_unknown_model(hub):
    message = error_message(
        "^there is no folder 'org/tiny-lama' here and no model of that name at", "org/tiny-lama"
    )
    assert "check the name" in message
    assert hub.asked == ["HEAD /org/tiny-lama/resolve/main/config.json"]


def test_invalid_token(hub):
    hub.add(NAME, PLAIN)
    hub.fail("config.json", 401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
    error_message(
        r"refuses access to org/tiny-llama \(401\): set HF_TOKEN to a valid token", NAME, token="expired"
    )


def test_token_without_permission(hub):
    hub.add(NAME, PLAIN)
    hub.fail("config.json", 403)
    error_message(
        r"forbids to read config.json of org/tiny-llama \(403\): set HF_TOKEN", NAME, token="narrow"
    )


def test_unknown_revision(hub):
    hub.add(NAME, PLAIN)
    error_message(
        f"^{NAME} has no revision 'v2': give a branch, a tag or a commit of {hub.url}", NAME, revision="v2"
    )
    error_message("has no revision 'a{40}'", NAME, revision="a" * 40)


def test_unknown_file(hub):
    commit = hub.add(NAME, PLAIN)
    source = resolve(NAME)
    with pytest.raises(
        CheckpointNotFound, match=f"^{NAME} has no file vocab.json at {commit}: see its files at"
    ):
        source.file("vocab.json")


@pytest.mark.parametrize("revision", ["", "../main", "a b", "/main", "main\n", "-x", "a..b"])
def test_impossible_revisions(hub, revision):
    error_message("cannot be a revision: give a branch", NAME, revision=revision)
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["a b/c", "org/na--me", "org/na..me", "-org/name", "org/name.git", "org:name"]
)
def test_impossible_names(hub, name):
    error_message(
        "no model of the hub can have that name: give an existing folder, or organization/name", name
    )
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["./none", "../none", "/none/at/all", "~/none-of-this", "none/", "a/b/c", "a\\b"]
)
def test_paths_that_do_not_exist(hub, name):
    error_message("^there is no folder '.*: check the path", name)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_empty_names(hub, name):
    error_message("is not the name of a checkpoint: give a folder", name)


def test_url(hub):
    error_message("is a URL: give only the model's name", "https://huggingface.co/org/name")


def test_no_network(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with client(url, tmp_path):
        error_message(
            (
                rf"^cannot download config.json of {NAME} from {url} \(ConnectError: .*check the network;"
                rf" if you meant a folder, there is no {NAME!r} here; .*HF_HUB_OFFLINE=1$"
            ),
            NAME,
        )
    told = f"{url} does not answer: trying again for up to half a minute"
    assert [record.getMessage() for record in caplog.records] == [told]
