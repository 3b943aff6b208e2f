"""Conversations: each turn is fed once, and what continues after load, fork, undo and drop equals a plain reference."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library

import streamllm
from streamllm import Stream
from streamllm.chat import ChatTemplateError
from streamllm.session import SessionError, window
from tests.unit.chat.samples import STYLES
from tests.unit.conftest import write_llama, write_tokenizer
from tests.unit.test_signals import EVERY_LINE, Strike

SAMPLED = {"temperature": 1.0, "seed": 5}
# Answers as these models give them: behind a template that opens an answer without a space, they begin with one.
SPACED = ("falcon", "llama_2", "mistral", "vicuna")
REWRITING = {("everything", None), ("everything", "Be brief."), ("mistral", "Be brief.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a ChatML template."""
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(folder, bos=True)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(STYLES["chatml"])
    return write_llama(folder, library.get_vocab_size())


@pytest.fixture
def pair(folder: Path):
    return streamllm.load(folder, device="cpu")


def answer(stream: Stream, text: str, ends: bool) -> None:
    """Make the model answer with a text."""
    ids = stream.tokenizer.encode_piece(text, continuation=True)
    for token in ids + [stream.tokenizer.eos_token_id] * ends:
        stream._loop.push_drawn()
        stream._loop._drawn = stream._loop.end, token
        stream._decode(token)
        piece, held = stream._view.held.release(())
        stream._view = stream._record(piece, replace(stream._view, held=held, unsaid=0))


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ends", [True, False])
def test_turn_by_turn_equals_the_template_of_the_whole(
    pair, style: str, system: str | None, ends: bool
) -> None:
    model, tokenizer = pair
    tokenizer.chat_template = STYLES[style]
    stream = Stream(model, tokenizer, window=250 - 4)
    messages: list[dict[str, str]] = []

    def talk() -> None:
        for number, user in enumerate(["Hello there", "and more?", "third one"]):
            new = [{"role": "user", "content": user}]
            if system and not number:
                new.insert(0, {"role": "system", "content": system})
            list(stream.chat(new, max_new_tokens=0))
            text = " " * (style in SPACED) + f"answer {number}"
            answer(stream, text, ends)
            messages.extend([*new, {"role": "assistant", "content": text.strip()}])
        list(stream.chat("last", max_new_tokens=0))
        messages.append({"role": "user", "content": "last"})

    if (style, system) in REWRITING:
        with pytest.raises(ChatTemplateError, match="rewrites earlier turns"):
            talk()
        return
    talk()
    whole = tokenizer.render_chat_template(messages, add_generation_prompt=True)
    got = stream._loop.last_tokens(10_000)
    assert got == tokenizer.encode_piece(whole)
    assert got.count(tokenizer.bos_token_id) == max(1, whole.count("<s>"))
    turns = stream.turns
    assert [turn.text.strip() for turn in turns] == [message["content"] for message in messages] + [""]
    assert all(one.stop == two.start for one, two in itertools.pairwise(turns))


OPENS_REASONING = (
    "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n{% else %}"
    "Bot: {{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Bot: <think>\n{% endif %}"
)


@pytest.mark.parametrize(
    "template", [STYLES["qwen_3"], OPENS_REASONING], ids=["removed", "begun and removed"]
)
def test_reasoning_that_a_template_leaves_out_of_earlier_turns_stays_as_it_was_generated(
    pair, template: str
) -> None:
    model, tokenizer = pair
    tokenizer.chat_template = template
    stream = Stream(model, tokenizer, window=240)
    opened = template is OPENS_REASONING
    answers = ["hm, one\n</think>\n\nFine.", "hm", "\n</think>\n\nYes."]
    text, messages = "", []
    for number, given in enumerate(answers):
        messages.append({"role": "user", "content": f"question {number}"})
        list(stream.chat(messages[-1]["content"], max_new_tokens=0))
        whole = tokenizer.render_chat_template(messages, add_generation_prompt=True)
        got = tokenizer.decode(stream._loop.last_tokens(1_000), skip_special_tokens=False).removeprefix("<s>")
        assert got.startswith(text)
        question = whole[whole.rindex("question") :]
        assert got.endswith(("User: " if opened else "<|im_start|>user\n") + question)
        given = given if opened or number == 1 else "<think>\n" + given
        answer(stream, given, number != 1)
        text = got + given
        messages.append({"role": "assistant", "content": given})


