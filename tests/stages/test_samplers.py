"""Samplers of one's own, such as a vLLM server: what they return is trained on, by the policy's log-probabilities."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from test_overlap import config_of
from tiny_runs import STOPS, metrics_of, without_times
from transformers import AutoModelForCausalLM

from ppo_rlhf.cli import main
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.sampling import Responses, sample
from ppo_rlhf.settings import Extension, SamplingSettings
from ppo_rlhf.train import ppo
from ppo_rlhf.vllm_sampler import VLLMSampler

DIFFERENCE = "sampler/logprob_difference"
CPU = torch.device("cpu")


def rows_without(name, folder):
    return [{key: value for key, value in row.items() if key != name} for row in without_times(metrics_of(folder))]


# ------------------------------------------------------------------------------------------------- a function


def test_the_run_s_own_sampler_tells_the_log_probabilities_that_are_trained_on(models, data):
    ppo.train(config_of(models, data))
    assert max(row[DIFFERENCE] for row in metrics_of("out")[1:]) < 1e-5


def test_log_probabilities_that_a_sampler_tells_are_compared_and_never_trained_on(models, data):
    def lying(*arguments, **options):
        responses = sample(*arguments, **options)
        return replace(responses, logprobs=responses.logprobs - 2.5)

    def silent(*arguments, **options):
        return replace(sample(*arguments, **options), logprobs=None)

    ppo.train(config_of(models, data, "honest"))
    ppo.train(config_of(models, data, "lying"), sampler=lying)
    ppo.train(config_of(models, data, "silent"), sampler=silent)
    assert [row[DIFFERENCE] for row in metrics_of("lying")[1:]] == pytest.approx([2.5] * 3, abs=1e-4)
    assert all(DIFFERENCE not in row for row in metrics_of("silent"))
    assert rows_without(DIFFERENCE, "lying") == rows_without(DIFFERENCE, "honest") == rows_without(DIFFERENCE, "silent")


@pytest.mark.parametrize("changes", [{"overlap_scoring": 2}, {"sample_ahead": True}], ids=str)
def test_a_sampler_may_leave_scoring_to_come_later_and_log_probabilities_out(changes, models, data):
    def plain(language_model, tokenizer, prompts, settings, noise, **scoring):
        return replace(sample(language_model, tokenizer, prompts, settings, noise), logprobs=None)

    ppo.train(config_of(models, data, "own", save_every=2, **changes))
    ppo.train(config_of(models, data, "other", save_every=2, **changes), sampler=plain)
    assert rows_without(DIFFERENCE, "other") == rows_without(DIFFERENCE, "own")


SAMPLERS = """
from dataclasses import replace
from ppo_rlhf.sampling import sample

def first_token(*arguments, stop=False, **options):
    responses = sample(*arguments, **options)
    return replace(responses, ids=responses.ids[:, :1], mask=responses.mask[:, :1], logprobs=responses.logprobs[:, :1])

def texts(language_model, tokenizer, prompts, *rest, **options):
    return prompts.texts

def one(*arguments, **options):
    responses = sample(*arguments, **options)
    return replace(responses, ids=responses.ids[:1], mask=responses.mask[:1], texts=responses.texts[:1])

def nothing(*arguments, **options):
    responses = sample(*arguments, **options)
    return replace(responses, mask=responses.mask & False)

def flat(*arguments, **options):
    responses = sample(*arguments, **options)
    return replace(responses, logprobs=responses.logprobs.sum(1))

def twice(*arguments, on_finished, **options):
    responses = sample(*arguments, **options)
    on_finished([0], replace(responses, ids=responses.ids[:1], mask=responses.mask[:1]))
    on_finished(list(range(len(responses.ids))), responses)
    return responses

