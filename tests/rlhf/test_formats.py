"""Formats of rows: what a model reads of each, which tokens are learnt, and what is told of rows that do not fit."""

from __future__ import annotations

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_rlhf.data import comparisons, demonstrations, first_ids, prompt_texts_and_ids
from ppo_rlhf.data.chats import ids_and_places
from ppo_rlhf.data.formats import prompts_and_completions
from ppo_rlhf.errors import UserError
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.train.rankings import fitting, rankings_of

TEXTS = ("the cat sat on the mat.", "a dog ran to the park, and the cat did not.", "system user assistant\n")
SYSTEM = {"role": "system", "content": "be kind."}
USER = {"role": "user", "content": "why is the sea blue?"}
ANSWER = {"role": "assistant", "content": "the sky is in it."}
AGAIN = {"role": "user", "content": "and at night?"}
LAST = {"role": "assistant", "content": "then it is black."}
CHATS = {
    "one turn": [USER, ANSWER],
    "a system prompt": [SYSTEM, USER, ANSWER],
    "two turns": [SYSTEM, USER, ANSWER, AGAIN, LAST],
    "an open end": [USER, ANSWER, AGAIN],
}


@pytest.fixture(params=["plain", "marked"])
def chatting(request):
    """A tokenizer whose template says by marks what an assistant writes, and one whose template does not."""
    template = tiny_models.MARKED_CHAT if request.param == "marked" else tiny_models.CHAT
    return tiny_models.make_chat_tokenizer(TEXTS, size=320, template=template)


@pytest.fixture
def chat_tokenizer():
    return tiny_models.make_chat_tokenizer(TEXTS, size=320)


@pytest.fixture(autouse=True)
def own_cache(data_cache):
    """Tokens are kept in a folder of each test."""


def demonstration(row, tokenizer, **limits):
    (example,) = demonstrations([row], tokenizer, **{"longest": 400, "too_long": "refuse", "setting": "data"} | limits)
    return example


def learnt_text(example, tokenizer):
    """The pieces of text that are learnt, each a run of learnt tokens."""
    pieces, run = [], []
    for token, learnt in zip([*example.ids, 0], [*example.learnt, False], strict=True):
        if learnt:
            run.append(token)
        elif run:
            pieces.append(tokenizer.decode(run))
            run = []
    return pieces


# ------------------------------------------------------------------------------------------------ demonstrations


def test_of_a_text_everything_after_its_first_token_is_learnt(tokenizer):
    example = demonstration({"text": "the cat sat"}, tokenizer)
    ids = tokenizer("the cat sat")["input_ids"]
    assert example.ids == [*ids, tokenizer.eos_token_id]
    assert example.learnt == [False] + [True] * len(ids)


def test_of_prompt_and_completion_the_completion_and_eos_are_learnt_and_both_are_encoded_apart(tokenizer):
    example = demonstration({"prompt": "the cat", "completion": " sat"}, tokenizer)
    prompt, completion = (tokenizer(text)["input_ids"] for text in ("the cat", " sat"))
    assert example.ids == [*prompt, *completion, tokenizer.eos_token_id]
    assert example.learnt == [False] * len(prompt) + [True] * (len(completion) + 1)
    assert example.start == len(prompt)


