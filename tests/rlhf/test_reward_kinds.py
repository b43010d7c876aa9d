"""Every kind of reward gives the scores that it should: async, dense, sums, ensembles, servers, verifiers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import language_cases as cases
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ppo_rlhf.errors import UserError
from ppo_rlhf.reward_settings import RewardPart
from ppo_rlhf.rewards import (
    Ensemble,
    HTTPReward,
    RewardModel,
    Weighted,
    WeightedSum,
    arithmetic,
    exact_match,
    json_schema,
    load_reward,
    models_in,
    regular_expression,
    score,
)
from ppo_rlhf.train.reward_model import classifier_from

PROMPTS, RESPONSES = ["p", "q"], ["ab", "abcd"]
TOKENS = [["a", "b"], ["ab", "c", "d"]]


def length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def letter_a(prompts, responses, *, wanted="a", **columns):
    return [float(wanted in response) for response in responses]


def token_lengths(prompts, responses, *, response_tokens, **columns):
    return [[float(len(token)) for token in tokens] for tokens in response_tokens]


def scored(reward, **columns):
    return score(reward, PROMPTS, RESPONSES, columns, response_tokens=TOKENS)


# ---------------------------------------------------------------------------------------------------- async and dense


def test_an_async_function_is_waited_for_its_calls_going_on_at_once():
    running = []

    async def judged(text):
        running.append(text)
        while len(running) < 2:  # for ever, were they called in turn
            await asyncio.sleep(0)
        return float(len(text))

    async def judge(prompts, responses, **columns):
        return await asyncio.gather(*map(judged, responses))

    assert scored(judge).total.tolist() == [2.0, 4.0]


def test_an_async_function_is_waited_for_where_an_event_loop_runs_already():
    async def judge(prompts, responses, **columns):
        return [0.5, 1.5]

    async def notebook():
        return scored(judge)

    assert asyncio.run(notebook()).total.tolist() == [0.5, 1.5]


def test_what_an_async_function_raises_is_told_by_name():
    async def judge(prompts, responses, **columns):
        raise TimeoutError("no quota")

    with pytest.raises(UserError, match="reward function judge raised TimeoutError: no quota"):
        scored(judge)


def test_a_dense_reward_is_given_the_tokens_and_pays_each_its_number():
    scores = scored(token_lengths)
    assert scores.dense.tolist() == [[1.0, 1.0, 0.0], [2.0, 1.0, 1.0]]
    assert scores.total.tolist() == [2.0, 4.0]


def test_a_function_that_names_the_tokens_may_answer_with_one_number_a_response():
    def count(prompts, responses, *, response_tokens, **columns):
        return [len(tokens) for tokens in response_tokens]

    scores = scored(count)
    assert scores.total.tolist() == [2.0, 3.0]
    assert scores.dense is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[1.0], [1.0, 2.0, 3.0]], "fixed returned 1 numbers for the 2 tokens of response 'ab'"),
        ([[1.0, 2.0]], "fixed returned 1 scores for 2 responses"),
        ([[1.0, 2.0], 3.0], "fixed must return numbers"),
        ([[1.0, None], [1.0, 2.0, 3.0]], "fixed must return numbers"),
        ([[1.0, float("nan")], [1.0, 2.0, 3.0]], "fixed returned nan for prompt 'p'"),
    ],
    ids=str,
)
def test_a_dense_answer_that_does_not_fit_the_tokens_is_refused(answer, message):
    def fixed(prompts, responses, *, response_tokens, **columns):
        return answer

    with pytest.raises(UserError, match=message):
        scored(fixed)


# ---------------------------------------------------------------------------------------------------- sums, ensembles


def test_a_weighted_sum_adds_scores_and_dense_rewards_and_logs_its_parts_unweighted():
    parts = [Weighted("tokens", token_lengths, 0.5), Weighted("length", length), Weighted("a", letter_a, -2.0)]
    scores = scored(WeightedSum(parts))
    # 0.5·2 + 2 − 2 and 0.5·4 + 4 − 2
    assert scores.total.tolist() == [1.0, 4.0]
    assert scores.dense.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.5, 0.5]]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "tokens": [2.0, 4.0],
        "length": [2.0, 4.0],
        "a": [1.0, 1.0],
    }


@pytest.mark.parametrize(("rule", "expected"), [("mean", [2.0, 5.0]), ("min", [1.0, 2.0]), ("lower_bound", [1.5, 3.5])])
def test_an_ensemble_makes_one_score_of_its_members(rule, expected):
    def one(prompts, responses, **columns):
        return [1.0, 2.0]

    def other(prompts, responses, **columns):
        return [3.0, 8.0]

    scores = scored(Ensemble([one, other], rule=rule, deviations=0.5))  # standard deviations 1 and 3
    assert scores.total.tolist() == expected
    assert scores.parts["mean"].tolist() == [2.0, 5.0]
    assert scores.parts["std"].tolist() == [1.0, 3.0]


def test_a_part_that_returns_what_is_not_finite_is_named():
    def broken(prompts, responses, **columns):
        return [1.0, float("inf")]

    with pytest.raises(UserError, match="reward function broken returned inf for prompt 'q', response 'abcd'"):
        scored(WeightedSum([Weighted("length", length), Weighted("broken", broken)]))


def test_parts_of_one_name_are_refused():
    with pytest.raises(UserError, match="two parts are called 'length'; give each a name"):
        WeightedSum([Weighted("length", length), Weighted("length", letter_a)])


# ---------------------------------------------------------------------------------------------------- loading parts


def test_parts_are_loaded_with_their_weights_names_and_arguments():
    parts = (
        RewardPart("test_reward_kinds:length", weight=0.5),
        RewardPart("test_reward_kinds:letter_a", name="c", arguments={"wanted": "c"}),
        RewardPart(("test_reward_kinds:length", "test_reward_kinds:letter_a"), ensemble="min"),
    )
    scores = scored(load_reward(parts, setting="reward"))
    # 0.5·2 + 0 + 1 and 0.5·4 + 1 + 1
    assert scores.total.tolist() == [2.0, 4.0]
    assert list(scores.parts) == ["length", "c", "ensemble", "ensemble/mean", "ensemble/std"]


class Counting:
    """A reward with a state of its own."""

    def __init__(self, start=0):
        self.count = start

    def __call__(self, prompts, responses, **columns):
        self.count += 1
        return [self.count] * len(responses)


def test_a_class_is_made_once_with_the_arguments():
    reward = load_reward((RewardPart("test_reward_kinds:Counting", arguments={"start": 4}),), setting="reward")
    assert scored(reward).total.tolist() == [5.0, 5.0]
    assert scored(reward).parts == {"Counting": pytest.approx(torch.tensor([6.0, 6.0]))}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (("test_reward_kinds:letter_a", {"wnated": "c"}), "names no argument 'wnated'. Did you mean wanted"),
        (("http://localhost/score", {"retrys": 1}), "names no argument 'retrys'. Did you mean retries"),
        (("./nowhere/model", {"templat": True}), "names no argument 'templat'"),
        (("http://localhost/score", {"timeout": 0}), "timeout=0 must be above 0"),
        (("http://localhost/score", {"batch_size": 0}), "batch_size=0 must be at least 1"),
    ],
    ids=str,
)
def test_an_argument_that_nothing_would_read_is_refused(part, message):
    source, arguments = part
    with pytest.raises(UserError, match=message):
        load_reward((RewardPart(source, arguments=arguments),), setting="reward")


# ---------------------------------------------------------------------------------------------------- reward models

TEMPLATE = "{% for m in messages %}{{ m['role'][0] + '.' + m['content'] + '!' }}{% endfor %}"


def test_a_reward_model_puts_prompt_and_response_into_its_own_chat_template(tmp_path):
    tokenizer = cases.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    RewardModel(classifier_from(cases.make_model()), tokenizer).save(tmp_path / "model")
    part = RewardPart(str(tmp_path / "model"), arguments={"chat_template": True})
    reward = load_reward((part,), setting="reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    expected = [
        plain(torch.tensor([tokenizer(f"u.{prompt}!a.{response}!")["input_ids"]])).logits.item()
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert scored(reward).total.tolist() == pytest.approx(expected, abs=1e-5)
    (model,) = models_in(reward)
    assert model.encode(["the sea " * 60], ["go"])[0] == model.encode(["the sea " * 60], ["go"])[0][-cases.CONTEXT :]


def test_a_reward_model_reads_the_conversation_that_a_prompt_was_made_of():
    tokenizer = cases.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = RewardModel(classifier_from(cases.make_model()), tokenizer, chat_template=True)
    messages = [[{"role": "system", "content": "go"}, {"role": "user", "content": prompt}] for prompt in PROMPTS]
    rendered = [f"s.go!u.{prompt}!a.{response}!" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    expected = model.raw_scores([tokenizer(text)["input_ids"] for text in rendered])
    assert model(PROMPTS, RESPONSES, messages=messages).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert model(PROMPTS, RESPONSES).tolist() != pytest.approx(expected.tolist(), abs=1e-3)


def test_a_chat_template_that_is_not_there_is_told():
    with pytest.raises(UserError, match="has no chat template"):
        RewardModel(classifier_from(cases.make_model()), cases.make_tokenizer(), chat_template=True)


# ---------------------------------------------------------------------------------------------------- a server


@pytest.fixture
def server():
    """A scorer on this machine: the length of each response, after the failures that it is told to have first."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((asked, dict(self.headers)))
            failure = self.server.failures.pop(0) if self.server.failures else None
            if failure == "hang":
                time.sleep(0.5)
            answer = json.dumps({"scores": [len(text) for text in asked["responses"]]})
            status, text = failure if isinstance(failure, tuple) else (200, answer)
            if failure == "close":
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.failures = [], []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/score"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_server_is_asked_in_batches_and_its_scores_keep_their_order(server):
    responses = ["x" * size for size in range(7)]
    reward = HTTPReward(server.url, batch_size=3, headers={"Authorization": "Bearer key"})
    scores = score(reward, ["p"] * 7, responses, {"topic": list("abcdefg")})
    assert scores.total.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    sizes = sorted(len(asked["responses"]) for asked, _ in server.asked)
    assert sizes == [1, 3, 3]
    first = next(asked for asked, _ in server.asked if asked["responses"][0] == "")
    assert first == {"prompts": ["p"] * 3, "responses": ["", "x", "xx"], "columns": {"topic": ["a", "b", "c"]}}
    assert all(headers["Authorization"] == "Bearer key" for _, headers in server.asked)


