"""Lists of prompts: generate_batch, complete and score give what each prompt gets alone; and `streamllm batch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import streamllm
from streamllm import SinkCache, Stream, complete, generate_batch, score
from streamllm.cli import main
from streamllm.commands.batch_lines import Results
from streamllm.engine import completions

SIZES = {"sinks": 4, "window": 40}
PROMPTS = [[1, 5, 9], [7], list(range(2, 70)), [33, 34], [1, 2, 3, 4, 5], [80], [60, 61]]


@pytest.fixture(scope="module")
def pair(checkpoint):
    return streamllm.load(checkpoint, device="cpu", dtype="float64")


def alone(model, prompt, **options):
    return list(streamllm.generate(model, prompt, SinkCache(model, **SIZES), **options))


def by_row(pairs, count):
    found = [[] for _ in range(count)]
    for row, token in pairs:
        found[row].append(token)
    return found


@pytest.mark.parametrize("slots", [None, 1, 3])
def test_each_prompt_gets_the_tokens_that_it_gets_alone(pair, slots):
    model, _ = pair
    each = [{"max_new_tokens": 5 * n, "temperature": 0.5 * n} for n in range(len(PROMPTS))]
    each[4]["seed"] = 99
    got = generate_batch(model, PROMPTS, slots=slots, **SIZES, each=each, seed=10, eos=[], top_k=40)
    wanted = [
        alone(model, prompt, eos=[], top_k=40, **{"seed": 10 + n, **each[n]})
        for n, prompt in enumerate(PROMPTS)
    ]
    assert by_row(got, len(PROMPTS)) == wanted


def test_prompts_are_read_when_a_slot_is_free(pair):
    model, _ = pair
    read = []

    def prompts():
        for number in range(6):
            read.append(number)
            yield torch.tensor([number + 1])

    tokens = generate_batch(model, prompts(), slots=2, **SIZES, max_new_tokens=4, eos=[])
    next(tokens)
    assert read == [0, 1]
    assert len(by_row([*tokens], 6)[5]) == 4


def test_errors_name_the_prompt(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="prompt 1: there are no tokens"):
        list(generate_batch(model, [[1], []], max_new_tokens=3))
    with pytest.raises(ValueError, match="prompt 0: token id 999"):
        list(generate_batch(model, [[999]], max_new_tokens=3))
    with pytest.raises(TypeError, match="heat is not a setting"):
        generate_batch(model, [[1]], heat=1)
    with pytest.raises(ValueError, match="every token is forbidden"):
        list(
            generate_batch(
                model, [[1], [2]], max_new_tokens=3, eos=[], each=[{}, {"logits_processor": forbid}]
            )
        )
    assert list(generate_batch(model, [])) == []


def forbid(tokens, logits):
    return logits - torch.inf


def test_wrong_lists_and_options_for_all_are_refused_at_the_call(pair):
    model, tokenizer = pair
    calls = [lambda *given, **options: generate_batch(model, *given, **options),
             lambda *given, **options: complete(model, tokenizer, *given, max_new_tokens=3, **options)]  # fmt: skip
    for call in calls:
        for wrong in ("one text", b"x", {"prompt": "x"}, None, 3):
            with pytest.raises(TypeError, match="must be a list of prompts"):
                call(wrong)
        for each in ({"seed": 3}, 3, "x"):
            with pytest.raises(TypeError, match="each must have a mapping"):
                call([[1], [2]], each=each)
        for each in ([{}], [{}] * 3):
            with pytest.raises(ValueError, match=f"settings for {len(each)} prompts, and there are 2"):
                call([[1], [2]], each=each)
        with pytest.raises(ValueError, match="seed must be"):
            call([[1]], seed=1.5)
        with pytest.raises(TypeError, match="heat is not a setting"):
            call([[1]], heat=1)
    with pytest.raises(ValueError, match="max_new_tokens must be"):
        generate_batch(model, [[1]], max_new_tokens=-1)
    for stop in (3, [3]):
        with pytest.raises(TypeError, match="stop must be a string or a list of strings, not 3"):
            complete(model, tokenizer, ["x"], max_new_tokens=3, stop=stop)
    with pytest.raises(TypeError, match="prompt 1 has none"):
        list(generate_batch(model, iter([[1], [2]]), each=iter([{}]), max_new_tokens=3, slots=1))
    with pytest.raises(TypeError, match="prompt 0: tokens must be ids"):
        list(generate_batch(model, [b"abc"], max_new_tokens=3))


def test_complete(pair):
    model, tokenizer = pair
    texts = ["Once upon", "def ", "one two three", [5, 6, 7]]
    each = [{}, {"stop": "e"}, {"top_logprobs": 1, "max_new_tokens": 5}, {"temperature": 1.0}]
    got = complete(model, tokenizer, texts, slots=2, **SIZES, each=each, seed=4, max_new_tokens=25)
    for number, (text, own) in enumerate(zip(texts, each, strict=True)):
        stream = Stream(model, tokenizer, **SIZES)
        options = {"max_new_tokens": 25, "seed": 4 + number, **own}
        assert got[number].text == "".join(stream.generate(text, **options))
        assert got[number].finish_reason == stream.finish_reason
        assert got[number].tokens == stream.said
        assert got[number].error is None
        assert [one.token for one in got[number].logprobs] == [one.token for one in stream.logprobs]


def test_a_prompt_that_fails_has_its_error(pair):
    model, tokenizer = pair
    prompts = ["x", "y", [{"role": "user", "content": "hi"}], "z"]
    each = [{}, {"temperature": -1.0}, {}, {"logits_processor": forbid}]
    got = complete(model, tokenizer, prompts, **SIZES, each=each, max_new_tokens=4)
    assert [type(one.error).__name__ for one in got] == [
        "NoneType", "ValueError", "ChatTemplateError", "ValueError",
    ]  # fmt: skip
    assert got[0].tokens == 4
    assert {number for number, _ in completions(model, tokenizer, prompts, each=each, max_new_tokens=4)} == {
        0, 1, 2, 3,
    }  # fmt: skip


def test_score_is_the_sum_of_the_log_probabilities(pair):
    model, tokenizer = pair
    texts = ["Once upon a time", ("def once", "(upon)"), "naïve café ☕ " * 9, ("", "x")]
    found = score(model, tokenizer, texts, **SIZES, batch=2, chunk=7)
    for text, one in zip(texts, found, strict=True):
        context, rest = ("", text) if isinstance(text, str) else text
        before = tokenizer.encode_piece(context)
        ids = before + tokenizer.encode_piece(rest, bos=False, continuation=bool(context))
        logits = model(torch.tensor([ids]), SinkCache(model, **SIZES))[0].log_softmax(-1)
        wanted = [logits[n - 1, ids[n]].item() for n in range(len(before), len(ids))]
        assert one.tokens == ids[len(before) :]
        assert one.logprobs == pytest.approx(wanted)
        assert one.total == pytest.approx(sum(wanted))
        assert one.is_greedy == [
            logits[n - 1].argmax().item() == ids[n] for n in range(len(before), len(ids))
        ]
    with pytest.raises(ValueError, match="text 1 has no token"):
        score(model, tokenizer, ["a", ("b", "")])


# streamllm batch


LINES = [
    {"prompt": "Once upon", "id": "first"},
    {"prompt": "def ", "max_new_tokens": 5, "temperature": 1.0, "metadata": {"a": [1]}},
    {"prompt": [5, 6, 7], "stop": ["e"], "top_logprobs": 0},
    {"prompt": "x", "seed": 7, "temperature": 1.0},
]
WRONG = ["no json", "[1]", '{"id": 3}', '{"prompt": 4}', '{"prompt": "x", "heat": 1}', '{"messages": []}',
         '{"prompt": "x", "top_k": -1}', '{"prompt": "x", "logit_bias": {"a": 1}}']  # fmt: skip


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([*map(json.dumps, LINES[:2]), "", *WRONG, *map(json.dumps, LINES[2:])]))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["batch", *map(str, arguments)])
    return int(ended.value.code or 0)


def results(path: Path) -> dict[int, dict]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({one["line"] for one in found}) == len(found)
    return {one["line"]: one for one in found}


def test_batch_writes_a_result_for_each_line(checkpoint, file, capsys):
    options = [
        "--model",
        checkpoint,
        "--dtype",
        "float64",
        "--window",
        40,
        "--seed",
        3,
        "-n",
        12,
        "--slots",
        2,
    ]
    assert run(file, *options) == 1
    output = Path(f"{file}.results.jsonl")
    found = results(output)
    numbers = [1, 2, 12, 13]
    assert sorted(found) == [1, 2, *range(4, 14)]
    model, tokenizer = streamllm.load(checkpoint, device="cpu", dtype="float64")
    for number, line in zip(numbers, LINES, strict=True):
        stream = Stream(model, tokenizer, **SIZES)
        own = {name: line[name] for name in ("max_new_tokens", "temperature", "stop", "seed") if name in line}
        text = "".join(stream.generate(line["prompt"], **{"max_new_tokens": 12, "seed": 3 + number, **own}))
        one = found[number]
        assert (one["text"], one["finish_reason"], one["tokens"]) == (text, stream.finish_reason, stream.said)
        assert (one.get("id"), one.get("metadata")) == (line.get("id"), line.get("metadata"))
        assert ("logprobs" in one) == ("top_logprobs" in line)
    assert all(found[number].keys() - {"id"} == {"line", "key", "error"} for number in range(4, 12))
    assert "12 of 12 lines have a result, 8 of them an error" in capsys.readouterr().err

    whole = output.read_bytes()
    assert run(file, *options) == 1  # nothing is left to do
    assert output.read_bytes() == whole
    # An interrupted run: some lines are missing, the last one is cut off.
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[4:9]) + b'{"line": 1, "te')
    assert run(file, *options) == 1
    assert results(output) == found
    # Failed lines are tried again, and only these
    assert run(file, *options, "--retry-failed") == 1
    assert results(output) == found
    assert run(file, *options[:-2], "-n", 13) == 2
    assert "belongs to another run" in capsys.readouterr().err
    for text in ("{}", "{}\n", '{"a": 1}\n', "notes"):
        output.write_text(text)
        assert run(file, *options) == 2
        assert "not a file of results" in capsys.readouterr().err
        assert output.read_text() == text  # untouched


def test_batch_refuses_what_it_cannot_read(tmp_path, checkpoint, capsys):
    (tmp_path / "empty").write_text("\n")
    assert run(tmp_path / "empty", "--model", checkpoint) == 2
    assert "has no lines" in capsys.readouterr().err
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    assert run(tmp_path / "latin", "--model", checkpoint) == 2
    assert "not UTF-8" in capsys.readouterr().err
    (tmp_path / "huge").write_text('{"prompt": "x"}\n' * 4000)
    assert run(tmp_path / "huge", "--model", checkpoint, "--window", 2**36, "--slots", 4000) == 2
    assert "caches of 4,000 streams" in capsys.readouterr().err


def batch(file, checkpoint, capsys, *options):
    code = run(file, "--model", checkpoint, "-n", 3, *options)
    return code, capsys.readouterr().err


def test_batch_takes_odd_lines(tmp_path, checkpoint, capsys):
    nested = "[" * 100_000
    file = tmp_path / "lines.jsonl"
    lines = [
        '\ufeff{"prompt": "a"}',
        nested,
        '{"prompt": "a", "id": "\\ud800"}',
        '{"prompt": "a", "stop": 3}',
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert batch(file, checkpoint, capsys)[0] == 1
    results = {
        result["line"]: result
        for result in map(
            json.loads, (tmp_path / "lines.jsonl.results.jsonl").read_text("utf-8").splitlines()
        )
    }
    assert results[1]["finish_reason"] == "length"
    assert "nested too deeply" in results[2]["error"]
    assert results[3]["id"] == "\ud800"
    assert results[3]["text"] == results[1]["text"]
    assert "stop must be a string" in results[4]["error"]


@pytest.mark.parametrize("found", ['{"line": [1], "key": "a"}', '{"line": null, "key": null}', "[" * 100_000])
def test_batch_refuses_a_file_that_has_no_results(tmp_path, checkpoint, capsys, found):
    file, output = tmp_path / "lines.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "a"}\n')
    output.write_text(found + "\n")
    code, error = batch(file, checkpoint, capsys, "-o", str(output))
    assert code == 2
    assert "not a file of results" in error
    assert output.read_text() == found + "\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no locks of this kind")
@pytest.mark.parametrize("left", ["", '{"line": 1, "te'])
def test_two_processes_do_not_write_one_file_of_results(tmp_path, checkpoint, capsys, left):
    file, output = tmp_path / "lines.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "a"}\n')
    output.write_text(left)
    with Results(output, []):
        code, error = batch(file, checkpoint, capsys, "-o", str(output))
        assert code == 2
        assert "another process writes to" in error
    assert batch(file, checkpoint, capsys, "-o", str(output))[0] == 0
    assert len(output.read_text("utf-8").splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_batch_writes_to_a_device_without_reading_it(tmp_path, checkpoint, capsys):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "a"}\n')
    code, error = batch(file, checkpoint, capsys, "-o", "/dev/full")
    assert code == 2
    assert "No space left" in error


def test_ctrl_c_keeps_the_results_and_the_same_command_goes_on(tmp_path, checkpoint):
    file, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(300)))
    command = [
        sys.executable, "-m", "streamllm", "batch", file, "-o", output, "--model", checkpoint, "--slots", "4",
        "--window", "40", "-n", "30", "--dtype", "float64", "--ignore-eos",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (output.exists() and output.read_bytes().count(b"\n") >= 8):
        assert time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "run the same command again" in said
    assert "Traceback" not in said
    before = results(output)
    assert 8 <= len(before) < 300
    assert subprocess.run(command, env=environment, capture_output=True, timeout=200).returncode == 0
    after = results(output)
    assert sorted(after) == list(range(1, 301))
    assert before.items() <= after.items()