def test_a_text_that_ends_with_eos_gets_no_second_one(tokenizer):
    example = demonstration({"text": f"the cat{tokenizer.eos_token}"}, tokenizer)
    assert example.ids == [*tokenizer("the cat")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_a_conversations_tokens_are_those_of_apply_chat_template(chatting, messages):
    assert demonstration({"messages": messages}, chatting).ids == chatting.apply_chat_template(
        messages, return_dict=False
    )


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_what_assistants_say_is_learnt_through_the_end_of_their_turns(chatting, messages):
    learnt = learnt_text(demonstration({"messages": messages}, chatting), chatting)
    assert learnt == [f"{message['content']}<|im_end|>" for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_a_template_without_marks_teaches_what_one_with_marks_does(messages):
    plain, marked = (
        tiny_models.make_chat_tokenizer(TEXTS, size=320, template=template)
        for template in (tiny_models.CHAT, tiny_models.MARKED_CHAT)
    )
    masks = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert demonstration({"messages": messages}, plain).learnt == list(map(bool, masks["assistant_masks"]))


def test_of_a_conversation_in_two_parts_only_the_completion_is_learnt(chatting):
    row = {"prompt": [USER, ANSWER, AGAIN], "completion": [LAST]}
    example = demonstration(row, chatting)
    assert example.ids == chatting.apply_chat_template([USER, ANSWER, AGAIN, LAST], return_dict=False)
    assert learnt_text(example, chatting) == ["then it is black.<|im_end|>"]
    prompt = chatting.apply_chat_template([USER, ANSWER, AGAIN], add_generation_prompt=True, return_dict=False)
    assert example.ids[: example.start] == prompt  # what the policy will respond to


def test_a_completion_that_is_text_is_an_assistants_message(chatting):
    both = [
        demonstration({"prompt": [USER], "completion": completion}, chatting)
        for completion in (ANSWER["content"], [ANSWER])
    ]
    assert both[0] == both[1]


def test_columns_that_are_null_in_a_message_are_none(chat_tokenizer):
    messages = [{**USER, "name": None, "tool_calls": None}, ANSWER]
    assert demonstration({"messages": messages}, chat_tokenizer).ids == chat_tokenizer.apply_chat_template(
        [USER, ANSWER], return_dict=False
    )


def test_rows_give_their_template_tools_and_arguments(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ tools[0].name }}{{ mood }}" + tiny_models.CHAT
    for tools in ([{"name": "clock"}], '[{"name": "clock"}]'):
        row = {"messages": [USER, ANSWER], "tools": tools, "chat_template_kwargs": {"mood": "gay"}}
        assert chat_tokenizer.decode(demonstration(row, chat_tokenizer).ids).startswith("clockgay<|im_start|>user")


def test_a_template_that_adds_to_the_head_of_an_answer_does_not_teach_its_own_words(chat_tokenizer):
    head = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>"
    chat_tokenizer.chat_template = tiny_models.CHAT.replace(head.removesuffix("<think>"), head)
    example = demonstration({"prompt": [USER], "completion": [ANSWER]}, chat_tokenizer)
    assert learnt_text(example, chat_tokenizer) == ["the sky is in it.<|im_end|>"]


MISTAKES = [
    ({"promt": "a"}, "data: demonstrations need .*; found promt; .*--columns"),
    ({"prompt": "a", "completoin": "b"}, r"found completoin, prompt; .* Did you mean completoin\?"),
    ({"prompt": "a", "completion": "b", "text": "c"}, "one of the three; found completion, prompt, text"),
    ({"messages": [USER, ANSWER], "text": "c"}, "one of the three; found messages, text; .*null"),
    ({"prompt": "a", "completion": " "}, "data: row 0, column 'completion' is blank"),
    ({"prompt": "a", "completion": None}, "data: row 0, column 'completion' is NoneType"),
    ({"text": 3}, "data: row 0, column 'text' is int"),
    ({"completion": "x"}, "data: row 0 has no column 'prompt'"),
    ({"messages": []}, "data: row 0, column 'messages' must be a text or a list of messages"),
    ({"messages": None}, "data: row 0, column 'messages' must be .*None"),
    ({"messages": [{"role": "user"}]}, "data: row 0, column 'messages', a list: a message must have `role` and"),
    ({"messages": ["hello"]}, "a message must have `role` and `content`"),
    ({"messages": [USER]}, "data: row 0: no assistant speaks"),
    ({"messages": [USER, ANSWER], "tools": "[{"}, "data: row 0: `tools` is no JSON"),
    ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "data: row 0: `tools` must be a list"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "data: row 0: .*`chat_template_kwargs` a mapping"),
    ({"prompt": [SYSTEM], "completion": [ANSWER]}, "data: row 0: a prompt must end with .*, not a system"),
]


@pytest.mark.parametrize(("row", "message"), MISTAKES)
def test_demonstrations_that_cannot_be_learnt_are_refused_by_name(chat_tokenizer, row, message):
    with pytest.raises(UserError, match=message):
        demonstration(row, chat_tokenizer)


def test_a_text_without_a_token_is_refused_by_name(tokenizer):
    with pytest.raises(UserError, match="data: row 0: the tokenizer finds no token"):
        demonstration({"prompt": "ЖЖ", "completion": "x"}, tokenizer)


def test_a_conversation_for_a_model_without_a_template_names_the_way_out(tokenizer):
    with pytest.raises(UserError, match=r"data: row 0 is a conversation, .* no chat template; give one.*chat_template"):
        demonstration({"messages": [USER, ANSWER]}, tokenizer)