number = 3
"""


def test_a_configuration_names_its_sampler_and_the_arguments_and_says_so_again(models, data):
    Path("samplers.py").write_text(SAMPLERS)
    Path("ppo.yaml").write_text(yaml.safe_dump({"sampler": {"name": "samplers.py:first_token"}}))
    stops = json.dumps(STOPS).replace(" ", "")
    words = f"ppo --config ppo.yaml --policy {models['gpt2']} --prompts {data['prompts']} --reward user.py:length"
    words += (
        f" --batch_size 8 --num_steps 1 --log_with [] --sampling.max_new_tokens 6 --sampling.stop_token_ids {stops}"
    )
    assert main([*words.split(), "--output-dir", "out"]) == 0
    assert metrics_of("out")[1]["response/length"] == 1
    assert main(["ppo", "--config", "out/config.yaml", "--output-dir", "again"]) == 0
    assert metrics_of("again")[1]["response/length"] == 1
    assert main([*words.split(), "--sampler", "ppo_rlhf.sampling:sample", "--output-dir", "own"]) == 0
    assert metrics_of("own")[1]["response/length"] > 1


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("samplers.py:firsttoken", "has no firsttoken. Did you mean first_token"),
        ("samplers.py:number", "samplers.py:number is not a function, but int"),
        ("vllm", "sampler: vllm is not module:function"),
        (Extension("samplers.py:first_token", {"halt": True}), "names no argument 'halt'"),
        (Extension("http://localhost:1", {"concurency": 2}), "no argument 'concurency'. Did you mean concurrency"),
        (Extension("http://localhost:1", {"concurrency": 0}), "concurrency=0 must be at least 1"),
        (Extension("http://localhost:1", {"timeout": -1}), "timeout=-1 must be above 0"),
        (Extension("http://localhost:1", {"weights_folder": "nowhere"}), "there is no folder weights_folder=nowhere"),
    ],
    ids=str,
)
def test_a_sampler_that_cannot_be_had_is_refused_before_anything_is_written(sampler, message, models, data):
    Path("samplers.py").write_text(SAMPLERS)
    with pytest.raises(UserError, match=message):
        ppo.train(config_of(models, data, sampler=sampler))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("texts", "the sampler must return ppo_rlhf.sampling.Responses, not list"),
        ("one", "the sampler returned 1 responses to 8 prompts"),
        ("flat", r"the sampler's logprobs must be a tensor of shape \(8, \d\), \(B, T\), not \(8,\)"),
        ("twice", "told on_finished of 9 rows, 8 different ones; it must tell of each of the 8 once, or of none"),
        ("nothing", "mask must be True from each response's first token through its last"),
    ],
)
def test_what_is_no_response_to_each_prompt_is_refused(name, message, models, data):
    Path("samplers.py").write_text(SAMPLERS)
    with pytest.raises(UserError, match=message):
        ppo.train(config_of(models, data, sampler=f"samplers.py:{name}", overlap_scoring=2))


# ------------------------------------------------------------------------------------------------- a vLLM server

ASKED = {  # all that a completion is asked with, and of what type
    "prompt": list,
    "seed": int,
    "n": int,
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "stop": list,
    "include_stop_str_in_output": bool,
    "stop_token_ids": list,
    "ignore_eos": bool,
    "logprobs": int,
    "return_tokens_as_token_ids": bool,
}


class Server(ThreadingHTTPServer):
    """The part of vLLM's API that is used, by a model of transformers on this machine, a token at a time."""

    model = None
    deaf = False  # answers that it has new weights, and keeps the old ones

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.reset, self.answer = [], 0, None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def reload(self, body):
        assert body["method"] == "reload_weights"
        if not self.deaf or self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"], dtype=torch.float32)

    @torch.no_grad()
    def complete(self, asked):
        assert {name: type(value) for name, value in asked.items()} == ASKED
        generator = torch.Generator().manual_seed(asked["seed"])
        ids, logprobs, reason = [], [], "length"
        for _ in range(asked["max_tokens"]):
            logits = self.model(torch.tensor([asked["prompt"] + ids])).logits[0, -1] / asked["temperature"]
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
            if ids[-1] in asked["stop_token_ids"]:
                reason = "stop"
                break
        told = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": logprobs}
        return {"choices": [{"index": 0, "text": "", "finish_reason": reason, "logprobs": told}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/health"
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = {}
        if self.path == "/collective_rpc":
            self.server.reload(body)
        elif self.path == "/reset_prefix_cache":
            self.server.reset += 1
        else:
            assert self.path == "/v1/completions"
            self.server.asked.append(body)
            answer = self.server.answer or self.server.complete(body)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    httpd = Server()
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_server_samples_from_the_policy_as_it_is_at_each_step(server, models, data):
    settings = SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS, temperature=0.7)
    ppo.train(config_of(models, data, sampler=server.url, sampling=settings))
    rows = metrics_of("out")[1:]
    assert max(row[DIFFERENCE] for row in rows) < 1e-5
    assert max(row["policy/first_kl"] for row in rows) < 1e-8
    assert server.reset == 3
    assert len(server.asked) == 24
    assert {asked["temperature"] for asked in server.asked} == {0.7}


def test_a_server_that_keeps_old_weights_shows_in_the_difference_and_not_in_the_first_ratio(server, models, data):
    server.deaf = True
    ppo.train(config_of(models, data, sampler=server.url))
    rows = metrics_of("out")[1:]
    assert rows[0][DIFFERENCE] < 1e-5 < 0.05 < rows[2][DIFFERENCE]
    assert max(row["policy/first_kl"] for row in rows) < 1e-8


def responses_from(server, policy, *, prompts, noise, settings=None, **options):
    model, tokenizer = load_policy(policy, setting="policy")
    batch = Prompts([{"prompt": text} for text in prompts], tokenizer, longest=50, setting="prompts")
    batch = batch.batch(range(len(prompts)), CPU)
    settings = settings or SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS)
    sampler = VLLMSampler(server.url, pause=0.001)
    return sampler(model, tokenizer, batch, settings, noise, **options)


