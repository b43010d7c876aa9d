"""Talking with a policy: turns, streaming, score and KL, what does not fit, and what a terminal must not be sent."""

import io
import json
from pathlib import Path

import pytest
import tiny_runs
import torch
from refusals import refusal
from tiny_runs import STOPS
from transformers import GenerationConfig

from ppo_rlhf import chat as chat_module
from ppo_rlhf.chat import Chat, load_chat, settings_of
from ppo_rlhf.cli import main
from ppo_rlhf.cli.chat import Terminal
from ppo_rlhf.config import PPOConfig
from ppo_rlhf.data import load_rows
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy
from ppo_rlhf.policy import response_logprobs
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.sampling import sample
from ppo_rlhf.settings import LoRASettings, OptimizerSettings, SamplingSettings
from ppo_rlhf.train import ppo

TEMPLATE = (  # short, for a context of 64 tokens
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}!{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
SHORT = SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS)


@pytest.fixture
def talk(monkeypatch, capsys):
    """`ppo-rlhf chat …` with these lines as its input; → its exit code, its output, its errors."""

    def run(*words, lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = main(["chat", *words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def run(models, data, tmp_path_factory):
    """The folder of a short PPO run, whose reward is the length of a response."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "reward.py").write_text(tiny_runs.USER_FUNCTIONS)
    config = PPOConfig(
        policy=models["gpt2"],
        prompts=data["prompts"],
        reward=f"{folder}/reward.py:length",
        output_dir=str(folder / "run"),
        num_steps=2,
        batch_size=8,
        eval_every=0,
        save_every=0,
        log_with=(),
        sampling=SHORT,
        optimizer=OptimizerSettings(lr=1e-2),
    )
    ppo.train(config)
    return str(folder / "run")


def chatting(models, *, template=None, settings=SHORT, **options):
    model, tokenizer = load_policy(models["gpt2"], setting="chat")
    tokenizer.chat_template = template
    return Chat(model, tokenizer, settings, **options)


def said(chat, text):
    return "".join(chat.answer(text))


# ---------------------------------------------------------------------------------------------------- the dialogue


def test_an_answer_is_what_the_sampler_says_to_the_same_tokens_and_noise(models):
    chat = chatting(models, seed=3)
    pieces = list(chat.answer("red fish"))
    noise = torch.rand(1, 6, generator=torch.Generator().manual_seed(3))
    prompts = batch_of(chat, "red fish")
    expected = sample(chat.model, chat.tokenizer, prompts, SHORT, noise)
    (turn,) = chat.turns
    assert "".join(pieces) == turn.answer == expected.texts[0]
    assert turn.answer_ids == expected.ids[0][expected.mask[0]].tolist()
    assert turn.finished == expected.finished[0]


def batch_of(chat, text):
    return Prompts([{"prompt": text}], chat.tokenizer, longest=50, setting="test").batch([0], torch.device("cpu"))


def test_with_a_chat_template_the_policy_reads_all_turns_as_a_conversation(models):
    chat = chatting(models, template=TEMPLATE, system="be")
    first, second = said(chat, "hi"), said(chat, "so")
    assert chat.turns[1].prompt == f"s:be!u:hi!a:{first}!u:so!a:"
    assert chat.turns[1].prompt_ids == chat.tokenizer(chat.turns[1].prompt)["input_ids"]
    assert second == chat.turns[1].answer


def test_without_a_template_the_text_goes_on_and_a_single_turn_stands_alone(models):
    chat = chatting(models)
    first = said(chat, "red fish")
    said(chat, "blue")
    assert chat.turns[1].prompt == f"red fish\n{first}\nblue"
    chat.keep_history = False
    said(chat, "old")
    assert chat.turns[2].prompt == "old"


def test_turns_that_no_longer_fit_are_left_out_whole_the_oldest_first(models):
    settings = SamplingSettings(max_new_tokens=20, stop_token_ids=STOPS)
    chat = chatting(models, settings=settings)
    forgotten = []
    for _ in range(8):
        said(chat, "a small bright stone")
        forgotten.append(chat.num_forgotten)
        assert len(chat.turns[-1].prompt_ids) <= tiny_runs.CONTEXT - 20
        assert chat.turns[-1].prompt.startswith("a small bright stone")
    assert forgotten[0] == 0
    assert forgotten == sorted(forgotten)
    assert 0 < forgotten[-1] < 8


def test_a_line_that_alone_does_not_fit_is_refused_and_leaves_no_turn(models):
    chat = chatting(models)
    with pytest.raises(UserError, match=r"that is \d+ tokens; 58 fit beside an answer"):
        said(chat, "stone " * 60)
    assert chat.turns == []


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(models):
    chat = chatting(models, settings=SamplingSettings(max_new_tokens=20, stop_token_ids=(299,)))
    pieces = chat.answer("red fish")
    begun = next(pieces)
    pieces.close()
    (turn,) = chat.turns
    assert turn.answer.startswith(begun)
    assert len(turn.answer_ids) < 20
    assert not turn.finished


def test_another_answer_takes_the_place_of_the_last_one(models):
    chat = chatting(models)
    said(chat, "old")
    first = said(chat, "red fish")
    others = ["".join(chat.regenerate()) for _ in range(4)]
    assert set(others) != {first}
    assert [turn.said for turn in chat.turns] == ["old", "red fish"]
    assert chat.turns[1].answer == others[-1]
    chat.regenerate().close()
    with pytest.raises(UserError, match="there is no answer yet"):
        next(chatting(models).regenerate())


def test_the_settings_are_the_run_s_else_those_of_the_generation_config(run, models):
    chat, _ = load_chat(run, sampling={"temperature": 0.5})
    assert chat.settings == SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS, temperature=0.5)
    assert load_chat(f"{run}/policy", sampling={})[0].settings == SHORT
    model, _ = load_policy(models["gpt2"], setting="chat")
    model.generation_config = GenerationConfig(temperature=0.7, top_k=5, top_p=0.9, eos_token_id=[3, 4])
    expected = SamplingSettings(max_new_tokens=32, temperature=0.7, top_k=5, top_p=0.9, stop_token_ids=(3, 4))
    assert settings_of(model) == expected


# -------------------------------------------------------------------------------------------- what answers are worth


def test_answers_are_scored_by_the_run_s_reward_and_measured_to_where_it_started(run, models):
    chat, judge = load_chat(run, sampling={})
    said(chat, "red fish")
    (turn,) = chat.turns
    assert judge.score(turn) == pytest.approx(len(turn.answer) / 10)
    start, _ = load_policy(models["gpt2"], setting="test")
    inputs = {
        "prompt_ids": torch.tensor([turn.prompt_ids]),
        "prompt_mask": torch.ones(1, len(turn.prompt_ids), dtype=torch.bool),
        "response_ids": torch.tensor([turn.answer_ids]),
        "response_mask": torch.ones(1, len(turn.answer_ids), dtype=torch.bool),
    }
    with torch.no_grad():
        policy, reference = (response_logprobs(model, inputs, temperature=1.0).sum() for model in (chat.model, start))
    assert judge.kl(turn) == pytest.approx(float(policy - reference), abs=1e-5)
    assert abs(judge.kl(turn)) > 1e-3
    chat, judge = load_chat(run, sampling={}, reference=f"{run}/policy", reward="user.py:vowels")
    said(chat, "red fish")
    assert judge.kl(chat.turns[0]) == 0
    assert judge.score(chat.turns[0]) == sum(letter in "aeiou" for letter in chat.turns[0].answer)


def test_a_reward_is_given_the_conversation(models):
    Path("judge.py").write_text(
        "def turns(prompts, responses, *, messages, **columns):\n    return [len(each) for each in messages]\n"
    )
    chat = chatting(models, template=TEMPLATE)
    judge = chat_module.Judge(chat, reward="judge.py:turns", reference=None)
    said(chat, "hi")
    said(chat, "so")
    assert [judge.score(turn) for turn in chat.turns] == [1.0, 3.0]


def test_the_policy_of_a_run_with_an_adapter_talks_and_is_measured(models, data, talk):
    settings = {"lora": LoRASettings(rank=2, merge=False), "num_steps": 1, "reward": "user.py:length"}
    ppo.train(tiny_runs.ppo_config(models, prompts=data["prompts"], **settings))
    code, out, _ = talk("run", "--show", "kl", lines=["red fish"])
    assert code == 0
    assert "[KL " in out


# ---------------------------------------------------------------------------------------------------- the terminal


def test_each_line_of_the_input_is_a_turn_or_a_command(run, talk):
    lines = ["red fish", "", "/score", "/temperature 0.5", "blue", "/kl", "/save talk.jsonl", "/help", "/quit", "old"]
    code, out, _ = talk(run, lines=lines)
    assert code == 0
    assert "no chat template" in out
    assert out.count("[score ") == 3  # of the first answer when asked for, of the second, and beside its KL
    assert "nats, " in out
    (row,) = load_rows("talk.jsonl", required=("messages",), setting="test")
    assert [message["content"] for message in row["messages"]][::2] == ["red fish", "blue"]
    assert all(f"/{name}" in out for name in ("reset", "regenerate", "system", "temperature", "save", "kl", "quit"))


def test_json_is_one_object_with_all_turns_and_nothing_else(run, talk):
    words = ["--json", "--show", "score,kl", "--single-turn"]
    code, out, err = talk(run, *words, lines=["red fish", "/nothing", "blue"])
    assert code == 0
    assert err == "error: there is no command /nothing. /help tells them.\n"
    told = tiny_runs.strict(out)
    assert [turn["said"] for turn in told["turns"]] == ["red fish", "blue"]
    for turn in told["turns"]:
        assert turn["score"] == pytest.approx(len(turn["answer"]) / 10)
        assert turn.keys() == {"said", "answer", "finished", "score", "kl"}


def test_what_was_said_is_printed_also_where_a_reward_fails(run, talk):
    Path("choosy.py").write_text(
        "def choosy(prompts, responses, **columns):\n"
        "    if 'blue' in prompts[0]:\n        raise ValueError('too blue')\n    return [1.0]\n"
    )
    words = ["--json", "--show", "score", "--single-turn", "--reward", "choosy.py:choosy"]
    code, out, err = talk(run, *words, lines=["red fish", "blue", "old"])
    assert code == 2
    assert err == "error: reward function choosy raised ValueError: too blue\n"
    turns = tiny_runs.strict(out)["turns"]
    assert [(turn["said"], turn.get("score")) for turn in turns] == [("red fish", 1.0), ("blue", None), ("old", None)]
    assert all(turn["answer"] for turn in turns)


def test_the_same_seed_gives_the_same_answers(run, talk):
    one, same, other = (talk(run, "--json", "--seed", seed, lines=["red fish", "blue"])[1] for seed in "001")
    assert one == same != other


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sore", "there is no command /sore. Did you mean score?"),
        ("/regenerate", "there is no answer yet"),
        ("/system be brief", "there is no place for a system message"),
        ("/temperature hot", "/temperature takes a number, not 'hot'"),
        ("/temperature 0", "temperature=0.0 must be above 0"),
        ("/save", "/save takes the name of a file"),
        ("/save user.py", "user.py exists already"),
        ("/save no/where", "no/where cannot be written: No such file or directory"),
        ("/score", "there is no reward to score by: no run names one; start with --reward"),
        ("/kl", "there is no reference to measure KL to"),
        ("stone " * 60, "fit beside an answer: say less"),
    ],
)
def test_a_mistake_in_the_dialogue_is_told_and_the_dialogue_goes_on(line, message, models, talk):
    code, out, _ = talk(models["gpt2"], "--max-new-tokens", "4", lines=[line, "red fish", "/save end"])
    assert code == 0
    assert f"error: {message}" in out or (message in out and "error: " in out)
    assert len(json.loads(Path("end").read_text())["messages"]) == 2


def test_ctrl_c_stops_the_answer_and_not_the_program(models, capsys, monkeypatch):
    chat = chatting(models, settings=SamplingSettings(max_new_tokens=20, stop_token_ids=(299,)))
    terminal = Terminal(chat, chat_module.Judge(chat, reward=None, reference=None), quiet=False)
    tell, drawn = terminal.tell, []

    def interrupted(text, end="\n"):
        tell(text, end)
        drawn.append(text)
        if len(drawn) == 4:  # in the first answer, after two lines of greeting
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "tell", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("red fish\nblue\n"))
    terminal.talk()
    assert "(stopped)" in capsys.readouterr().out
    first, second = chat.turns
    assert len(first.answer_ids) < 20 == len(second.answer_ids)


def test_ctrl_c_where_nothing_is_being_said_tells_how_to_leave(models, capsys, monkeypatch):
    chat = chatting(models)
    keys = iter([KeyboardInterrupt, EOFError])

    def pressed(prompt):
        raise next(keys)

    monkeypatch.setattr("builtins.input", pressed)
    Terminal(chat, chat_module.Judge(chat, reward=None, reference=None), quiet=False).talk()
    assert "/quit or Ctrl-D leaves" in capsys.readouterr().out


def test_what_would_move_the_cursor_is_shown_and_not_sent(models, capsys):
    terminal = Terminal(chatting(models), None, quiet=False)
    terminal.tell("a\x1b[2J\x07b\r\x9b1mc\x7f\u202ed\te\nf")
    assert capsys.readouterr().out == "a␛[2J␇b␍\ufffd1mc\ufffd\ufffdd\te\nf\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "chat: there is no folder nowhere/at/all"),
        (["{model}", "--show", "scores"], "--show scores is neither score nor kl. Did you mean score?"),
        (["{model}", "--show", "score"], "no run names one; start with --reward"),
        (["{model}", "--show", "score", "--reward", "user.py:nothing"], "user.py has no nothing"),
        (["{model}", "--show", "kl", "--reference", "nowhere/at/all"], "reference: there is no folder nowhere/at/all"),
        (["{model}", "--temperature", "0"], "sampling.temperature=0.0 must be above 0"),
        (["{model}", "--system", "be brief"], "no chat template, so there is no place for a system message"),
    ],
)
def test_what_is_wrong_with_the_command_is_told_in_one_line(words, message, models, capfd):
    assert message in refusal(main, ["chat", *(word.format(model=models["gpt2"]) for word in words)], capfd)
