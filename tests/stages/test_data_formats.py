"""Each format trains: two steps on rows of it, a value checked; and `inspect-data` shows what is trained on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from tiny_runs import STOPS, metrics_of, without_times

from ppo_rlhf.cli import main
from ppo_rlhf.config import PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.data import demonstrations
from ppo_rlhf.models import load_policy
from ppo_rlhf.preferences import Pair, Store
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo, reward_model, sft
from ppo_rlhf.train.supervised import token_batches

ASKED, SAID, OTHER = "red fish?", " blue bird .", " stone"
USER = {"role": "user", "content": ASKED}
GOOD, BAD = ({"role": "assistant", "content": text} for text in (SAID, OTHER))
SHARED = {"output_dir": "run", "batch_size": 2, "eval_every": 0, "save_every": 0, "log_with": ()} | {
    "eval_fraction": 0.5,
    "matmul_precision": "highest",
    "optimizer": OptimizerSettings(lr=1e-3, schedule="constant"),
}
SAMPLING = SamplingSettings(max_new_tokens=4, stop_token_ids=STOPS)
HEAD, END = "<|im_start|>user\nred fish?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A model whose tokenizer has a chat template."""
    texts = tuple(row["prompt"] + row["completion"] for row in tiny_runs.demonstrations(60))
    tokens = tiny_models.make_chat_tokenizer(texts, size=300)
    return tiny_runs.save(tmp_path_factory.mktemp("models") / "chat", tiny_runs.model(tokens), tokens)