def test_what_a_template_refuses_is_told(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"data: row 0: the chat template refuses .*: roles must alternate"):
        demonstration({"messages": [USER, ANSWER]}, chat_tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ messages | length }}" + tiny_models.CHAT
    with pytest.raises(UserError, match=r"data: row 0: the chat template renders message 1 differently.*generation"):
        demonstration({"messages": CHATS["two turns"][1:]}, chat_tokenizer)


# ------------------------------------------------------------------------------------------------ what is too long

LONG = {"prompt": "why is the sea", "completion": " so blue, and so big?"}


def test_too_long_is_cut_on_the_side_that_is_asked_for_and_counted(tokenizer):
    whole = demonstration(LONG, tokenizer)
    longest = len(whole.ids) - 2
    cut = {}
    for side in ("left", "right"):
        examples = demonstrations(
            [LONG, LONG | {"completion": "!"}], tokenizer, longest=longest, too_long=side, setting="d"
        )
        cut[side] = examples[0]
        assert (examples.num_cut, examples.num_dropped, examples.lengths[0]) == (1, 0, longest)
        assert examples.told("texts") == [f"1 of 2 texts were cut on the {side} to max_length={longest} tokens."]
    assert (cut["right"].ids, cut["right"].learnt) == (whole.ids[:longest], whole.learnt[:longest])
    assert cut["right"].ids[-1] != tokenizer.eos_token_id  # a cut completion does not learn to stop there
    assert (cut["left"].ids, cut["left"].learnt) == (whole.ids[2:], whole.learnt[2:])


def test_the_first_token_of_what_is_left_is_not_learnt(tokenizer):
    example = demonstration(LONG, tokenizer, longest=3, too_long="left")
    assert example.learnt == [False, True, True]  # nothing predicts it


def test_too_long_is_dropped_and_the_others_keep_their_rows(tokenizer):
    rows = [LONG, LONG | {"completion": "!"}, LONG, LONG | {"completion": "?"}]
    short = len(demonstration(rows[1], tokenizer).ids)
    examples = demonstrations(rows, tokenizer, longest=short, too_long="drop", setting="data")
    assert [examples.row(index) for index in range(len(examples))] == [rows[1], rows[3]]
    assert examples[1] == demonstration(rows[3], tokenizer)
    assert examples.told("texts") == [f"2 of 4 texts are longer than max_length={short} tokens and were dropped."]


def test_what_fits_exactly_is_as_it_was(tokenizer):
    whole = demonstration(LONG, tokenizer)
    assert demonstration(LONG, tokenizer, longest=len(whole.ids), too_long="right") == whole


def test_a_cut_that_leaves_a_users_words_alone_is_refused(chat_tokenizer):
    row = {"messages": [USER, ANSWER, AGAIN]}
    tail = len(chat_tokenizer.apply_chat_template([AGAIN], return_dict=False)) + 1  # with the turn's new line before it
    with pytest.raises(UserError, match=f"data: demonstration 0 has .* but {tail + 1} fit"):
        demonstration(row, chat_tokenizer, longest=tail + 1, too_long="left")
    assert sum(demonstration(row, chat_tokenizer, longest=tail + 2, too_long="left").learnt) == 1


@pytest.mark.parametrize(
    ("longest", "too_long", "message"),
    [
        (5, "refuse", r"data: demonstration 0 has \d+ tokens .*, but 5 fit: set max_length and too_long"),
        (2, "right", r"data: demonstration 0 has .* but 2 fit"),
        (2, "drop", "data: all demonstrations exceed 2 tokens, and too_long=drop leaves none"),
    ],
)
def test_too_long_is_refused_where_nothing_would_be_left(tokenizer, longest, too_long, message):
    with pytest.raises(UserError, match=message):
        demonstration(LONG, tokenizer, longest=longest, too_long=too_long)


def test_tokens_are_read_back_where_nothing_changed_and_made_anew_where_the_template_did(chat_tokenizer, monkeypatch):
    row = {"messages": [USER, ANSWER]}
    first = demonstration(row, chat_tokenizer)
    monkeypatch.setattr("ppo_rlhf.data.formats.tokens_and_mask", None)  # not called again
    assert demonstration(row, chat_tokenizer) == first
    assert demonstration(row, chat_tokenizer, longest=9, too_long="left").ids == first.ids[-9:]
    chat_tokenizer.chat_template += "!"
    with pytest.raises(TypeError):
        demonstration(row, chat_tokenizer)