@pytest.mark.parametrize("failure", [(503, "busy"), (429, "slowly"), "close", "hang"], ids=str)
def test_a_request_that_fails_for_what_may_pass_is_made_again(server, failure):
    server.failures = [failure]
    reward = load_reward((RewardPart(server.url, arguments={"pause": 0.01, "timeout": 0.25}),), setting="reward")
    assert scored(reward).total.tolist() == [2.0, 4.0]
    assert len(server.asked) == 2


def test_a_server_that_stays_ill_is_told_after_the_last_attempt(server):
    server.failures = [(500, "out of\nmemory")] * 5
    with pytest.raises(UserError, match="gave no scores in 3 attempts; the last: status 500: out of memory"):
        scored(HTTPReward(server.url, retries=2, pause=0.001))
    assert len(server.asked) == 3


def test_a_request_that_the_server_refuses_is_not_made_again(server):
    server.failures = [(422, "no such column")]
    with pytest.raises(UserError, match="in 1 attempts; the last: status 422: no such column"):
        scored(HTTPReward(server.url, pause=0.001))
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_told():
    with pytest.raises(UserError, match=r"127.0.0.1:9/score gave no scores in 2 attempts; the last: ConnectError"):
        scored(HTTPReward("http://127.0.0.1:9/score", retries=1, pause=0.001))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"scores": [1]}', "answered 1 scores for 2 responses"),
        ('{"rewards": [1, 2]}', 'answered not {"scores": .numbers.}, but {"rewards": .1, 2.}'),
        ('{"scores": ["good", "bad"]}', 'answered not {"scores"'),
        ("[1, 2]", 'answered not {"scores"'),
        ("<html>", 'answered not {"scores": .numbers.}, but <html>'),
    ],
)
def test_an_answer_without_a_score_for_each_response_is_told(server, text, message):
    server.failures = [(200, text)]
    with pytest.raises(UserError, match=message):
        scored(HTTPReward(server.url))


