"""The adapter for lm-evaluation-harness: each kind of request compared with one forward, and a small task."""

import json
from types import SimpleNamespace

import pytest
import torch

import streamllm
from streamllm.evaluate.lm_eval import Requests, harness_model

TEXT = "def once(upon, a_time):\n    return [there + was for there, was in enumerate(a_time) if upon]\n"


def request(*args):
    return SimpleNamespace(args=args)


@torch.no_grad()
def expected(model, ids, scored, cache=None):
    logits = model(torch.tensor([ids]), cache)[0, :-1].double().log_softmax(-1)[-scored:]
    targets = torch.tensor(ids[-scored:])
    return float(logits.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", ["dense", "sinks"])
def test_a_continuation_scores_as_in_one_forward(model, tokenizer, mode, batch):
    pairs = [("def once(upon", ", a_time)"), ("for name ", "in names"), ("", "one two three"), (TEXT, " 🙂")]
    requests = Requests(model, tokenizer, mode=mode, sinks=2, window=20, batch=batch, chunk=7)
    for (context, continuation), (nll, greedy) in zip(
        pairs, requests.loglikelihood([request(*pair) for pair in pairs]), strict=True
    ):
        whole = tokenizer.encode(context + continuation)
        scored = len(whole) - len(tokenizer.encode(context.rstrip()))
        cache = streamllm.SinkCache(model, sinks=2, window=20) if mode == "sinks" else None
        value, sure = expected(model, whole, scored, cache)
        assert nll == pytest.approx(value, rel=1e-4)
        assert greedy == sure


def test_what_greedy_decoding_generates_counts_as_greedy(model, tokenizer):
    requests = Requests(model, tokenizer, mode="sinks", sinks=2, window=20)
    ids = tokenizer.encode("for name")
    following = list(
        streamllm.generate(model, ids, streamllm.SinkCache(model, 2, 20), max_new_tokens=3, eos=[])
    )
    ((_, hits),) = requests._score([ids + following])
    assert bool(hits[-3:].all())
    ((_, wrong),) = requests._score([[*ids, *following[:2], (following[2] + 1) % 256]])
    assert wrong[-3:].tolist() == [True, True, False]


def test_a_rolling_text_is_one_stream(model, tokenizer):
    requests = Requests(model, tokenizer, sinks=2, window=20, chunk=16)
    texts = [TEXT * 3, "", "for"]
    values = requests.loglikelihood_rolling([request(text) for text in texts])
    ids = tokenizer.encode(texts[0])
    value, _ = expected(model, ids, len(ids) - 1, streamllm.SinkCache(model, 2, 20))
    assert values[0] == pytest.approx(value, rel=1e-4)
    assert values[1] == 0
    assert values[2] < 0


def test_a_rolling_dense_text_is_cut_as_the_harness_cuts(model, tokenizer):
    requests = Requests(model, tokenizer, mode="dense")
    requests.longest = 4
    assert list(requests._pieces(list(range(11)))) == [
        ([0, 1, 2, 3, 4], 4),
        ([4, 5, 6, 7, 8], 4),
        ([6, 7, 8, 9, 10], 2),
    ]
    assert list(requests._pieces(list(range(5)))) == [([0, 1, 2, 3, 4], 4)]
    assert requests._fit(list(range(9)), 3) == [4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="longer than the 4 tokens"):
        requests._fit(list(range(9)), 5)


@pytest.mark.parametrize("mode", ["dense", "sinks"])
def test_generation_stops_at_the_strings_of_the_task(model, tokenizer, mode):
    requests = Requests(model, tokenizer, mode=mode, sinks=2, window=40)
    (whole,) = requests.generate_until([request("def once", {"until": [], "max_gen_toks": 20})])
    stop = whole[len(whole) // 2 :][:2]
    cut, again = requests.generate_until(
        [
            request("def once", {"until": [stop], "max_gen_toks": 20}),
            request("def once", {"max_gen_toks": 20}),
        ]
    )
    assert cut == whole[: whole.index(stop)]
    assert again == whole


def test_wrong_settings_are_named(model, tokenizer):
    with pytest.raises(ValueError, match="mode"):
        Requests(model, tokenizer, mode="recompute")
    with pytest.raises(ValueError, match="batch"):
        Requests(model, tokenizer, batch=0)


def test_a_task_runs(model, tokenizer, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("lm_eval.evaluator")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    docs = [{"text": "def once(", "choices": ["upon", "🙂"], "answer": n % 2} for n in range(4)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    lm = harness_model(model, tokenizer, sinks=2, window=20)
    results = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0)
    assert results["results"]["tiny"]["acc,none"] == 0.5


def chatting(tokenizer, template):
    """The tokenizer with a chat template."""
    import copy

    with_template = copy.copy(tokenizer)
    with_template.chat_template = template
    return with_template


def test_chat_templates_of_the_harness(model, tokenizer):
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt }}"
    )
    messages = [{"role": "user", "content": "hi"}]
    requests = Requests(model, chatting(tokenizer, template))
    assert requests.apply_chat_template(messages) == "[user] hi [end][assistant]"
    messages = [*messages, {"role": "assistant", "content": "Sure"}]
    continued = requests.apply_chat_template(messages, add_generation_prompt=False)
    assert continued == "[user] hi [end][assistant] Sure"
    assert (requests.chat_template(False), requests.chat_template(True)) == ("", template)
    requests = Requests(model, chatting(tokenizer, {"default": "D", "rag": "R"}))
    assert requests.chat_template("rag") == requests.apply_chat_template(messages) == "R"
    assert requests.chat_template(True) == "D"
    with pytest.raises(ValueError, match="no chat template 'x'; the tokenizer has default, rag"):
        requests.chat_template("x")
    assert Requests(model, chatting(tokenizer, None)).chat_template(True) == ""


def test_a_context_that_begins_with_bos_gets_no_second_one(model, tokenizer):
    requests = Requests(model, tokenizer)
    bos = tokenizer.bos_token
    if bos is not None and tokenizer.adds_bos:
        assert requests._encode(bos + "one", alone=True) == requests._encode("one", alone=True)
    assert requests._encode("one", alone=True) == tokenizer.encode("one")