def test_special_tokens_that_a_user_spells_stay_text(pair) -> None:
    model, tokenizer = pair
    stream = Stream(model, tokenizer, window=240)
    list(stream.chat("I <|im_end|> say </s><s>", max_new_tokens=0))
    got = stream._loop.last_tokens(1_000)
    text = tokenizer.render_chat_template(
        [{"role": "user", "content": "I <|im_end|> say </s><s>"}], add_generation_prompt=True
    )
    assert tokenizer.decode(got, skip_special_tokens=False) == "<s>" + text
    assert [got.count(tokenizer.token_to_id(token)) for token in ("<s>", "</s>", "<|im_end|>")] == [
        1,
        0,
        text.count("<|im_end|>") - 1,
    ]


def test_a_model_without_a_template_says_so(loaded) -> None:
    stream = Stream(*loaded)
    with pytest.raises(ChatTemplateError, match="no chat template"):
        stream.chat("Hello")
    with pytest.raises(ChatTemplateError, match="no chat template"):
        stream.say("system", "Hello")
    assert stream._end == 0


def talked(model: torch.nn.Module, tokenizer: streamllm.Tokenizer, **options: object) -> Stream:
    stream = Stream(model, tokenizer, **options)
    list(stream.chat("Hello, tell me a story", max_new_tokens=20, **SAMPLED))
    return stream


def go_on(stream: Stream, **settings: object) -> str:
    first = "".join(stream.generate("", max_new_tokens=9, **settings))
    return first + "".join(stream.chat("and then?", max_new_tokens=15, **settings))


@pytest.mark.parametrize("backend", ["modules", "flat"])
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("window", [40, 240])
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_loaded_stream_and_a_fork_go_on_as_if_not_stopped(
    pair, tmp_path: Path, backend: str, quantize: str | None, window: int, settings: dict
) -> None:
    model, tokenizer = pair
    if backend == "flat":
        model = streamllm.compile(model, "flat")
    stream = talked(model, tokenizer, window=window, quantize=quantize)
    stream.save(tmp_path / "session")
    loaded = Stream.load(tmp_path / "session", model, tokenizer)
    fork = loaded.fork()
    wanted = go_on(stream, **settings)
    for other in (loaded, fork):
        assert go_on(other, **settings) == wanted
        assert (other.turns, other.visible(), other.said) == (stream.turns, stream.visible(), stream.said)
    assert list(tmp_path.iterdir()) == [tmp_path / "session"]


def test_a_session_is_loaded_into_another_type(pair, tmp_path: Path) -> None:
    model, tokenizer = pair
    stream = talked(model, tokenizer)
    stream.save(tmp_path / "session")
    wide = Stream.load(tmp_path / "session", model.double(), tokenizer)
    assert wide.cache.dtype == torch.float64
    assert len(go_on(wide)) > 0


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_session_goes_on_with_the_same_weights_rounded_otherwise(quantize, tmp_path: Path) -> None:
    """The embedded checkpoint's, so that int4 weights are in groups."""
    path = tmp_path / "session"
    model, tokenizer = streamllm.load(quantize=quantize, device="cpu")
    stream = Stream(model, tokenizer, window=30)
    stream.feed("def one(self):")
    stream.save(path)
    for other in (None, "int8", "int4"):
        for dtype in ("bfloat16", "float32") if other else ("bfloat16",):
            rounded = streamllm.load_model(quantize=other, dtype=dtype, device="cpu")
            assert Stream.load(path, rounded, tokenizer).cache.dtype == getattr(torch, dtype)
    wrong = streamllm.load_model(quantize="int4", device="cpu")
    weight = wrong.layers[2].mlp.up.weight
    weight.data = weight.data.flip(0)
    with pytest.raises(SessionError, match=r"those of layers\.2\.mlp\.up\.weight differ"):
        Stream.load(path, wrong, tokenizer)


