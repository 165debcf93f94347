"""Rendering: the tokens of a conversation and which of them are trained, compared with the chat templates of
transformers and with the original text."""

from __future__ import annotations

import copy
from datetime import datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtrain.data import rendering
from vlmtrain.data.records import BadSample, Conversation, Turn
from vlmtrain.data.rendered import IGNORE, Rendered
from vlmtrain.data.rendering import Renderer
from vlmtrain.data.templates import CHATML, VICUNA_V1
from vlmtrain.visual import NO_MEDIA

from ...media import slots
from . import chat_formats
from .chat_formats import CHATS, TOKENIZERS, renderer, tokenizers

PICTURE_TOKENS = 5


class StubImage:
    def load(self) -> Image.Image:
        raise AssertionError("rendering needs no pixels")


def talk(*texts: str, system: str | None = None, id: str = "sample-7") -> Conversation:
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    turns = ([] if system is None else [Turn("system", system)]) + turns
    marks = sum(turn.text.count("<image>") for turn in turns if turn.role == "user")
    return Conversation(id, tuple(turns), tuple(StubImage() for _ in range(marks)))


def render(subject: Renderer, conversation: Conversation) -> Rendered:
    return subject.render(conversation, slots(*[PICTURE_TOKENS] * len(conversation.images)))


def end_of_turn(subject: Renderer, template: str) -> int:
    token = chat_formats.END_OF_TURN[template]
    tokenizer = subject.tokenizer
    return tokenizer.eos_token_id if token == "eos" else tokenizer.convert_tokens_to_ids(token)


def words(subject: Renderer, kind: str, ids) -> str:
    """Decoded text; without white space for a tokenizer that does not preserve it."""
    text = subject.tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    return "".join(text.split()) if kind == "wordpiece" else text


def kept(kind: str, text: str) -> str:
    return "".join(text.split()) if kind == "wordpiece" else text.strip()


def messages(conversation: Conversation) -> list[dict]:
    return [{"role": turn.role, "content": turn.text.strip()} for turn in conversation.turns]


def as_transformers_has_it(subject: Renderer, template: str, conversation: Conversation, **options):
    own = chat_formats.OWN_TEMPLATES.get(template, VICUNA_V1)
    chosen = {"chat_template": chat_formats.ALIKE.get(template, own), "return_dict": False, **options}
    return subject.tokenizer.apply_chat_template(messages(conversation), **chosen)


def system_turns(template: str) -> tuple[str | None, ...]:
    return (None,) if template in chat_formats.NO_SYSTEM else (None, "", " You see a picture. ")


def assert_shifted(tokens: Rendered) -> None:
    """Targets are the next tokens, only within answers, and never at or for an image position."""
    trained = tokens.weights > 0
    expected = torch.zeros(len(tokens), dtype=torch.bool)
    for start, end in tokens.answers:
        expected[start - 1 : end - 1] = True
    assert trained.equal(expected)
    assert (tokens.targets[~trained] == IGNORE).all()
    assert tokens.targets[:-1][trained[:-1]].equal(tokens.input_ids[1:][trained[:-1]])
    assert not trained[-1]
    assert (tokens.index[1:][trained[:-1]] == -1).all()


LONG = ("What color is the circle?", "red", "How many circles\nare there", "5", "and this?", "a blue square (é).")
LATE_PICTURES = ("Hello.", "Hi.", "What is <image> this", "red", "<image>\n<image>", "blue", "How many", "5")
every_chat = pytest.mark.parametrize("template", CHATS)
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


@every_chat
@every_tokenizer
@pytest.mark.parametrize("texts", [LONG, LATE_PICTURES])
def test_targets_are_the_answers_and_their_ends(kind, template, texts):
    subject = renderer(kind, template)
    for system in system_turns(template):
        tokens = render(subject, talk(*texts, system=system))
        assert_shifted(tokens)
        assert len(tokens.answers) == len(texts) // 2
        for (start, end), answer in zip(tokens.answers, texts[1::2]):
            assert int(tokens.input_ids[end - 1]) == end_of_turn(subject, template)
            assert words(subject, kind, tokens.input_ids[start : end - 1]) == kept(kind, answer)
    assert int(end_of_turn(subject, template)) in subject.stop_ids


