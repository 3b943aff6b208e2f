"""Rendering: the results of transformers, where templates are found, and the arguments of users."""

import json
import os

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from streamllm.chat import ChatTemplateError, render
from streamllm.tokenizer import TOKENIZER_FILES, TokenizerError, load_tokenizer_files
from tests.unit.chat.samples import CHATS, OPTIONS, SPECIAL, STYLES, WEATHER


@pytest.fixture(scope="module")
def library():
    """A byte-level tokenizer that knows the markers of the templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    tokenizer.add_tokens(["[INST]", "[/INST]"])
    return tokenizer


@pytest.mark.parametrize("style", STYLES)
def test_prompt_equals_that_of_transformers(style, library, tmp_path):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=STYLES[style], **SPECIAL)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**SPECIAL, "chat_template": STYLES[style]}))
    ours = load_tokenizer_files(tmp_path)
    rendered = refused = 0
    for chat in CHATS.values():
        for options in OPTIONS:
            try:
                expected = theirs.apply_chat_template(chat, tokenize=False, **options)
            except Exception:
                refused += 1
                with pytest.raises(ChatTemplateError):
                    ours.render_chat_template(chat, **options)
                continue
            rendered += 1
            assert ours.render_chat_template(chat, **options) == expected
            ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
            assert ours.apply_chat_template(chat, **options) == ids
    assert rendered >= 15
    assert refused >= (5 if "raise_exception" in STYLES[style] else 0)


def test_templates_write_bos_themselves(library, tmp_path):
    library = Tokenizer.from_str(library.to_str())
    bos = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    (tmp_path / "chat_template.jinja").write_text(STYLES["llama_2"])
    tokenizer = load_tokenizer_files(tmp_path)
    assert tokenizer.encode("x")[0] == bos
    assert tokenizer.apply_chat_template(CHATS["one"]).count(bos) == 1


# Where templates are found.


def test_template_is_chosen_by_name():
    named = {"default": "plain", "tool_use": "with {{ tools | length }}", "rag": "no"}
    assert render(named, CHATS["one"]) == "plain"
    assert render(named, CHATS["one"], tools=[WEATHER]) == "with 1"
    assert render(named, CHATS["one"], tools=[]) == "with 0"
    assert render({"default": "plain"}, CHATS["one"], tools=[WEATHER]) == "plain"
    with pytest.raises(ChatTemplateError, match="rag, tool_use is called default"):
        render({"tool_use": "", "rag": ""}, CHATS["one"])
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        render(None, CHATS["one"])


def test_template_files_win_over_the_configuration(library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer_files(tmp_path).chat_template is None
    config = tmp_path / "tokenizer_config.json"
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config.write_text(json.dumps({"chat_template": templates}))
    tokenizer = load_tokenizer_files(tmp_path)
    assert tokenizer.chat_template == {"default": "a", "tool_use": "b"}
    assert tokenizer.render_chat_template(CHATS["one"], tools=[]) == "b"
    assert tokenizer.render_chat_template(CHATS["one"], chat_template="mine") == "mine"
    (tmp_path / "chat_template.jinja").write_text("file\n")
    tokenizer = load_tokenizer_files(tmp_path)
    assert tokenizer.chat_template == "file\n"
    assert tokenizer.render_chat_template(CHATS["one"]) == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert load_tokenizer_files(tmp_path).chat_template == {"default": "file\n", "tool_use": "more"}
    assert set(TOKENIZER_FILES) >= {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}


@pytest.mark.parametrize("value", [3, True, [], {}, ["a"], [{"name": "default"}], {"default": None}])
def test_template_of_a_wrong_type(value, library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template"):
        load_tokenizer_files(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/other.jinja"])
def test_template_file_that_is_not_text(name, library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=rf"{name} cannot be read as text"):
        load_tokenizer_files(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(TokenizerError, match=rf"{name} cannot be read: it is a pipe"):
        load_tokenizer_files(tmp_path)


# Arguments of users


@pytest.mark.parametrize(
    "messages", [[], {}, "Hello", None, ["Hello"], [{"content": object()}], [{"a": b"x"}]]
)
def test_invalid_messages(messages):
    with pytest.raises(ChatTemplateError, match="message"):
        render("{{ messages }}", messages)


def test_objects_do_not_reach_the_template():
    class Text(str):
        def shout(self):
            return "ran"

    assert render("{{ messages[0].content }}", [{"content": Text("quiet")}]) == "quiet"
    assert render("{{ messages[0].content.shout is defined }}", [{"content": Text("quiet")}]) == "False"
    with pytest.raises(ChatTemplateError, match="a template variable holds a function"):
        render("{{ f() }}", CHATS["one"], f=lambda: 1)
    with pytest.raises(ChatTemplateError, match="tools holds a function"):
        render("{{ tools }}", CHATS["one"], tools=[lambda: 1])
    nested = []
    nested.append(nested)
    with pytest.raises(ChatTemplateError, match="nested too deeply"):
        render("{{ messages }}", [{"content": nested}])


def test_messages_are_not_changed():
    message = {"role": "user", "content": "x", "name": None, "thinking": "y"}
    render("{{ messages }}", [message])
    assert message == {"role": "user", "content": "x", "name": None, "thinking": "y"}


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% if %}", r"does not work \(line 1\)"),
        ("\n{{ 'open }}", r"\(line 2\)"),
        ("{% for x in messages %}", "endfor"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% include 'x' %}", "does not work"),
        ("{% import '/etc/passwd' as x %}", "does not work"),
        ("{% extends 'x' %}", "does not work"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'x' | tojson(indent=none) * none }}", "does not work"),
        ("{{ raise_exception('the reason') }}", "refuses these messages: the reason"),
        ("{{ {} + 1 }}", "does not work"),
        ("{{ missing | tojson }}", "does not work"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "nested too deeply|does not work"),
        ("{{ " + "-" * 5000 + "1 }}", "nested too deeply|does not work"),
        ("{{ 1" + "+1" * 5000 + " }}", "nested too deeply|does not work"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deeply|does not work"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("x" * 100_001, "has 100,001 characters; at most 100,000"),
    ],
)
def test_broken_templates(source, match):
    with pytest.raises(ChatTemplateError, match=match) as caught:
        render(source, CHATS["one"])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("style", STYLES)
def test_the_last_message_is_continued_as_in_transformers(style, library):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=STYLES[style], **SPECIAL)
    texts = ["Sure, the", "Sure, the ", "  Sure", "Sure.\n"]
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}] for text in texts]
    for chat in [*chats, *CHATS.values()]:
        try:
            expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        except Exception:
            with pytest.raises(ChatTemplateError):
                render(STYLES[style], chat, special_tokens=SPECIAL, continue_final_message=True)
            continue
        assert render(STYLES[style], chat, special_tokens=SPECIAL, continue_final_message=True) == expected


def test_blocks_and_reasoning_can_be_continued():
    template = "{% for m in messages %}[{{ m.role }}]{% for b in m.content %}{{ b.text }}{% endfor %}[end]{% endfor %}"
    message = {
        "role": "assistant",
        "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b "}],
    }
    assert render(template, [message], continue_final_message=True) == "[assistant]a b "
    assert message["content"][1]["text"] == "b "
    template = "{% for m in messages %}<think>{{ m.reasoning_content }}</think>{{ m.content }}{% endfor %}"
    message = {"role": "assistant", "reasoning": "hm", "content": "x"}
    assert render(template, [message], continue_final_message="reasoning") == "<think>hm"


def test_a_last_message_that_cannot_be_continued():
    with pytest.raises(ChatTemplateError, match="no text under 'content'"):
        render("{{ messages }}", [{"role": "assistant"}], continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="leaves out or changes the last message"):
        render("x", [{"role": "assistant", "content": "y"}], continue_final_message=True)
    with pytest.raises(ValueError, match="not both"):
        render("x", CHATS["one"], continue_final_message=True, add_generation_prompt=True)