def test_a_cache_that_cannot_be_written_is_named(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"the cache of datasets cannot be written: .*HF_DATASETS_CACHE"):
        demonstration({"text": "the cat"}, tokenizer)


def test_a_slow_tokenizer_is_refused_where_tokens_must_be_found_in_their_text():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="row 3: the policy's tokenizer is a slow one"):
        ids_and_places(Slow(), "the cat", "row 3")


def test_held_out_examples_are_the_held_out_rows(tokenizer):
    rows = [{"prompt": f"the {letter}", "completion": letter} for letter in "abcdefghij"]
    training, held_out = demonstrations(rows, tokenizer, longest=9, too_long="refuse", setting="data").split(
        0.3, 0, setting="eval_fraction"
    )
    assert (len(training), len(held_out)) == (7, 3)
    for side in (training, held_out):
        assert [tokenizer.decode(example.ids[example.start : -1]) for example in side] == [
            row["completion"] for row in side.rows(10)
        ]
    assert {row["prompt"] for row in training.rows(10) + held_out.rows(10)} == {row["prompt"] for row in rows}


# --------------------------------------------------------------------------------------------------- comparisons


def compared(row, tokenizer):
    (found,) = comparisons([row], tokenizer, setting="data")
    return found


def test_a_shared_beginning_is_the_prompt_up_to_the_end_of_a_token(tokenizer):
    row = compared({"chosen": "the cat sat.", "rejected": "the cat sang."}, tokenizer)
    assert row["prompt"] + row["chosen"] == "the cat sat."
    assert row["prompt"] + row["rejected"] == "the cat sang."
    ids = [tokenizer(text)["input_ids"] for text in ("the cat sat.", "the cat sang.")]
    shared = next(place for place, both in enumerate(zip(*ids, strict=False)) if both[0] != both[1])
    assert tokenizer(row["prompt"])["input_ids"] == ids[0][:shared]
    for side, whole in zip(("chosen", "rejected"), ids, strict=True):
        assert tokenizer(row[side])["input_ids"] == whole[shared:]


@given(st.text(min_size=1, max_size=12), st.text(max_size=8), st.text(max_size=8))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_shared_prompt_never_loses_a_character(prompt, chosen, rejected):
    tokenizer = tiny_models.make_chat_tokenizer(TEXTS, size=320)
    try:
        row = compared({"chosen": prompt + chosen, "rejected": prompt + rejected}, tokenizer)
    except UserError:
        return  # nothing that can be seen is shared up to the end of a token
    assert row["prompt"] + row["chosen"] == prompt + chosen
    assert row["prompt"] + row["rejected"] == prompt + rejected


def test_two_characters_that_share_their_first_bytes_share_nothing(chat_tokenizer):
    row = compared({"chosen": "cat 😀", "rejected": "cat 😁"}, chat_tokenizer)  # three of their four bytes
    assert (row["chosen"][-1], row["rejected"][-1]) == ("😀", "😁")


CHAT_COMPARISONS = {
    "in three parts": {"prompt": [USER], "chosen": [ANSWER], "rejected": [LAST]},
    "the prompt in both": {"chosen": [USER, ANSWER], "rejected": [USER, LAST]},
    "the prompt in all": {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, LAST]},
    "the prompt also as text": {"prompt": USER["content"], "chosen": [USER, ANSWER], "rejected": [USER, LAST]},
    "a prompt that is text": {"prompt": USER["content"], "chosen": [ANSWER], "rejected": [LAST]},
    "answers that are texts": {"prompt": [USER], "chosen": ANSWER["content"], "rejected": LAST["content"]},
}


@pytest.mark.parametrize("row", CHAT_COMPARISONS.values(), ids=CHAT_COMPARISONS)
def test_compared_conversations_are_the_prompt_that_ppo_will_see_and_what_the_policy_would_say(chatting, row):
    found = compared(row, chatting)
    assert found["prompt"] == chatting.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert (found["chosen"], found["rejected"]) == (ANSWER["content"], LAST["content"])
    for side, answer in (("chosen", ANSWER), ("rejected", LAST)):  # as the reward model reads them, eos at the end
        ids = first_ids(chatting, found["prompt"]) + chatting(found[side])["input_ids"] + [chatting.eos_token_id]
        whole = chatting.apply_chat_template([USER, answer], return_dict=False)
        assert ids == whole[: len(ids)]
        assert chatting.decode(whole[len(ids) :]) == "\n"