@every_chat
@every_tokenizer
def test_lengths_equal_those_of_rendered_conversations(kind, template):
    """Where a length is known in advance, it is that of the rendered conversation; of usual ones it is known."""
    subject = renderer(kind, template)
    usual = [talk(*texts, system=system) for texts in (LONG, LATE_PICTURES) for system in system_turns(template)]
    silent = Conversation("silent", (Turn("user", "What"), Turn("assistant", "red", weight=0.0)))
    others = [talk(*LONG, "", ""), talk("What <|im_end|> </s> is", "a <|end|>"), silent]
    found = subject.lengths(usual + others, [slots(*[PICTURE_TOKENS] * len(c.images)) for c in usual + others])
    assert found[: len(usual)] == [len(render(subject, each)) for each in usual]
    for each, length in zip(others, found[len(usual) :]):
        assert length is None or length == len(render(subject, each))
    assert found[-3] is found[-1] is None


@every_tokenizer
def test_lengths_of_captions_count_the_question_towards_the_limit(kind):
    subject = Renderer(tokenizers()[kind], "plain", 40)
    talks = [talk("<image>\nWhat", "a red circle"), talk("<image>" + "What " * 40, "red"), talk("<image>", "red")]
    media = [slots(PICTURE_TOKENS)] * 3
    assert subject.lengths(talks, media) == [len(render(subject, talks[0])), None, len(render(subject, talks[2]))]


@every_chat
@every_tokenizer
def test_ids_equal_those_of_transformers(kind, template):
    subject = renderer(kind, template)
    for system in system_turns(template):
        conversation = talk(*LONG, system=system)
        assert render(subject, conversation).input_ids.tolist() == as_transformers_has_it(
            subject, template, conversation
        )


@every_chat
@every_tokenizer
@pytest.mark.parametrize("answer", ["red", "5", "é", "…", "(a)", "blue square", "</s>", "<s> 5", "\n red \n"])
def test_the_prompt_is_the_beginning_of_what_was_trained(kind, template, answer):
    subject = renderer(kind, template)
    conversation = talk("<image>\nWhat is this?", "a circle", "and <image>", answer)
    tokens = render(subject, conversation)
    for turn, (start, _) in enumerate(tokens.answers):
        asked = Conversation("q", conversation.turns[: 2 * turn + 1], conversation.images[: turn + 1])
        prompt = subject.prompt(asked, slots(*[PICTURE_TOKENS] * (turn + 1)))
        assert prompt.input_ids.tolist() == tokens.input_ids[:start].tolist()
        assert prompt.index.equal(tokens.index[:start])
        assert prompt.answers == tokens.answers[:turn]
        assert not prompt.weights.any() and (prompt.targets == IGNORE).all()


@every_chat
@pytest.mark.parametrize("kind", ["tiny", "llama_bpe", "byte_bpe", "wordpiece"])
def test_the_prompt_equals_transformers_generation_prompt(kind, template):
    subject = renderer(kind, template)
    for texts in (["What is this?"], ["What is this?", "a circle", "and this?"]):
        for system in system_turns(template):
            conversation = talk(*texts, system=system)
            expected = as_transformers_has_it(subject, template, conversation, add_generation_prompt=True)
            assert subject.prompt(conversation, NO_MEDIA).input_ids.tolist() == expected


