"""`streamllm perplexity`, `inspect` and `recall` on a tiny checkpoint."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamllm import load_model
from streamllm.commands import resumable
from streamllm.commands.inspect import inspect
from streamllm.commands.perplexity import perplexity
from streamllm.commands.recall import recall
from streamllm.evaluate import scoring
from streamllm.evaluate.texts import as_stream, as_texts, beginning, samples

MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
WORDS = "one two three four five six seven eight nine ten eleven twelve, and so on without end.\n"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text(WORDS * 30)
    return str(tmp_path / "text")


@pytest.fixture
def run(checkpoint):
    def run(command, *arguments, code=0):
        result = CliRunner().invoke(
            command, [*arguments, "--model", str(checkpoint), "--device", "cpu"],
            help_option_names=["-h", "--help"],  # click keeps the names of a command's first call
        )  # fmt: skip
        assert result.exit_code == code, result.output
        return result.output

    return run


def plot_option(file):
    return ["--plot", str(file)] if MATPLOTLIB else []


def cells(output, first):
    (line,) = (line for line in output.splitlines() if line.startswith(first))
    return line.split()


def test_perplexity_equals_that_of_the_library(run, text, tmp_path, model, tokenizer):
    output = run(
        perplexity, text, "--mode", "all", "--sinks", "0,2", "--window", "30", "--positions", "20",
        "--dense-tokens", "100", "--json", str(tmp_path / "out.json"),
    )  # fmt: skip
    ids = as_stream(tokenizer, [WORDS * 30])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(r["mode"], r["sinks"], r["window"], r["tokens"]) for r in results] == [
        ("sinks", 0, 30, len(ids) - 1),
        ("sinks", 2, 30, len(ids) - 1),
        ("window", 0, 30, len(ids) - 1),
        ("dense", 0, 100, 99),
        ("recompute", 0, 30, 20),
        ("recompute", 2, 30, 20),
    ]
    expected = scoring.perplexity(model, ids, sinks=2, window=30)
    assert results[1]["nll"] == pytest.approx(expected.nll, rel=1e-6)
    rows = [line.split() for line in output.splitlines()]
    assert [row[0] for row in rows[1:]] == ["sinks", "sinks", "window", "dense", "recompute", "recompute"]
    assert rows[2][4] == f"{expected.perplexity:.4g}"


def test_perplexity_with_a_cache_in_int8(run, text, tmp_path, model, tokenizer):
    file = tmp_path / "out.json"
    output = run(
        perplexity, text, "--mode", "all", "--sinks", "2", "--window", "30", "--positions", "20",
        "--quantize-cache", "int8", "--json", str(file),
    )  # fmt: skip
    results = json.loads(file.read_text())["results"]
    assert [result["quantize"] for result in results] == ["int8", "int8", "int8", None]
    ids = as_stream(tokenizer, [WORDS * 30])
    exact, rounded = (scoring.perplexity(model, ids, sinks=2, window=30, quantize=q) for q in (None, "int8"))
    assert results[0]["nll"] == pytest.approx(rounded.nll, rel=1e-6)
    assert rounded.nll != exact.nll
    assert output.splitlines()[1].startswith("sinks, int8")


def test_perplexity_with_weights_in_int8(run, text, tmp_path, checkpoint, tokenizer):
    file, state = tmp_path / "out.json", str(tmp_path / "state")
    arguments = [text, "--window", "30", "--dtype", "float32", "--resume", state, "--json", str(file)]
    run(perplexity, *arguments, "--quantize", "int8")
    found = json.loads(file.read_text())
    ids = as_stream(tokenizer, [WORDS * 30])
    models = (load_model(checkpoint, dtype="float32", device="cpu", quantize=q) for q in (None, "int8"))
    exact, rounded = (scoring.perplexity(model, ids, sinks=4, window=30) for model in models)
    assert found["results"][0]["nll"] == pytest.approx(rounded.nll, rel=1e-6)
    assert found["dtype"] == "float32, int8 weights"
    assert rounded.nll != pytest.approx(exact.nll, rel=1e-6)
    assert "another model, text or setting" in run(perplexity, *arguments, code=2)


def test_texts_are_one_stream_or_separate(run, text, tmp_path, tokenizer):
    (tmp_path / "other").write_text("café")
    counts = []
    for arguments in ([], ["--reset-between-texts"], ["--tokens", "50"]):
        file = tmp_path / "out.json"
        run(perplexity, text, str(tmp_path / "other"), *arguments, "--json", str(file))
        counts.append(json.loads(file.read_text())["results"][0]["tokens"])
    words, other = (len(tokenizer.encode(text)) for text in (WORDS * 30, "café"))
    assert counts == [words + 1 + other - 1 + 1 - 1, words + other, 49]


def test_an_interrupted_run_is_finished_by_the_next_one(run, text, tmp_path, tokenizer, monkeypatch):
    arguments = [text, "--sinks", "0,2", "--window", "30", "--chunk", "64"]
    whole = run(perplexity, *arguments)
    state = str(tmp_path / "state")
    monkeypatch.setattr(resumable, "SAVE_EVERY", 0.0)
    original, calls = scoring.stream_nll, []

    def interrupted(*given):
        for piece in original(*given):
            calls.append(piece)
            if len(calls) == 12:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(scoring, "stream_nll", interrupted)
    run(perplexity, *arguments, "--resume", state, code=1)
    assert (tmp_path / "state.cache").exists()
    scored = len(calls)
    assert run(perplexity, *arguments, "--resume", state) == whole
    pieces = -(-(len(as_stream(tokenizer, [WORDS * 30])) - 1) // 64)
    assert len(calls) - scored == 2 * pieces - 11  # the interrupted piece, and the pieces after it
    assert not (tmp_path / "state.cache").exists()
    assert run(perplexity, *arguments, "--resume", state) == whole
    assert len(calls) - scored == 2 * pieces - 11  # no piece was scored again
    output = run(perplexity, *arguments[:-1], "32", "--resume", state, code=2)
    assert "another model, text or setting" in output


def test_inspect_recommends_a_number_of_sinks(run, text, tmp_path):
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    output = run(
        inspect, text, "--samples", "3", "--length", "20", "--span", "16", "--sinks", "0,1,2",
        "--json", str(file), *plot_option(picture),
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert cells(output, "token") == ["token", *map(str, range(8))]
    share = found["share"][1]
    assert cells(output, "layer 1")[2] == f"{100 * sum(head[0] for head in share) / len(share):.1f}"
    assert cells(output, "sinks") == ["sinks", "0", "1", "2"]
    assert re.search(r"This model needs (no|1|2) sinks?: ", output)
    assert [result["window"] for result in found["sweep"]] == [16, 15, 14]
    assert not MATPLOTLIB or picture.stat().st_size > 10_000


@pytest.mark.skipif(not MATPLOTLIB, reason="matplotlib is not installed")
def test_a_picture_names_model_text_and_samples(run, text, checkpoint, tmp_path, monkeypatch):
    from streamllm.evaluate import plots

    titles = []

    def keep(figure, path):
        titles.append(figure.get_suptitle() or figure.axes[0].get_title())

    monkeypatch.setattr(plots, "save_figure", keep)
    run(perplexity, text, text, "--window", "30", "--tokens", "100", "--plot", str(tmp_path / "out.png"))
    run(inspect, text, "--samples", "3", "--length", "20", "--span", "16", "--sinks", "0,1",
        "--plot", str(tmp_path / "out.png"))  # fmt: skip
    name, file = Path(checkpoint).name, Path(text).name
    assert titles == [f"{name} · 100 tokens of {file}, {file}", f"{name} · 3 samples of 20 tokens of {file}"]


def test_recall_reports_scores_by_distance(run, tmp_path):
    file = tmp_path / "out.json"
    output = run(
        recall, "--lines", "30", "--back", "1,20", "--distances", "120,300", "--samples", "2",
        "--window", "100", "--json", str(file), *plot_option(tmp_path / "out.svg"),
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert [score["lines"] for score in found["StreamEval"]] == [1, 20]
    assert [score["distance"] for score in found["passkey"]] == [120, 300]
    assert "more than 100 tokens back has left the window" in output
    assert not MATPLOTLIB or (tmp_path / "out.svg").read_text().startswith("<?xml")


def test_recall_compares_modes_on_the_tasks_of_ruler(run, tmp_path):
    file = tmp_path / "out.json"
    output = run(
        recall, "--mode", "all", "--task", "needle,variables,words", "--distances", "300", "--samples", "2",
        "--window", "100", "--json", str(file), *plot_option(tmp_path / "out.svg"),
    )  # fmt: skip
    found = json.loads(file.read_text())
    curves = [
        f"{task}, {mode}"
        for mode in ("sinks", "window", "dense")
        for task in ("needle", "variables", "words")
    ]
    assert [name for name in found if isinstance(found[name], list)] == curves
    assert [found[name][0]["questions"] for name in curves] == [2, 10, 2] * 3
    assert "Variables, 2 texts for each distance, 4 sinks + window 100" in output
    assert "Words, 2 texts for each distance, dense" in output


@pytest.mark.skipif(not MATPLOTLIB, reason="matplotlib is not installed")
def test_no_two_curves_of_a_picture_look_alike():
    from streamllm.evaluate import plots

    for page in (0, 1):
        looks = {(plots.curve_style(index)[page], str(plots.line_style(index))) for index in range(36)}
        assert len(looks) == 36


@pytest.mark.skipif(not MATPLOTLIB, reason="matplotlib is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_every_mode_is_drawn(model, tokenizer, tmp_path, dark):
    from streamllm.evaluate import plots

    ids = as_stream(tokenizer, [WORDS * 20])
    results = [scoring.perplexity(model, ids, mode=mode, window=20, positions=9) for mode in scoring.MODES]
    figure = plots.perplexity_curves(results, trained_length=256, dark=dark)
    labels = [line.get_label() for line in figure.axes[0].lines][:4]
    assert labels == ["4 sinks + window 20", "window 20", "dense", "4 sinks + window 20, re-computed"]
    plots.save_figure(figure, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sinks", "two"], "'two' is not a list of numbers of at least 0"),
        (["--window", "0"], "'0' is not a list of numbers of at least 1"),
        (["--mode", "sliding"], "'sliding' is not one of sinks, window, dense, recompute, all"),
        (["nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_arguments_are_named(run, arguments, message):
    assert message in run(perplexity, *arguments, code=2)


@pytest.mark.skipif(not MATPLOTLIB, reason="matplotlib is not installed")
def test_an_unknown_picture_format_is_refused_before_the_run(checkpoint):
    with pytest.raises(ValueError, match="does not have the extension of a picture"):
        perplexity.main(["--plot", "out.txt", "--model", str(checkpoint)], standalone_mode=False)


def test_texts_start_with_the_bos_token(tokenizer):
    begin = tokenizer.bos_token_id
    assert beginning(tokenizer) == [begin]
    end = tokenizer.eos_token_id
    stream = as_stream(tokenizer, ["one", "two"]).tolist()
    assert stream == [*tokenizer.encode("one"), end, *tokenizer.encode("two")[1:], end]
    assert [text.tolist() for text in as_texts(tokenizer, ["one"])] == [[*tokenizer.encode("one"), end]]
    drawn = samples(tokenizer, as_stream(tokenizer, [WORDS]), 5, 9)
    assert drawn.shape == (5, 9)
    assert set(drawn[:, 0].tolist()) == {begin}