def test_columns_that_are_not_json_cannot_be_sent(server):
    with pytest.raises(UserError, match="cannot be asked: Object of type set is not JSON serializable"):
        scored(HTTPReward(server.url), topic=[{1}, {2}])


# ---------------------------------------------------------------------------------------------------- verifiers


def verified(verifier, responses, **settings):
    return verifier(["p"] * len(responses), responses, **settings)


def test_an_exact_match_is_the_column_but_for_white_space_around_it():
    answers = ["Paris", "Paris", "Paris"]
    assert verified(exact_match, [" Paris\n", "paris", "Paris."], answer=answers) == [1.0, 0.0, 0.0]
    assert verified(exact_match, ["PARIS", "", "x"], column="city", ignore_case=True, city=answers) == [1.0, 0.0, 0.0]


def test_a_regular_expression_is_searched_for():
    assert verified(regular_expression, ["so 42.", "none"], pattern=r"\d+") == [1.0, 0.0]
    assert verified(regular_expression, ["42", "42."], pattern=r"\A\d+\Z", other=[1, 2]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so it is 72.", "72", 1),
        ("72 or 73", "72", 0),
        ("1,234.50", 1234.5, 1),
        ("1/2 is 0.5", "1 / 2", 1),
        ("= 14", "2 * (3 + 4)", 1),
        ("−14", "-(2 * 7)", 1),
        ("7-3", "3", 1),  # the last number is 3, not −3
        ("(2)-5", "5", 1),
        ("about -.5", "-0.5", 1),
        ("3e2", 300, 1),
        ("18 dollars", "She sells 9 * 2. #### 18", 1),
        ("7", "1 / 0 = 7", 1),
        ("007", "7", 1),
        ("no number", "7", 0),
        ("", "7", 0),
        ("1e99999999", "7", 0),  # no power to be computed
        ("9" * 5000, "7", 0),
    ],
)
def test_arithmetic_compares_the_last_number_exactly(response, answer, right):
    assert verified(arithmetic, [response], answer=[answer]) == [float(right)]