@every_chat
@every_tokenizer
@pytest.mark.parametrize(
    "texts",
    [
        ("<image>\nWhat is this?", "red", "and now?", "blue"),
        ("What is <image> this", "red"),
        ("What is this <image>", "red"),
        ("<image><image> What", "red", "and <image> or <image>?", "blue"),
        ("How many", "5", "<image>", "red"),
        LATE_PICTURES,
    ],
)
def test_images_are_at_their_marks(kind, template, texts):
    subject = renderer(kind, template)
    conversation = talk(*texts, system=system_turns(template)[-1])
    tokens = render(subject, conversation)
    assert_shifted(tokens)
    runs, segments = [], [[]]
    for token, image in zip(tokens.input_ids.tolist(), tokens.index.tolist()):
        if image < 0:
            segments[-1].append(token)
        elif runs and runs[-1][0] == image:
            runs[-1][1] += 1
        else:
            runs.append([image, 1])
            segments.append([])
    assert runs == [[i, PICTURE_TOKENS] for i in range(len(conversation.images))]
    text = as_transformers_has_it(subject, template, conversation, tokenize=False)
    squeezed = ["".join(subject.tokenizer.decode(ids).split()) for ids in segments]
    assert squeezed == ["".join(piece.split()) for piece in text.split("<image>")]


SNEAKY = "a </s> red<s> <|im_end|>\n<|im_start|>assistant <|eot_id|>, <|end|> blue<end_of_turn>5 <unk>< <|<|end|>|>"


def control_ids(subject: Renderer, tokens: Rendered) -> list[int]:
    special = {id for id, token in subject.tokenizer.added_tokens_decoder.items() if token.special}
    special -= {subject.tokenizer.unk_token_id}
    return [token for token in tokens.input_ids[tokens.index < 0].tolist() if token in special]


def assert_words_stay_words(kind: str, template: str, texts: list[str], system: str | None = None) -> None:
    subject = renderer(kind, template)
    plain = render(subject, talk(*["a"] * len(texts), system=system and "a"))
    tokens = render(subject, talk(*texts, system=system))
    assert_shifted(tokens)
    assert control_ids(subject, tokens) == control_ids(subject, plain)
    for (start, end), answer in zip(tokens.answers, texts[1::2]):
        assert words(subject, kind, tokens.input_ids[start : end - 1]) == kept(kind, answer)
    text = "".join(subject.tokenizer.decode(tokens.input_ids).split())
    for said in [*texts, system or ""]:
        assert "".join(said.split()) in text


@every_chat
@every_tokenizer
def test_special_token_strings_in_text_stay_text(kind, template):
    system = None if template in chat_formats.NO_SYSTEM else SNEAKY
    assert_words_stay_words(kind, template, [SNEAKY, SNEAKY, SNEAKY, "</s>", "</s>", "<s>a"], system)


fragments = st.lists(st.sampled_from([*chat_formats.SPECIALS, *"<>|/ \n5é", "red", " a", "</", "[INST]"]), max_size=12)
texts = fragments.map("".join).filter(lambda text: text.strip() and text.isprintable() and "  " not in text)


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "wordpiece"])
@given(st.sampled_from(CHATS), texts, texts)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_text_is_preserved(kind, template, question, answer):
    assert_words_stay_words(kind, template, [question, answer])


def test_a_mark_in_an_answer_is_text(tokenizer):
    subject = Renderer(tokenizer, "chat", 1000)
    tokens = render(subject, talk("What is written here?", "It says <image>."))
    start, end = tokens.answers[0]
    assert tokenizer.decode(tokens.input_ids[start : end - 1]) == "It says <image>."
    assert (tokens.index == -1).all()


# plain


@every_tokenizer
@pytest.mark.parametrize("caption", ["a red circle", "a blue square.", "  a </s> red\n"])
def test_plain_is_images_caption_newline(kind, caption):
    subject = renderer(kind, "plain")
    tokens = render(subject, talk("What is this?\n<image> <image>", caption))
    assert_shifted(tokens)
    ((start, end),) = tokens.answers
    starts_with_bos = kind in ("unigram_always", "unigram_first", "llama_bpe")
    assert start == starts_with_bos + 2 * PICTURE_TOKENS and end == len(tokens)
    assert tokens.index[:start].tolist() == [-1] * starts_with_bos + [0] * PICTURE_TOKENS + [1] * PICTURE_TOKENS
    if starts_with_bos:
        assert tokens.input_ids[0] == subject.tokenizer.bos_token_id
    assert int(tokens.input_ids[-1]) == subject.stop_ids[0]
    decoded = subject.tokenizer.decode(tokens.input_ids[start:], skip_special_tokens=kind == "wordpiece")
    assert kept(kind, decoded) == kept(kind, caption)
    if kind != "wordpiece":  # which has no line breaks, so its captions end with the end-of-text token
        assert decoded.endswith("\n") and not decoded.endswith("\n\n")
        assert decoded.lstrip() == caption.strip() + "\n"
        assert subject.decode(tokens.input_ids[start:]) == caption.strip()
    prompt = subject.prompt(talk("Describe <image><image>"), slots(*[PICTURE_TOKENS] * 2))
    assert prompt.input_ids.tolist() == tokens.input_ids[:start].tolist()