def test_a_row_s_response_depends_on_its_prompt_and_noise_alone(server, models):
    noise = torch.tensor([[0.1], [0.2], [0.1], [0.1]])
    prompts = ["red fish", "red fish", "red fish", "a blue bird:"]
    found = responses_from(server, models["gpt2"], prompts=prompts, noise=noise)
    turned = responses_from(server, models["gpt2"], prompts=prompts[::-1], noise=noise.flip(0))
    assert found.texts == turned.texts[::-1]
    assert found.texts[0] == found.texts[2] != found.texts[1]


def test_a_response_ends_with_its_stop_token_or_is_cut_off(server, models):
    found = responses_from(server, models["gpt2"], prompts=["red"] * 16, noise=torch.rand(16, 1))
    assert 0 < found.finished.sum() < 16
    for ids, mask, finished in zip(found.ids, found.mask, found.finished, strict=True):
        kept = ids[mask].tolist()
        assert (kept[-1] in STOPS) == finished
        assert finished or len(kept) == 6
        assert not set(kept[:-1]) & set(STOPS)


def test_the_server_is_told_the_settings_and_the_ids_without_padding(server, models):
    settings = SamplingSettings(max_new_tokens=4, temperature=0.5, top_k=7, top_p=0.9, stop_strings=("!", "\n"))
    prompts = ["red", "a long way to the river"]
    responses_from(server, models["gpt2"], prompts=prompts, noise=torch.tensor([[0.0], [0.5]]), settings=settings)
    _, tokenizer = load_policy(models["gpt2"], setting="policy")
    asked = sorted(server.asked, key=lambda each: len(each["prompt"]))
    assert [each["prompt"] for each in asked] == [tokenizer(text)["input_ids"] for text in prompts]
    assert [each["seed"] for each in asked] == [0, 2**30]
    expected = {"max_tokens": 4, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "stop": ["!", "\n"]}
    assert expected.items() <= asked[0].items()
    assert asked[0]["stop_token_ids"] == [tokenizer.eos_token_id]


def test_groups_of_a_server_s_responses_are_handed_on_while_others_are_sampled(server, models):
    groups = []
    prompts, noise = ["red", "blue", "green", "small", "old"], torch.rand(5, 1)
    found = responses_from(
        server,
        models["gpt2"],
        prompts=prompts,
        noise=noise,
        on_finished=lambda rows, responses: groups.append((rows, responses.texts)),
        group_size=2,
    )
    assert [rows for rows, _ in groups] == [[0, 1], [2, 3], [4]]
    assert [text for _, texts in groups for text in texts] == found.texts
    assert isinstance(found, Responses)


def choice(tokens, logprobs, reason="stop"):
    return {"choices": [{"finish_reason": reason, "logprobs": {"tokens": tokens, "token_logprobs": logprobs}}]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"object": "error"}, 'answered no token ids, but {"object": "error"}'),
        (choice([" red", " fish"], [-1.0, -1.0]), "answered no token ids, but"),
        (choice(["token_id:5"], [None]), "answered no token ids, but"),
        (choice(["token_id:5"], [-1.0, -1.0]), "answered 1 tokens with 2 log-probabilities, of 6 at most"),
        (choice([], []), "answered 0 tokens with 0 log-probabilities"),
        (choice(["token_id:5"] * 7, [-1.0] * 7), "answered 7 tokens with 7 log-probabilities, of 6 at most"),
    ],
    ids=["error", "texts", "null", "counts", "nothing", "too many"],
)
def test_an_answer_without_the_ids_of_a_response_is_told_in_one_line(answer, message, server, models):
    server.answer = answer
    with pytest.raises(UserError, match=message):
        responses_from(server, models["gpt2"], prompts=["red"], noise=torch.zeros(1, 1))


def test_a_server_that_is_not_there_is_told_before_anything_is_written(models, data):
    sampler = Extension("http://127.0.0.1:9", {"retries": 1, "pause": 0.001})
    message = r"sampler http://127.0.0.1:9 gave no sign of health in 2 attempts; the last: ConnectError"
    with pytest.raises(UserError, match=message):
        ppo.train(config_of(models, data, sampler=sampler))
    assert not Path("out").exists()