def test_wrong_models_and_damaged_files_are_refused(pair, loaded, tmp_path: Path) -> None:
    model, tokenizer = pair
    path = tmp_path / "session"
    talked(model, tokenizer).save(path)
    with pytest.raises(SessionError, match="vocab_size is 323, here 320"):
        Stream.load(path, *loaded)
    with torch.no_grad():
        model.layers[1].input_norm.weight.mul_(-1) if hasattr(
            model.layers[1], "input_norm"
        ) else model.norm.weight.mul_(-1)
    with pytest.raises(SessionError, match="other weights"):
        Stream.load(path, model, tokenizer)
    whole = path.read_bytes()
    for place in (5, 100, len(whole) // 2, len(whole) - 3):
        altered = bytearray(whole)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises(SessionError):
            Stream.load(path, model, tokenizer)
    for length in (0, 7, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SessionError):
            Stream.load(path, model, tokenizer)


def test_an_error_of_writing_keeps_the_old_file(pair, tmp_path: Path, monkeypatch) -> None:
    stream = talked(*pair)
    path = tmp_path / "session"
    stream.save(path)
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        stream.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


SAVES = """
import os, resource, signal, sys, tempfile, streamllm
model, tokenizer = streamllm.load(sys.argv[1], device="cpu")
stream = streamllm.Stream.load(sys.argv[2], model, tokenizer)
list(stream.generate("", max_new_tokens=3))
with tempfile.TemporaryDirectory() as elsewhere:  # imports all that saving imports: the environment
    stream.save(os.path.join(elsewhere, "session"))  # may be closed to the user below
if sys.argv[3] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # as a disk with so much room
elif not os.geteuid():
    os.setuid(65534)  # root may write to a folder that is read-only
try:
    stream.save(sys.argv[2])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits and users of POSIX")
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_full_disk_and_a_read_only_folder_keep_the_old_file(folder: Path, pair, kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # its parents are open to all users
        path = Path(name) / "session"
        talked(*pair).save(path)
        before = path.read_bytes()
        os.chmod(name, 0o555)
        told = subprocess.run(
            [sys.executable, "-c", SAVES, str(folder), str(path), kind], capture_output=True, text=True
        )
        os.chmod(name, 0o755)
        assert "the session was not saved" in told.stdout, told.stderr
        assert "the file stays as it was" in told.stdout
        assert str(path) in told.stdout
        assert path.read_bytes() == before
        assert list(Path(name).iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_after_an_hour(pair, tmp_path: Path) -> None:
    path = tmp_path / "talk [1].session"
    parts = [tmp_path / f".{path.name}.{name}.partial" for name in ("old", "new")]
    others = [tmp_path / ".other.old.partial", tmp_path / f"{path.name}.partial"]
    for part in (*parts, *others):
        part.write_bytes(b"")
        os.utime(part, (0, 0))
    os.utime(parts[1])
    stream = Stream(*pair)
    stream.autosave(path)
    assert set(tmp_path.iterdir()) == {parts[1], *others}
    stream.autosave(tmp_path / "missing" / "file")  # the error comes when it is saved
    stream.autosave(None)


@pytest.mark.parametrize("window", [40, 240])
def test_undo_is_exact(pair, window: int) -> None:
    stream = talked(*pair, window=window)
    plain = talked(*pair, window=window)
    list(stream.chat("something else", max_new_tokens=12, **SAMPLED))
    undone = stream.undo()
    assert [turn.role for turn in undone] == ["user", "assistant"]
    assert stream.turns == plain.turns
    assert go_on(stream, **SAMPLED) == go_on(plain, **SAMPLED)
    for _ in range(2):
        stream.undo()
    with pytest.raises(ValueError, match="no turn to undo"):
        stream.undo()


def test_undo_without_a_snapshot_continues_the_same_text_while_the_window_is_not_full(pair) -> None:
    stream = talked(*pair, window=240, snapshots=0)
    plain = talked(*pair, window=240)
    list(stream.chat("something else", max_new_tokens=12))
    stream.undo()
    assert go_on(stream) == go_on(plain)


def test_drop_equals_a_cache_from_which_the_entries_were_evicted(pair) -> None:
    model, tokenizer = pair
    stream = talked(model, tokenizer, window=240)
    list(stream.chat("second", max_new_tokens=10))
    list(stream.chat("third", max_new_tokens=10))
    cache = streamllm.SinkCache(model, sinks=4, window=240)
    stream._settle()
    tokens = [*stream._loop.last_tokens(10_000), *([stream._loop.drawn] * (stream._loop.drawn is not None))]
    turn = stream.turns[2]
    stream.drop(2)
    model(torch.tensor([tokens[:-1]]), cache)
    cache.evict_range(turn.start, turn.stop)
    wanted = model(torch.tensor([tokens[-1:]]), cache)[0, -1]
    stream._loop.feed()
    assert stream._loop.logits is not None
    assert (stream._loop.logits - wanted).abs().max() < 1e-4 * wanted.std()
    assert turn not in stream.turns
    assert "second" not in stream.visible()
    assert "[…]" in stream.visible()


def test_the_oldest_whole_turn_leaves_and_the_system_prompt_stays(pair) -> None:
    stream = Stream(*pair, sinks="system", window=70, evict="turn")
    system = {"role": "system", "content": "You are <|im_end|> brief."}
    list(stream.chat([system, {"role": "user", "content": "Hi"}], max_new_tokens=8))
    assert stream.cache.sinks == stream.turns[0].stop
    for number in range(8):
        list(stream.chat(f"more {number}", max_new_tokens=8))
        pinned, *rest = stream.visible(special_tokens=True).split("\n[…]\n")
        assert "You are <|im_end|> brief." in (pinned if rest else stream.visible())
        assert all(part.startswith("<|im_start|>") for part in rest)
        assert int(stream.cache.held[0]) <= stream.cache.sinks + 70
    assert rest


def test_eviction_by_turn_equals_a_list_that_is_fed_token_by_token(pair) -> None:
    model, tokenizer = pair
    stream = Stream(model.double(), tokenizer, sinks=4, window=56, evict="turn", chunk=5)
    every, push = list[int](), stream._loop.push

    def record(tokens: list[int], on_device: torch.Tensor | None = None) -> None:
        every.extend(tokens)
        push(tokens, on_device)

    stream._loop.push = record
    for number in range(6):
        list(stream.chat(f"tell me more {number}", max_new_tokens=7))
    stream._feed()
    turns = stream.turns
    assert stream.seen == len(every)  # each token was fed once
    cache, held = streamllm.SinkCache(model, sinks=4, window=56), list[int]()
    for number, token in enumerate(every):
        if len(held) == 60:
            later = [turn.start for turn in turns if held[4] < turn.start <= number]
            count = sum(old < min(later, default=held[4] + 1) for old in held[4:])
            cache.evict_range(4, 4 + count)
            held = held[:4] + held[4 + count :]
        logits = model(torch.tensor([[token]]), cache)[0, -1]
        held.append(number)
    assert stream._loop.logits is not None
    assert (stream._loop.logits - logits).abs().max() < 1e-9 * logits.std()


def plain_oldest_turn(stream: Stream) -> tuple[int, int] | None:
    """By the numbers of all entries."""
    sinks = stream.cache.sinks
    recent = window.numbers(stream)[sinks:]
    later = [turn.start for turn in stream.turns if recent and turn.start > recent[0]]
    count = sum(number < min(later, default=0) for number in recent)
    return (sinks, sinks + count) if 0 < count < len(recent) else None


@pytest.mark.parametrize("evict", ["turn", "token"])
def test_the_oldest_turn_is_found_without_a_list_of_the_entries(pair, evict: str) -> None:
    draw = random.Random(3)
    found = 0
    for size in (40, 90, 200):
        stream = Stream(*pair, window=size, evict=evict)
        for number in range(12):
            list(stream.chat(f"tell me more {number}", max_new_tokens=draw.choice([0, 3, 30]), seed=number))
            if draw.random() < 0.6:
                stream.drop(draw.randrange(len(stream.turns)))
            if draw.random() < 0.2:
                stream.undo()
            stream._feed()
            recent = window.numbers(stream)[stream.cache.sinks :]
            assert not recent or window._oldest_number(stream, len(recent)) == recent[0]
            assert window.oldest_turn(stream) == plain_oldest_turn(stream)
            found += window.oldest_turn(stream) is not None
    assert found > 10


def test_a_stream_keeps_the_snapshots_that_it_was_asked_for(pair) -> None:
    for asked in (0, 1, 3):
        stream = Stream(*pair, window=40, snapshots=asked)
        states = []
        for number in range(6):
            list(stream.chat(f"turn {number}", max_new_tokens=4))
            states += [weakref.ref(call.snapshot) for call in stream._dialogue.calls[-1:] if call.snapshot]
        gc.collect()
        assert sum(state() is not None for state in states) == asked
        assert sum(call.snapshot is not None for call in stream._dialogue.calls) == asked


def test_undo_is_exact_as_often_as_there_are_snapshots(pair) -> None:
    stream, plain = Stream(*pair, window=40, snapshots=2), Stream(*pair, window=40)
    for each in (stream, plain):
        list(each.chat("one", max_new_tokens=20))
    for number in range(2):
        list(stream.chat(f"more {number}", max_new_tokens=30))
    for _ in range(2):
        stream.undo()
    assert go_on(stream, **SAMPLED) == go_on(plain, **SAMPLED)
    assert stream.turns == plain.turns


def test_a_new_conversation_pins_its_own_system_prompt(pair, tmp_path: Path) -> None:
    stream = Stream(*pair, sinks="system", window=60)
    stream.say("system", "Be very brief, please.")
    long = stream.cache.sinks
    stream.save(tmp_path / "session")
    for other in (stream, stream.fork(), Stream.load(tmp_path / "session", *pair)):
        assert other.cache.sinks == long > 10
        other.reset()
        assert other.cache.sinks == 4
        other.say("system", "Hi")
        assert other.cache.sinks == other.turns[0].stop < long


def test_a_system_prompt_that_waits_is_there_after_undo(pair) -> None:
    model, tokenizer = pair
    tokenizer.chat_template = STYLES["llama_2"]
    for snapshots in (0, 1):
        stream = Stream(model, tokenizer, sinks="system", window=100, snapshots=snapshots)
        stream.say("system", "Be brief.")
        assert not stream.seen  # it is fed with the first message of the user
        for _ in range(2):
            list(stream.chat("Hello", max_new_tokens=3))
            assert "Be brief." in stream.visible()
            stream.undo()


def test_a_pinned_text_becomes_the_sinks(pair) -> None:
    model, tokenizer = pair
    stream = Stream(model, tokenizer, pin="def once(upon):", window=30)
    assert stream.cache.sinks == len(tokenizer.encode("def once(upon):"))
    list(stream.generate("", max_new_tokens=60))
    assert stream.visible().startswith("def once(upon):\n[…]\n")


def test_an_interrupted_answer_stays_in_the_conversation(pair) -> None:
    stream, plain = Stream(*pair, window=240), Stream(*pair, window=240)
    wanted = list(plain.chat("Hello", max_new_tokens=10))
    pieces = stream.chat("Hello", max_new_tokens=10)
    shown = [next(pieces) for _ in range(3)]
    pieces.close()
    assert stream.turns[-1].text == "".join(shown)
    shown += stream.generate("", max_new_tokens=7)
    assert shown == wanted
    assert stream.turns == plain.turns


CHILD = """
import sys, torch, streamllm
torch.set_num_threads(1)
model, tokenizer = streamllm.load(sys.argv[1], device="cpu")
stream = streamllm.Stream(model, tokenizer, window=40)
stream.autosave(sys.argv[2], every=2)
print("ready", flush=True)
number = 0
while True:
    for piece in stream.chat(f"turn {number}", max_new_tokens=10):
        print(stream._end, flush=True)
    number += 1
"""


def test_killed_while_autosaving_leaves_a_session_that_loads(folder: Path, pair, tmp_path: Path) -> None:
    path = tmp_path / "session"
    for moment in (0.05, 0.2, 0.37):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(12)]
        time.sleep(moment)
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split("\n")[:-1]
        child.wait()
        told = int(([*lines, *rest])[-1])
        stream = Stream.load(path, *pair)
        assert stream._end >= told - 2 - 1
        assert len("".join(stream.chat("go on", max_new_tokens=5))) > 0


def test_the_code_of_the_readme_runs(pair, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Chat\n")[2].partition("\n## ")[0]
    blocks = [block.partition("```")[0] for block in section.split("```python\n")[1:]]
    assert blocks
    for block in blocks:
        exec(block, {"streamllm": streamllm, "model": pair[0], "tokenizer": pair[1]})
    assert (tmp_path / "talk.session").exists()


def test_ctrl_c_at_any_line_of_a_chat_leaves_a_conversation_that_goes_on(pair) -> None:
    def begun() -> Stream:
        stream = Stream(*pair, window=100)
        list(stream.chat("one", max_new_tokens=5))
        return stream

    plain = begun()
    list(plain.chat("second", max_new_tokens=6))
    wanted = "".join(plain.chat("third", max_new_tokens=6))
    texts = [turn.text for turn in plain.turns]
    for at in range(1, 13_000, 1_031):
        stream = begun()
        with Strike(at), contextlib.suppress(KeyboardInterrupt):
            list(stream.chat("second", max_new_tokens=6))
        if len(stream.turns) == 2:  # it fell before the message was pushed
            list(stream.chat("second", max_new_tokens=6))
        else:
            list(stream.generate("", max_new_tokens=11 - stream.said + stream._view.unsaid))
        assert "".join(stream.chat("third", max_new_tokens=6)) == wanted, f"at line event {at}"
        assert [turn.text for turn in stream.turns] == texts, f"at line event {at}"


@pytest.mark.parametrize("change", ["drop", "drop the answer", "undo", "undo without a snapshot"])
def test_ctrl_c_at_any_line_of_drop_and_undo_does_all_of_it_or_nothing(pair, change: str) -> None:
    def begun() -> Stream:
        stream = Stream(*pair, window=100, snapshots=0 if "without" in change else 1)
        for text in ("one", "second", "third"):
            list(stream.chat(text, max_new_tokens=7))
        return stream

    def do(stream: Stream) -> None:
        if "undo" in change:
            stream.undo()
        else:
            stream.drop(-1 if "answer" in change else 2)

    def goes_on(stream: Stream) -> tuple[object, ...]:
        stream._feed()
        assert stream._loop.logits is not None
        logits = stream._loop.logits.clone()
        return logits, "".join(stream.chat("and then?", max_new_tokens=5)), stream.turns, stream.visible()

    plain = begun()
    untouched = plain.turns
    do(plain)
    changed = plain.turns
    wanted = goes_on(plain)
    base = begun()
    at, done, moments = 1, False, 0
    while not done:
        stream = base.fork()
        with Strike(at), contextlib.suppress(KeyboardInterrupt):
            do(stream)
            done = True
        if stream.turns == untouched:
            do(stream)
        assert stream.turns == changed, f"at line event {at}"
        got = goes_on(stream)
        assert got[1:] == wanted[1:], f"at line event {at}"
        assert (got[0] - wanted[0]).abs().max() < 1e-5 * wanted[0].std(), f"at line event {at}"
        at, moments = at + (1 if EVERY_LINE else 37), moments + 1
    assert moments > 8