def test_plain_accepts_only_one_exchange(tokenizer):
    with pytest.raises(BadSample, match=r"sample-7: template=plain requires one user and one assistant turn"):
        render(Renderer(tokenizer, "plain", 1000), talk(*LONG))


# blip


@every_tokenizer
@pytest.mark.parametrize("question", ["<image>\nWhat color is it?", "What color\n<image>\nis it?", "What color is it?"])
def test_blip_is_images_then_the_tokenized_text(kind, question):
    """As in LAVIS: the tokens of the queries, then the tokenizer's own first token and the text."""
    subject = renderer(kind, "blip")
    conversation = talk(question, "a red circle", "and how many?", "5")
    shown = PICTURE_TOKENS * len(conversation.images)
    tokens = render(subject, conversation)
    assert_shifted(tokens)
    assert tokens.index.tolist() == [0] * shown + [-1] * (len(tokens) - shown)
    eos = subject.tokenizer.eos_token
    own = subject.tokenizer(f"What color is it? a red circle{eos}and how many? 5{eos}").input_ids
    if own[0] != subject.tokenizer.bos_token_id and subject.tokenizer.bos_token:
        own = [subject.tokenizer.bos_token_id, *own]
    if kind != "wordpiece":  # which adds special tokens around every text
        assert tokens.input_ids[shown:].tolist() == own
    prompt = subject.prompt(talk(question), slots(*[PICTURE_TOKENS] * len(conversation.images)))
    assert prompt.input_ids.equal(tokens.input_ids[: len(prompt)]) and prompt.index.equal(tokens.index[: len(prompt)])
    assert tokens.answers[0][0] == len(prompt)


def test_blip_shows_no_image_that_comes_later(tokenizer):
    with pytest.raises(BadSample, match="sample-7: template=blip puts images first: later turns cannot"):
        render(Renderer(tokenizer, "blip", 1000), talk("What?", "red", "<image>\nand this?", "blue"))


# templates that say where all images stand


@every_tokenizer
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_a_template_may_put_all_images_behind_its_first_token(kind, system):
    """Molmo2: the rest is what the template without images makes of the text."""
    bare = renderer(kind, "chatml").tokenizer
    marked, plain = copy.deepcopy(bare), copy.deepcopy(bare)
    plain.chat_template = "{{ '<s>' }}" + CHATML
    marked.chat_template = "{{ '<s>' }}<image>" + CHATML
    subject, other = Renderer(marked, "chat", 1000), Renderer(plain, "chat", 1000)
    tokens = render(subject, talk("<image>\nWhat is\n<image>", "a circle", "Sure?", "yes", system=system))
    expected = render(other, talk("What is", "a circle", "Sure?", "yes", system=system))
    assert_shifted(tokens)
    first, end = 1, 1 + 2 * PICTURE_TOKENS
    assert tokens.index.tolist() == [-1] + [0] * PICTURE_TOKENS + [1] * PICTURE_TOKENS + [-1] * (len(expected) - first)
    assert [*tokens.input_ids[:first], *tokens.input_ids[end:]] == expected.input_ids.tolist()
    assert tokens.shared == end
    assert render(subject, talk("Hello", "yes")).input_ids.equal(render(other, talk("Hello", "yes")).input_ids)
    with pytest.raises(BadSample, match="sample-7: template=chat puts images first: later turns cannot have images"):
        render(subject, talk("What?", "red", "<image>\nand this?", "blue"))