def test_a_ranking_of_answers_to_a_conversation_is_one_of_texts(chat_tokenizer):
    row = compared({"prompt": [USER], "responses": [ANSWER["content"], [LAST]], "ranks": [2, 1]}, chat_tokenizer)
    assert row["responses"] == [ANSWER["content"], LAST["content"]]
    assert row["prompt"].endswith("<|im_start|>assistant\n")
    assert row["ranks"] == [2, 1]


def test_peoples_choices_on_a_chat_are_read_by_the_template_where_there_is_one(chat_tokenizer, tokenizer):
    row = {"prompt": "\n\nHuman: why?\n\nAssistant:", "messages": [USER], "responses": ["a", "b"], "ranks": [1, 2]}
    assert compared(row, tokenizer)["prompt"] == row["prompt"]
    assert compared(row, chat_tokenizer)["prompt"] == chat_tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=False
    )


def test_comparisons_of_texts_stay_as_they_are(tokenizer):
    for row in (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0},
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]},
    ):
        assert compared(row, tokenizer) == row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": "a", "rejected": "b"},
            "data: row 0 has no `prompt`, and its sides share no beg.*--columns",
        ),
        ({"promt": "p", "chosen": "a", "rejected": "b"}, r"share no beginning; .* Did you mean promt\?"),
        ({"chosen": [ANSWER], "rejected": [LAST]}, "data: row 0 has no `prompt`, and its sides share no message"),
        (
            {"prompt": "p", "chosen": ["a"], "rejected": "b"},
            "data: row 0, column 'chosen', a list: a message must",
        ),
        ({"prompt": [USER], "chosen": 3, "rejected": "b"}, "data: row 0, column 'chosen' must be a text or a list.*3"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "responses": ["a", "b"], "ranks": [1, 2]},
            "data: comparisons are either .* or .*; found chosen, prompt, ranks, rejected, responses; .*null",
        ),
    ],
)
def test_comparisons_that_cannot_be_read_are_refused_by_name(chat_tokenizer, row, message):
    with pytest.raises(UserError, match=message):
        compared(row, chat_tokenizer)


def test_long_comparisons_lose_the_beginning_of_their_prompt_or_are_dropped_and_counted(tokenizer):
    rows = [
        {"prompt": "why is the sea so blue, and so big? why, why?", "chosen": "go!", "rejected": "why"},
        {"prompt": "go", "chosen": "a dog", "rejected": "a dog ran to the park"},
        {"prompt": "go", "chosen": "a dog", "rejected": "why"},
    ]
    rankings = rankings_of(rows, setting="data")
    whole = fitting(rankings, tokenizer, longest=99, too_long="refuse", setting="data")
    assert (len(whole), whole.num_cut, whole.num_dropped, whole.told()) == (3, 0, 0, [])
    longest = len(whole.encoded[1][1]) - 2  # its response alone is longer, by one
    assert len(tokenizer("a dog ran to the park")["input_ids"]) == longest

    cut = fitting(rankings, tokenizer, longest=longest, too_long="left", setting="data")
    assert cut.encoded == [[ids[-longest:] for ids in whole.encoded[0]], whole.encoded[2]]
    assert cut.told() == [
        "1 of 3 comparisons are too long and were left out.",
        "1 of 3 comparisons lost the beginning of their prompt.",
    ]
    dropped = fitting(rankings, tokenizer, longest=longest, too_long="drop", setting="data")
    assert dropped.encoded == [whole.encoded[2]]
    assert dropped.told() == ["2 of 3 comparisons are too long and were left out."]
    with pytest.raises(UserError, match=f"data: a comparison has .* but {longest} fit; set too_long .*'why is the"):
        fitting(rankings, tokenizer, longest=longest, too_long="refuse", setting="data")


COMPARED = {"prompt": [USER], "chosen": [ANSWER], "rejected": [LAST]}


def encoded(row, tokenizer, longest=99):
    rankings = rankings_of(comparisons([row], tokenizer, setting="data"), setting="data")
    return fitting(rankings, tokenizer, longest=longest, too_long="left", setting="data").encoded


def test_the_tokens_of_comparisons_are_read_back_where_nothing_changed(chat_tokenizer, monkeypatch):
    first = encoded(COMPARED, chat_tokenizer)
    monkeypatch.setattr("ppo_rlhf.data.formats.prompt_and_response_ids", None)  # not called again
    assert encoded(COMPARED, chat_tokenizer) == first
    assert encoded(COMPARED, chat_tokenizer, longest=20) == [[ids[-20:] for ids in first[0]]]


