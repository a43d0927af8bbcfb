"""Rows of messages: loss on the assistant's turns only."""

import pytest

from fisherscope.errors import DataError
from fisherscope.instrument.data import prepare_task

CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]


def test_assistant_turns_bear_loss(chatty):
    """Both turns, with what the template puts inside its marker; the rendered chat is the text."""
    (sample,) = prepare_task("t", [{"messages": CONVERSATION}], chatty)
    assert sample.text == "U:hi~A:yes~U:more~A:no~"
    bearing = "".join(chatty.decode([label]) if label != -100 else "." for label in sample.labels)
    assert bearing == ".......yes~.........no~"


def test_truncated_chat(chatty):
    """The mask is made before the cut."""
    (sample,) = prepare_task("t", [{"messages": CONVERSATION}], chatty, max_length=9)
    assert sample.tokens == 2
    assert sample.truncated == 14


def test_tools_reach_the_template(chatty):
    """A row's tools are rendered by a template that knows them."""
    chatty.chat_template = (
        "{{ tools | length }}{% for m in messages %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{"messages": CONVERSATION[:2], "tools": [tool, tool]}]
    assert prepare_task("t", rows, chatty)[0].text == "2hiyes"


def test_no_template(characters):
    """A tokenizer without a template cannot render chats."""
    with pytest.raises(DataError, match="no chat template to render messages with; set tokenizer"):
        prepare_task("t", [{"messages": CONVERSATION}], characters)


def test_a_template_that_marks_nothing(chatty):
    """Loss everywhere, or nowhere, would be a silent mistake: the missing marker is named."""
    chatty.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"does not mark the assistant's turns: put {% generation %}"):
        prepare_task("t", [{"messages": CONVERSATION}], chatty)


def test_a_slow_tokenizer(chatty):
    """Without offsets the assistant's tokens cannot be found."""

    class Slow:
        is_fast = False
        chat_template = chatty.chat_template

    with pytest.raises(DataError, match="only fast tokenizers"):
        prepare_task("t", [{"messages": CONVERSATION}], Slow())


def test_a_template_that_refuses(chatty):
    """What a template raises is passed on with the sample's name."""
    chatty.chat_template = "{% generation %}{% endgeneration %}{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"sample t_0 .*cannot render.*roles must alternate"):
        prepare_task("t", [{"messages": CONVERSATION}], chatty)


def test_several_templates_without_a_default(chatty):
    """A dict of templates needs a default."""
    chatty.chat_template = {"a": "x", "b": "y"}
    with pytest.raises(DataError, match="no chat template could be chosen"):
        prepare_task("t", [{"messages": CONVERSATION}], chatty)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        (["hi"], "message 0 must be an object"),
        ([{"content": "hi"}], "message 0 must be an object"),
        (CONVERSATION[:1], r"no assistant turn.*\['user'\]"),
    ],
)
def test_malformed_messages(chatty, messages, message):
    """Each is refused with the reason."""
    with pytest.raises(DataError, match=message):
        prepare_task("t", [{"messages": messages}], chatty)