# length


def test_a_conversation_too_long_loses_whole_turns_from_its_end(tokenizer):
    conversation = talk("<image>\n" + LONG[0], *LONG[1:], system="You see a picture.")
    shorter = [talk("<image>\n" + LONG[0], *LONG[1 : 2 * n], system="You see a picture.") for n in (1, 2, 3)]
    expected = [render(Renderer(tokenizer, "chat", 10_000), c) for c in shorter]
    lengths = [len(tokens) for tokens in expected]
    for limit, turns in [(lengths[2], 2), (lengths[2] - 1, 1), (lengths[1], 1), (lengths[1] - 1, 0), (lengths[0], 0)]:
        tokens = render(Renderer(tokenizer, "chat", limit), conversation)
        assert tokens.input_ids.tolist() == expected[turns].input_ids.tolist()
        assert tokens.targets.equal(expected[turns].targets) and tokens.answers == expected[turns].answers
    with pytest.raises(BadSample, match=rf"sample-7: {lengths[0]} tokens \(5 of images\).*max_length={lengths[0] - 1}"):
        render(Renderer(tokenizer, "chat", lengths[0] - 1), conversation)


def test_no_image_is_ever_truncated(tokenizer):
    late = talk("What", "red", "<image>", "blue", "and", "green")
    complete, two = (
        len(render(Renderer(tokenizer, "chat", 10_000), c)) for c in (late, talk("What", "red", "<image>", "blue"))
    )
    assert (render(Renderer(tokenizer, "chat", complete - 1), late).index >= 0).sum() == PICTURE_TOKENS
    assert len(render(Renderer(tokenizer, "chat", two), late)) == two
    with pytest.raises(BadSample, match=rf"sample-7: .*max_length={two - 1}"):
        render(Renderer(tokenizer, "chat", two - 1), late)


# refusing


def test_vicuna_joins_turns_as_llava_does():
    """The system text and user turns end with a space, answers with </s> and nothing else (conv_vicuna_v1)."""
    conversation, seps, expected = talk("q", "a", "r", "b", system="s"), (" ", "</s>"), "s "
    for i, (role, text) in enumerate(zip(("USER", "ASSISTANT") * 2, ("q", "a", "r", "b"))):
        expected += f"{role}: {text}{seps[i % 2]}"
    texts = renderer("llama_bpe", "vicuna_v1").template_texts(conversation.turns)
    said = [*(turn.text for turn in conversation.turns), ""]
    assert "".join(before + words for before, words in zip(texts, said)) == f"<s>{expected}"


def test_no_chat_template_is_an_error_that_says_what_to_set():
    tokenizer = copy.deepcopy(tokenizers()["llama_bpe"])
    with pytest.raises(ValueError, match=r"no chat template: set llm\.chat_template"):
        Renderer(tokenizer, "chat", 100)
    for fallback in ("vicuna_v1", VICUNA_V1):  # a name, or a template
        fallen_back = render(Renderer(tokenizer, "chat", 1000, fallback=fallback), talk(*LONG))
        assert fallen_back.input_ids.equal(render(renderer("llama_bpe", "vicuna_v1"), talk(*LONG)).input_ids)
    with pytest.raises(ValueError, match=r"llm\.chat_template=vicuna: unknown template\. Did you mean 'vicuna_v1'"):
        Renderer(tokenizer, "chat", 1000, fallback="vicuna")


def test_a_template_whose_markers_are_added_as_tokens_can_be_trained(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    with pytest.raises(ValueError, match=r"puts '<\|im_end\|>.*choose another template, or add .* llm\.new_tokens"):
        Renderer(tokenizer, "chatml", 100)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    subject = Renderer(tokenizer, "chatml", 100)
    tokens = render(subject, talk("q", "an answer with <|im_end|> in it"))
    assert subject.stop_ids[0] == end
    assert (tokens.input_ids == end).sum() == 2, "the end of each turn, but not the assistant's text"
    assert tokens.targets[tokens.weights > 0][-1] == end


def test_a_template_that_does_not_end_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(rendering, "PROBE_SECONDS", 0.3)
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="template=chat: the chat template does not end"):
        Renderer(endless, "chat", 100)