def test_comparisons_are_encoded_anew_where_a_row_the_template_or_the_tokenizer_changed(chat_tokenizer, monkeypatch):
    encoded(COMPARED, chat_tokenizer)
    monkeypatch.setattr("ppo_rlhf.data.formats.prompt_and_response_ids", None)
    with pytest.raises(TypeError):
        encoded(COMPARED | {"rejected": [ANSWER | {"content": "no."}]}, chat_tokenizer)
    template = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = template + "!"
    with pytest.raises(TypeError):
        encoded(COMPARED, chat_tokenizer)
    chat_tokenizer.chat_template = template
    chat_tokenizer.add_tokens("the sky")
    with pytest.raises(TypeError):
        encoded(COMPARED, chat_tokenizer)


# ------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, ANSWER, AGAIN]])
def test_a_conversation_to_respond_to_is_that_of_apply_chat_template_with_the_head_of_an_answer(chatting, messages):
    (text,), (ids,) = prompt_texts_and_ids([{"prompt": messages}], chatting, setting="prompts")
    assert ids == chatting.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert text == chatting.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_a_prompt_that_ends_with_an_assistants_words_goes_on_with_them(chat_tokenizer):
    messages = [USER, {"role": "assistant", "content": "the sky"}]
    (text,), _ = prompt_texts_and_ids([{"prompt": messages}], chat_tokenizer, setting="prompts")
    assert text.endswith("<|im_start|>assistant\nthe sky")


def test_rewards_are_given_the_conversations_beside_their_texts(chat_tokenizer):
    prompts = Prompts([{"prompt": [USER], "topic": "sea"}], chat_tokenizer, longest=200, setting="prompts")
    assert prompts.columns_of([0]) == {"topic": ["sea"], "messages": [[USER]]}


def test_a_bos_of_the_template_and_one_of_the_tokenizer_are_one(chat_tokenizer):
    class Beginning:
        """A tokenizer that puts bos before a text."""

        bos_token_id = 7

        def __call__(self, text, *, add_special_tokens=True):
            ids = [7 if word == "<s>" else len(word) for word in text.split()]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    assert first_ids(Beginning(), "a bb") == [7, 1, 2]
    assert first_ids(Beginning(), "<s> a bb") == [7, 1, 2]
    assert first_ids(Beginning(), "<s> <s> a") == [7, 7, 7, 1]  # two that are meant


PROMPTS = [{"prompt": "the cat sat on"}, {"prompt": "go"}, {"prompt": "a dog ran to the park"}]


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_prompts_are_cut_in_tokens_and_counted(tokenizer, side):
    whole = Prompts(PROMPTS, tokenizer, longest=40, setting="prompts")
    longest = len(whole.ids[0])
    cut = Prompts(PROMPTS, tokenizer, longest=longest, setting="prompts", too_long=side)
    assert cut.ids[:2] == whole.ids[:2]
    assert cut.ids[2] == (whole.ids[2][-longest:] if side == "left" else whole.ids[2][:longest])
    assert cut.texts[2] == tokenizer.decode(cut.ids[2])
    assert cut.told() == ["1 of 3 prompts were cut."]
    assert whole.told() == []


def test_long_prompts_are_dropped_with_their_columns_and_counted(tokenizer):
    longest = len(tokenizer("the cat sat on")["input_ids"])
    rows = [{**row, "number": number} for number, row in enumerate(reversed(PROMPTS))]
    kept = Prompts(rows, tokenizer, longest=longest, setting="prompts", too_long="drop")
    assert kept.texts == ["go", "the cat sat on"]
    assert kept.columns_of([0, 1]) == {"number": [1, 2]}
    assert kept.told() == ["1 of 3 prompts are too long and were dropped."]
    with pytest.raises(UserError, match="each prompt is longer than 1 tokens, and too_long=drop leaves none"):
        Prompts(PROMPTS[2:], tokenizer, longest=1, setting="prompts", too_long="drop")


def test_the_last_answer_of_a_conversation_is_shown_beside_what_the_policy_says(chat_tokenizer):
    rows = [{"messages": CHATS["two turns"]}, {"prompt": "a", "completion": "b"}, {"text": "c"}]
    shown = prompts_and_completions(rows, chat_tokenizer, "data")
    assert [(row["prompt"], row["completion"]) for row in shown] == [
        (CHATS["two turns"][:-1], LAST["content"]),
        ("a", "b"),
    ]