def test_an_answer_without_a_number_is_told():
    with pytest.raises(UserError, match="there is no number in 'many', column 'answer'"):
        verified(arithmetic, ["7"], answer=["many"])


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def test_json_must_fit_the_schema():
    responses = ['{"age": 3}', '{"age": "3"}', "{}", "[1]", '{"age": 3', ' {"age": 3, "x": 1}\n']
    assert verified(json_schema, responses, schema=SCHEMA) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    schemas = [json.dumps(SCHEMA), {"type": "array"}]
    assert verified(json_schema, ["[1]", "[1]"], column="wanted", wanted=schemas) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("verifier", "settings", "message"),
    [
        (json_schema, {"schema": {"type": "objekt"}}, "json_schema: the schema is wrong: 'objekt' is not valid"),
        (json_schema, {}, "give either schema, or the column"),
        (exact_match, {"column": "anwser", "answer": ["a"]}, "no column 'anwser', only: answer. Did you mean answer"),
        (arithmetic, {}, "no column 'answer', only: none"),
    ],
)
def test_a_verifier_without_what_it_needs_says_so(verifier, settings, message):
    with pytest.raises(UserError, match=message):
        verified(verifier, ["{}"], **settings)


def test_a_pattern_that_is_none_is_told_by_name():
    part = RewardPart("ppo_rlhf.rewards:regular_expression", arguments={"pattern": "("})
    with pytest.raises(UserError, match="reward function regular_expression raised"):
        scored(load_reward((part,), setting="reward"))