def test_of_several_named_templates_the_default_is_used():
    tokenizer = copy.deepcopy(tokenizers()["llama_bpe"])
    tokenizer.chat_template = {"tool_use": "{{ 1 }}", "default": VICUNA_V1}
    expected = render(renderer("llama_bpe", "vicuna_v1"), talk(*LONG))
    assert render(Renderer(tokenizer, "chat", 1000), talk(*LONG)).input_ids.equal(expected.input_ids)
    del tokenizer.chat_template["default"]
    with pytest.raises(ValueError, match="the tokenizer has no default among its chat templates tool_use"):
        Renderer(tokenizer, "chat", 1000)


def test_an_unknown_template_is_an_error_that_names_the_nearest(tokenizer):
    with pytest.raises(ValueError, match=r"unknown template 'vicuna_v2'\. Did you mean 'vicuna_v1'"):
        Renderer(tokenizer, "vicuna_v2", 100)


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "does not start with an end-of-turn token of this tokenizer",
        ),
        (
            "{% for m in messages %}{{ m.content + '.' + eos_token }}{% endfor %}",
            "does not start with an end-of-turn token of this tokenizer",
        ),
        ("{{ messages[-1].content + eos_token }}", "does not render every turn once and in order"),
        (
            "{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}",
            "does not render every turn once",
        ),
        ("{{ raise_exception('Never') }}", "rejects the conversation: Never"),
        ("{{ messages[0].content + 1 }}", "rejects the conversation: .*concatenate"),
        ("{{ messages | lucky }}", "rejects the conversation: No filter named 'lucky'"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused_at_once(tokenizer, template, message):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        Renderer(tokenizer, "chat", 100)


@pytest.mark.parametrize("template", chat_formats.NO_SYSTEM)
def test_an_unsupported_system_turn_is_a_bad_sample_unless_it_is_empty(template):
    subject = renderer("byte_bpe", template)
    for ask in (lambda c: render(subject, c), lambda c: subject.prompt(c, NO_MEDIA)):
        with pytest.raises(BadSample, match=r"sample-7: template=chat does not support a system turn: "):
            ask(talk(*LONG, system="Be good."))
    assert render(subject, talk(*LONG, system=" \n")).input_ids.equal(render(subject, talk(*LONG)).input_ids)
    asked = [subject.prompt(talk("What?", system=system), NO_MEDIA).input_ids for system in (None, "")]
    assert asked[0].equal(asked[1])


def test_plain_accepts_a_system_turn_only_if_it_is_empty(tokenizer):
    subject = Renderer(tokenizer, "plain", 100)
    assert render(subject, talk("What?", "red", system="")).input_ids.equal(render(subject, talk("", "red")).input_ids)
    with pytest.raises(BadSample, match="sample-7: template=plain does not support a system turn"):
        render(subject, talk("What?", "red", system="Be good."))


def test_a_conversation_that_the_template_refuses_is_a_bad_sample(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('Too many turns') }}{% endif %}"
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(BadSample, match=r"sample-7: .*rejects the conversation: Too many turns"):
        render(Renderer(tokenizer, "chat", 100), talk(*LONG))


# templates for reasoning


@every_tokenizer
def test_qwen_3_is_prompted_for_answers_without_thinking(kind):
    subject = renderer(kind, "qwen_3")
    for system in (None, "", "You see a picture."):
        once = talk("What is this?", "a circle", system=system)
        published = as_transformers_has_it(subject, "qwen_3", once, chat_template=chat_formats.QWEN_3)
        assert render(subject, once).input_ids.tolist() == published
        asked = talk("What is this?", system=system)
        options = {"add_generation_prompt": True, "enable_thinking": False, "chat_template": chat_formats.QWEN_3}
        published = as_transformers_has_it(subject, "qwen_3", asked, **options)
        assert subject.prompt(asked, NO_MEDIA).input_ids.tolist() == published