def nll(model, ids, learnt):
    """Mean of −log π over the learnt tokens of a sequence, by the plain model: (sum, count)."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    losses = [-float(logprobs[place - 1, token]) for place, token in enumerate(ids) if learnt(place)]
    return sum(losses) / len(losses)


DEMONSTRATIONS = {
    "text": ({"text": ASKED + SAID}, "", ASKED + SAID),
    "prompt and completion": ({"prompt": ASKED, "completion": SAID}, ASKED, SAID),
    "other names": ({"question": ASKED, "answer": SAID, "text": "no"}, ASKED, SAID),
    "messages": ({"messages": [USER, GOOD]}, HEAD, SAID + END),
    "prompt and completion as conversations": ({"prompt": [USER], "completion": [GOOD]}, HEAD, SAID + END),
}


@pytest.mark.parametrize(("row", "prompt", "completion"), DEMONSTRATIONS.values(), ids=DEMONSTRATIONS)
def test_demonstrations_of_each_format_are_learnt_by_the_loss_of_their_responses(row, prompt, completion, chat_model):
    columns = {"question": "prompt", "answer": "completion", "text": None} if "question" in row else {}
    held_out = tiny_runs.write_rows("held_out.jsonl", [row] * 2)
    config = SFTConfig(policy=chat_model, columns=columns, eval_data=held_out, **SHARED)
    sft.train(config, data=[row] * 4)
    before, first, second = metrics_of("run")
    model, tokenizer = load_policy(chat_model, setting="test")
    prompt_ids, ids = (tokenizer(text)["input_ids"] for text in (prompt, completion))
    end = [] if completion.endswith(END) else [tokenizer.eos_token_id]
    start = max(1, len(prompt_ids))
    expected = nll(model, [*prompt_ids, *ids, *end], lambda place: place >= start)
    assert first["loss"] == pytest.approx(expected, abs=2e-5)
    assert before["eval/loss"] == pytest.approx(expected, abs=2e-5)
    assert second["loss"] < first["loss"]


def test_the_turns_of_a_conversation_are_all_learnt_and_the_users_are_not(chat_model):
    sft.train(SFTConfig(policy=chat_model, **SHARED), data=[{"messages": [USER, GOOD, USER, BAD]}] * 8)
    model, tokenizer = load_policy(chat_model, setting="test")
    pieces = [(HEAD, False), (SAID + END, True), ("\n", False), (HEAD, False), (OTHER + END, True), ("\n", False)]
    ids, learnt = [], []
    for text, taught in pieces:
        tokens = tokenizer(text)["input_ids"]
        ids += tokens
        learnt += [taught] * len(tokens)
    assert metrics_of("run")[1]["loss"] == pytest.approx(nll(model, ids, lambda place: learnt[place]), abs=2e-5)


def test_a_batch_of_tokens_is_learnt_as_its_demonstrations_are_alone(chat_model):
    rows = [{"text": "red fish " * (1 + number % 4) + str(number)} for number in range(12)]
    config = SFTConfig(policy=chat_model, batch_tokens=40, **SHARED)
    shapes = []
    sft.train(config, data=rows, callbacks=[lambda step, metrics: shapes.append(step)])
    model, tokenizer = load_policy(chat_model, setting="test")
    examples = demonstrations(rows, tokenizer, longest=64, too_long="refuse", setting="data")
    training, _ = examples.split(0.5, 0, setting="eval_fraction")
    batches = token_batches(training.lengths, config, 40, 1)
    assert len(shapes) == len(batches) > 1
    assert len({len(batch) for batch in batches}) > 1
    losses = [nll(model, training[row].ids, lambda place: place > 0) for row in batches[0]]
    counts = [len(training[row].ids) - 1 for row in batches[0]]
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert metrics_of("run")[1]["loss"] == pytest.approx(expected, abs=2e-5)


def test_a_model_without_a_template_takes_one_from_a_file_and_keeps_it(models):
    Path("chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    config = SFTConfig(policy=models["gpt2"], chat_template="chat.jinja", **SHARED)
    sft.train(config, data=[{"messages": [USER, GOOD]}] * 8)
    _, tokenizer = load_policy("run/policy", setting="test")
    rendered = tokenizer.apply_chat_template([USER, GOOD], tokenize=False)
    assert rendered == "user: red fish?<|endoftext|>assistant:  blue bird .<|endoftext|>"


COMPARISONS = {
    "prompt, chosen and rejected": ({"prompt": ASKED, "chosen": SAID, "rejected": OTHER}, ASKED),
    "a shared beginning": ({"chosen": ASKED + SAID, "rejected": ASKED + OTHER}, ASKED),
    "other names": ({"question": ASKED, "better": SAID, "worse": OTHER}, ASKED),
    "conversations": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, HEAD),
    "whole conversations": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, HEAD),
    "a ranking": ({"prompt": [USER], "responses": [SAID, OTHER], "ranks": [1, 2]}, HEAD),
}


@pytest.mark.parametrize(("row", "prompt"), COMPARISONS.values(), ids=COMPARISONS)
def test_comparisons_of_each_format_teach_to_tell_their_responses_apart(row, prompt, chat_model):
    columns = {"question": "prompt", "better": "chosen", "worse": "rejected"} if "question" in row else {}
    config = RewardConfig(policy=chat_model, columns=columns, normalization_prompts=2, sampling=SAMPLING, **SHARED)
    rows = [row | {"number": number} for number in range(8)]
    asked = ["".join(["red fish", "?" * number]) for number in range(8)]  # as many prompts, to hold some out
    rows = [json.loads(json.dumps(row).replace(ASKED, text)) for row, text in zip(rows, asked, strict=True)]
    reward_model.train(config, data=rows)
    before, first, _ = metrics_of("run")
    sample = tiny_runs.jsonl("run/samples.jsonl")[0]
    assert sample["prompt"].replace("?", "") == prompt.replace("?", "")
    assert (sample["chosen"], sample["rejected"]) == (SAID, OTHER)
    difference = torch.tensor(sample["chosen_score"] - sample["rejected_score"])
    assert before["eval/loss"] == pytest.approx(
        sum(
            float(torch.nn.functional.softplus(-torch.tensor(each["chosen_score"] - each["rejected_score"])))
            for each in tiny_runs.jsonl("run/samples.jsonl")[:4]
        )
        / 4,
        abs=1e-5,
    )
    assert difference != 0
    assert first["loss"] > 0
    tuned = RewardModel.load("run/reward_model", setting="test")
    ids = tuned.encode([sample["prompt"]], [SAID])[0]
    prompt_ids = tuned.tokenizer(sample["prompt"])["input_ids"]
    assert ids == [*prompt_ids, *tuned.tokenizer(SAID)["input_ids"], tuned.tokenizer.eos_token_id]


def test_what_people_choose_on_conversations_is_learnt_by_the_chat_template_as_from_a_file(chat_model):
    asked = [[USER, GOOD, USER | {"content": "red fish" + "?" * number}] for number in range(8)]
    store = Store.open("sqlite:///preferences.db", setting="--db")
    store.add("work", [Pair(messages, [SAID, OTHER]) for messages in asked])
    rows = []
    while (deal := store.deal("work", "ada")) is not None:
        store.choose(deal.number, "ada", "left")
        ranks = [1, 2] if deal.shown == [0, 1] else [2, 1]
        rows.append({"prompt": deal.pair.prompt, "responses": deal.pair.responses, "ranks": ranks})
    store.close()
    assert len(rows) == 8

    config = RewardConfig(policy=chat_model, normalization_prompts=2, sampling=SAMPLING, **SHARED)
    tokenizer = load_policy(chat_model, setting="test")[1]
    read = {}
    for source in ("sqlite:///preferences.db", tiny_runs.write_rows("rows.jsonl", rows)):
        folder = Path(source).stem
        reward_model.train(replace(config, data=source, output_dir=folder))
        _, *both = reward_model.load_rankings(replace(config, data=source), None, tokenizer, 99)
        read[folder] = [lines for side in both for lines in side.encoded]
    assert read["preferences"] == read["rows"]
    assert without_times(metrics_of("preferences")) == without_times(metrics_of("rows"))
    heads = [tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] for messages in asked]
    ends = [tokenizer(text + END)["input_ids"] for text in (SAID, OTHER)]
    assert sorted(read["preferences"]) == sorted([head + end for end in ends] for head in heads)


def test_conversations_are_responded_to_after_the_head_of_an_answer_and_rewards_see_them(chat_model):
    seen = []

    def reward(prompts, responses, *, messages, topic):
        seen.extend(zip(prompts, messages, topic, strict=True))
        return [float(len(response)) for response in responses]

    rows = [{"prompt": [{"role": "user", "content": f"red {number}"}], "topic": number} for number in range(8)]
    settings = SHARED | {"num_steps": 2, "sampling": SAMPLING, "ppo": PPOSettings(num_epochs=1)}
    ppo.train(PPOConfig(policy=chat_model, **settings), prompts=rows, reward=reward)
    assert seen
    for prompt, messages, topic in seen:
        assert messages == rows[topic]["prompt"]
        assert prompt == f"<|im_start|>user\nred {topic}<|im_end|>\n<|im_start|>assistant\n"
    assert metrics_of("run")[1]["objective/kl"] == pytest.approx(0, abs=1e-5)
    samples = tiny_runs.jsonl("run/samples.jsonl")
    assert all(row["prompt"].endswith("<|im_start|>assistant\n") for row in samples)


# ------------------------------------------------------------------------------------------------- inspect-data


def inspected(words, capfd):
    assert main(["inspect-data", "--json", *words]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])["stages"]


def test_what_is_inspected_is_what_is_trained_on(chat_model, capfd):
    tiny_runs.write_rows("chats.jsonl", [{"messages": [USER, GOOD, USER, BAD]}] * 8)
    Path("sft.yaml").write_text(f"policy: {chat_model}\ndata: chats.jsonl\nmax_length: 30\ntoo_long: left\n")
    (found,) = inspected(["--config", "sft.yaml", "--examples", "1"], capfd)
    assert (found["stage"], found["rows"], found["cut"], found["dropped"]) == ("sft", 8, 8, 0)
    assert set(found["lengths"].values()) == {30}
    (shown,) = found["shown"]
    _, tokenizer = load_policy(chat_model, setting="test")
    whole = tokenizer.apply_chat_template([USER, GOOD, USER, BAD], return_dict=False)
    assert shown["ids"] == whole[-30:]
    assert "".join(shown["tokens"]) == tokenizer.decode(whole[-30:])
    learnt = [token for token, mask in zip(shown["ids"], shown["learnt"], strict=True) if mask]
    assert tokenizer.decode(learnt).endswith(OTHER + END)
    assert found["learnt_tokens"] == 8 * len(learnt)
    assert found["specials"][END] == 8 * whole[-30:].count(tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("row", "stage", "names", "learnt"),
    [
        ({"text": ASKED}, "sft", ["demonstration"], [None]),
        ({"prompt": ASKED, "completion": SAID}, "sft", ["demonstration"], [SAID]),
        ({"prompt": ASKED, "chosen": SAID, "rejected": OTHER}, "reward", ["chosen", "rejected"], [SAID, OTHER]),
        (
            {"prompt": [USER], "responses": [OTHER, SAID], "ranks": [2, 1]},
            "reward",
            ["rejected", "chosen"],
            [OTHER, SAID],
        ),
        ({"prompt": ASKED}, "ppo", ["prompt"], [""]),
    ],
)
def test_the_stage_is_told_by_the_columns(row, stage, names, learnt, chat_model, capfd):
    tiny_runs.write_rows("rows.jsonl", [row] * 3)
    (found,) = inspected(["--policy", chat_model, "--data", "rows.jsonl", "--examples", "1"], capfd)
    assert found["stage"] == stage
    assert [shown["name"] for shown in found["shown"]] == names
    for shown, text in zip(found["shown"], learnt, strict=True):
        pieces = [token for token, mask in zip(shown["tokens"], shown["learnt"], strict=True) if mask]
        assert text is None or "".join(pieces).removesuffix(END) == text


def test_a_pipelines_stages_are_inspected_with_the_policy_that_they_start_from(chat_model, data, capfd):
    Path("pipeline.yaml").write_text(
        f"sft: {{policy: {chat_model}, data: {data['demonstrations']}}}\n"
        f"reward: {{data: {data['comparisons']}}}\nppo: {{prompts: {data['prompts']}}}\n"
    )
    found = inspected(["--config", "pipeline.yaml", "--examples", "0"], capfd)
    assert [(each["stage"], each["rows"], each["shown"]) for each in found] == [
        ("sft", 40, []),
        ("reward", 40, []),
        ("ppo", 40, []),
    ]
    (only,) = inspected(["--config", "pipeline.yaml", "--stage", "reward", "--examples", "0"], capfd)
    assert only == found[1]


def test_an_inspection_for_people_marks_what_is_learnt_with_brackets_and_whole_characters(chat_model, capfd):
    tiny_runs.write_rows("rows.jsonl", [{"q": "why [bold]?", "a": " 😀\n."}] * 2)
    words = ["--policy", chat_model, "--data", "rows.jsonl", "--columns", "{q: prompt, a: completion}"]
    assert main(["inspect-data", *words, "--max-length", "60"]) == 0
    out = capfd.readouterr().out
    assert "why [bold]?⟦ 😀⏎\n.<|im_end|>⟧" in out
    assert "0 dropped, 0 cut" in out
    assert "\x1b" not in out  # colours are for terminals


def test_a_template_that_teaches_no_eos_is_noted(models, capfd):
    Path("chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    tiny_runs.write_rows("rows.jsonl", [{"messages": [USER, GOOD]}])
    words = ["--policy", models["gpt2"], "--data", "rows.jsonl", "--chat-template", "chat.jinja"]
    (found,) = inspected(words, capfd)
    assert any("eos" in note and "sampling.stop_strings" in note for note in found["notes"])


INSPECTION_MISTAKES = [
    ("", "give --data, or a --config"),
    ("--data nowhere.jsonl", "there is no file nowhere.jsonl"),
    ("--data {prompts} --columns promt", "--columns 'promt' must be a mapping"),
    ("--data {prompts} --columns {{promt:~prompt}}", "has no column 'promt', only prompt. Did you mean prompt?"),
    ("--data {prompts} --too-long up", "too_long"),
    ("--data {prompts} --examples -1", "--examples -1 must be 0 or more"),
    ("--data {prompts} --policy ./nowhere", "policy: there is no folder ./nowhere"),
    ("--data {prompts} --stage reward", "data"),
    ("--data {prompts} --chat-template nowhere.jinja", "chat_template=nowhere.jinja cannot be read"),
    ("--config nowhere.yaml", "nowhere.yaml"),
]


@pytest.mark.parametrize(("line", "message"), INSPECTION_MISTAKES)
def test_a_mistake_in_an_inspection_is_named_in_one_line(line, message, chat_model, data, capfd):
    words = [word.format(**data).replace("~", " ") for word in line.split()]
    assert main(["inspect-data", "--policy", chat_model, *words]) == 2
    (told,) = capfd.readouterr().err.splitlines()
    assert message in told