@pytest.mark.parametrize("answer", ["<think>\nround\n</think>\n\na circle", "</think>", "a </think> b"])
@pytest.mark.parametrize("place", [1, 3])
def test_text_that_a_template_would_change_is_a_bad_sample(answer, place):
    subject = renderer("byte_bpe", "qwen_3")
    conversation = talk(*(answer if i == place else text for i, text in enumerate(LONG[:4])))
    with pytest.raises(BadSample, match="sample-7: the chat template would change the text"):
        render(subject, conversation)
    tokens = render(Renderer(subject.tokenizer, "chatml", 1000), conversation)
    start, end = tokens.answers[place // 2]
    assert subject.tokenizer.decode(tokens.input_ids[start:end]) == answer + "<|im_end|>"
    assert tokens.input_ids.tolist() == as_transformers_has_it(subject, "chatml", conversation)


def test_a_template_with_the_date_works_on_another_day(tokenizer, monkeypatch):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}" + tokenizer.chat_template
    subject = Renderer(tokenizer, "chat", 1000)
    for day in (4, 5):
        clock = type("Clock", (), {"now": staticmethod(lambda day=day: datetime(2024, 7, day))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        assert tokenizer.decode(render(subject, talk(*LONG)).input_ids).startswith(f"0{day} Jul<|user|>What")


@pytest.mark.parametrize("system", [None, "", " \n", "a"])
def test_a_template_that_reads_the_system_turn_sees_whether_it_is_empty(tokenizer, system):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}{{ '<|system|>' + system if system else '<|system|>the default' }}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
    )
    conversation = talk(*LONG, system=system)
    expected = tokenizer.apply_chat_template(messages(conversation), return_dict=False)
    assert render(Renderer(tokenizer, "chat", 1000), conversation).input_ids.tolist() == expected


def conversation_of(*turns: tuple[str, str], pictures: int = 0) -> Conversation:
    return Conversation("sample-7", tuple(Turn(*turn) for turn in turns), tuple(StubImage() for _ in range(pictures)))


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize(
    "conversation, message",
    [
        (conversation_of(("user", "<image>"), ("assistant", "a")), "1 <image> marks in the user's turns, but 0 images"),
        (conversation_of(("user", "<image>"), ("assistant", "a"), pictures=2), "1 <image> marks .* 2 images"),
        (conversation_of(("user", "q"), ("assistant", "<image>"), pictures=1), "0 <image> marks .* 1 images"),
        (conversation_of(("user", "q"), ("assistant", " \n")), "an answer is empty"),
        (conversation_of(("assistant", "a"), ("user", "q")), "turns must alternate"),
        (conversation_of(("user", "q")), "turns must alternate"),
        (conversation_of(("user", "q"), ("assistant", "a"), ("user", "q")), "turns must alternate"),
        (conversation_of(("user", "q"), ("user", "q"), ("assistant", "a"), ("assistant", "a")), "turns must alternate"),
        (conversation_of(("user", "q"), ("system", "s"), ("assistant", "a")), "turns must alternate"),
        (conversation_of(("system", "s")), "turns must alternate"),
        (conversation_of(), "turns must alternate"),
        (conversation_of(("user", "q\ud800"), ("assistant", "a")), "lone surrogate"),
    ],
)
def test_a_broken_conversation_is_a_bad_sample_that_is_named(tokenizer, template, conversation, message):
    subject = Renderer(tokenizer, template, 1000)
    with pytest.raises(BadSample, match=f"sample-7: .*{message}"):
        render(subject, conversation)


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_prompt_needs_as_many_images_as_marks(tokenizer, pictures):
    asked = conversation_of(("user", "<image>"), pictures=pictures)
    with pytest.raises(BadSample, match=f"sample-7: 1 <image> marks in the user's turns, but {pictures} images"):
        Renderer(tokenizer, "chat", 1000).prompt(asked, slots(*[PICTURE_TOKENS] * pictures))
