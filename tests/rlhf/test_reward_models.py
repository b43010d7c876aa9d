"""Reward models and functions: scores that depend on the text alone, and answers that are checked."""

from __future__ import annotations

import copy
import math

import language_cases as cases
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppo_rlhf.adapters import train_adapter
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import BASE_CONFIG, load_policy, right_padded, save_policy, tokenizer_with_pad
from ppo_rlhf.rewards import RewardModel, ScoringNetwork, load_reward, score
from ppo_rlhf.settings import LoRASettings
from ppo_rlhf.train.rankings import pair_tensors, rankings_of
from ppo_rlhf.train.reward_evaluation import (
    accuracy_of,
    calibration_error,
    gold_pairs,
    held_out_metrics,
)
from ppo_rlhf.train.reward_model import classifier_from, normalize

PROMPTS = ["the cat", "why is the sea", "a", "a dog ran"]
RESPONSES = [" sat on the mat.", " so blue? go!", " dog", "!"]


def make_reward_model(architecture="gpt2", *, batch_size=64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = classifier_from(cases.make_model(architecture)).eval()
    tokenizer = tokenizer_with_pad(classifier, cases.make_tokenizer(), setting="reward")
    return RewardModel(classifier, tokenizer, batch_size=batch_size)


def lone_score(model, ids):
    """The raw score of one unpadded text: the head on the last hidden state, in float64."""
    wide = copy.deepcopy(model.classifier).double().eval()
    with torch.no_grad():
        hidden = wide.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state
        return float(wide.score(hidden[0, -1]))


# ---------------------------------------------------------------------------------------------------- the network


def test_the_score_is_the_head_on_the_last_token_of_each_text(architecture):
    model = make_reward_model(architecture)
    encoded = model.encode(PROMPTS, RESPONSES)
    expected = torch.tensor([lone_score(model, ids) for ids in encoded])
    torch.testing.assert_close(model.raw_scores(encoded), expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.05


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_changes_no_score(architecture, batch_size):
    model = make_reward_model(architecture)
    expected = model(PROMPTS, RESPONSES)
    model.batch_size = batch_size
    torch.testing.assert_close(model(PROMPTS, RESPONSES), expected, rtol=0, atol=1e-5)


@cases.every_architecture
def test_left_and_right_padding_of_any_amount_and_id_give_the_same_score(architecture):
    model = make_reward_model(architecture)
    encoded = model.encode(PROMPTS, RESPONSES)
    expected = model.raw_scores(encoded)
    for extra, pad, left in ((0, 0, False), (3, 1, False), (2, 10_000, True), (1, 0, True), (4, -1, False)):
        padded = cases._padded(encoded, "text", extra, pad, left=left)
        scores, hidden = ScoringNetwork(model.classifier)(padded["text_ids"], padded["text_mask"])
        torch.testing.assert_close(scores.detach(), expected, rtol=0, atol=2e-5)
        assert hidden.shape[:2] == padded["text_ids"].shape


def test_pad_and_eos_inside_the_prompt_do_not_move_the_place_where_the_score_is_read(architecture):
    model = make_reward_model(architecture)
    encoded = [[5, 1, 9, 0, 12, 0], [0, 7, 0], [1, 1, 8, 20, 21, 22, 0]]
    expected = torch.tensor([lone_score(model, ids) for ids in encoded])
    torch.testing.assert_close(model.raw_scores(encoded), expected, rtol=0, atol=2e-5)


def test_dropout_does_not_act_in_scoring():
    model = RewardModel(classifier_from(cases.make_model(dropout=0.5)).train(), cases.make_tokenizer())
    assert torch.equal(model(PROMPTS, RESPONSES), model(PROMPTS, RESPONSES))
    assert model.network.training


def test_autocast_changes_no_score(architecture):
    model = make_reward_model(architecture)
    expected = model(PROMPTS, RESPONSES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(PROMPTS, RESPONSES), expected)


# ---------------------------------------------------------------------------------------------------- saving


@cases.every_architecture
def test_a_saved_reward_model_scores_the_same_normalised_or_not(architecture, tmp_path):
    model = make_reward_model(architecture)
    model.save(tmp_path / "raw")
    loaded = RewardModel.load(tmp_path / "raw", setting="reward")
    torch.testing.assert_close(loaded(PROMPTS, RESPONSES), model(PROMPTS, RESPONSES), rtol=0, atol=1e-6)
    raw = model(PROMPTS, RESPONSES)
    model.set_normalization(0.75, 2.5)
    torch.testing.assert_close(model(PROMPTS, RESPONSES), (raw - 0.75) / 2.5, rtol=0, atol=1e-6)
    model.save(tmp_path / "normalised")
    loaded = RewardModel.load(tmp_path / "normalised", setting="reward")
    assert (loaded.mean, loaded.scale) == (0.75, 2.5)
    torch.testing.assert_close(loaded(PROMPTS, RESPONSES), (raw - 0.75) / 2.5, rtol=0, atol=1e-6)
    assert loaded.tokenizer.pad_token_id != loaded.tokenizer.eos_token_id
    assert (tmp_path / "raw" / "model.safetensors").is_file()


def test_plain_transformers_gives_the_raw_score(architecture, tmp_path):
    model = make_reward_model(architecture)
    model.set_normalization(0.75, 2.5)
    model.save(tmp_path)
    plain, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    encoded = model.encode(PROMPTS, RESPONSES)
    tokenizer.padding_side = "right"
    batch = tokenizer.pad({"input_ids": encoded}, return_tensors="pt")
    with torch.no_grad():
        scores = plain(**batch).logits.squeeze(-1)
    torch.testing.assert_close(scores, model.raw_scores(encoded), rtol=0, atol=2e-5)


def test_a_classifier_with_two_outputs_is_refused(tmp_path):
    config = cases.make_model().config
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reward: "):
        RewardModel.load(tmp_path, setting="reward")


@cases.every_architecture
def test_a_policy_in_place_of_a_reward_model_is_refused(architecture, tmp_path):
    save_policy(cases.make_model(architecture), cases.make_tokenizer(), tmp_path)
    with pytest.raises(UserError, match=r"reward: .* is not a reward model, score.weight .* by ppo-rlhf reward"):
        RewardModel.load(tmp_path, setting="reward")


@pytest.mark.parametrize("saved_by", ["ours", "peft"])
def test_a_policy_s_adapter_in_place_of_a_reward_model_is_refused(saved_by, tmp_path):
    save_policy(cases.make_model(), cases.make_tokenizer(), tmp_path / "base")
    policy, tokenizer = load_policy(str(tmp_path / "base"), setting="policy")
    train_adapter(policy, LoRASettings(rank=2, merge=False))
    save_policy(policy, tokenizer, tmp_path / "adapter", merge=False)
    if saved_by == "peft":
        (tmp_path / "adapter" / BASE_CONFIG).unlink()
    with pytest.raises(UserError, match=r"reward: .* a reward model"):
        RewardModel.load(tmp_path / "adapter", setting="reward")


def test_samples_that_all_score_the_same_give_a_mean_and_leave_the_scale_at_one():
    model = make_reward_model()
    raw = model(PROMPTS[:1], RESPONSES[:1])
    normalize(model, (PROMPTS[:1] * 3, RESPONSES[:1] * 3))
    assert model.scale == 1.0
    torch.testing.assert_close(model(PROMPTS, RESPONSES)[:1], torch.zeros(1), rtol=0, atol=1e-6)
    assert model.mean == pytest.approx(float(raw), abs=1e-6)


# ---------------------------------------------------------------------------------------------------- encode


def test_prompt_and_response_are_encoded_apart_and_eos_follows():
    model = make_reward_model()
    tokenizer = model.tokenizer
    for prompt, response in (("the c", "at sat"), ("go", "!"), ("why ", " is")):
        expected = [*tokenizer(prompt)["input_ids"], *tokenizer(response)["input_ids"], 0]
        assert model.encode([prompt], [response]) == [expected]
    assert tokenizer("the c")["input_ids"] + tokenizer("at")["input_ids"] != tokenizer("the cat")["input_ids"]


def test_an_empty_response_is_scored_at_its_eos():
    model = make_reward_model()
    assert model.encode(["the cat"], [""]) == [[*model.tokenizer("the cat")["input_ids"], 0]]
    assert model(["the cat"], [""]).isfinite().all()


def test_a_prompt_that_is_too_long_is_cut_at_its_beginning():
    model = make_reward_model()
    prompt, response = "z" * 30 + "the cat", "x" * 20
    encoded = model.encode([prompt], [response])[0]
    whole = [*model.tokenizer(prompt)["input_ids"], *model.tokenizer(response)["input_ids"], 0]
    assert len(encoded) == cases.CONTEXT < len(whole)
    assert encoded == whole[-cases.CONTEXT :]
    full = "x" * (cases.CONTEXT - 1)  # leaves room for eos, none for the prompt
    assert model.encode([prompt], [full]) == [[*model.tokenizer(full)["input_ids"], 0]]


def test_a_response_that_is_too_long_alone_is_refused():
    model = make_reward_model()
    with pytest.raises(UserError, match="a response of 48 tokens does not fit the reward model's 48"):
        model.encode(["the cat"], ["x" * cases.CONTEXT])


# ---------------------------------------------------------------------------------------------------- training parts


def test_the_classifier_keeps_the_policys_trunk_and_draws_a_new_head(architecture):
    policy = cases.make_model(architecture)
    config = copy.deepcopy(policy.config.to_dict())
    classifier = classifier_from(policy)
    ours, theirs = policy.base_model.state_dict(), classifier.base_model.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(ours[name].data_ptr() != theirs[name].data_ptr() for name in ours)
    assert policy.config.to_dict() == config
    torch.manual_seed(0)
    weights = torch.cat([classifier_from(policy).score.weight.detach().flatten() for _ in range(60)])
    assert float(weights.std()) == pytest.approx(1 / math.sqrt(17), rel=0.1)
    assert float(weights.mean()) == pytest.approx(0, abs=0.03)


def test_k_responses_become_all_pairs_each_with_weight_one_over_their_number():
    (ranking,) = rankings_of(
        [{"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 4, 3]}], setting="data"
    )
    assert set(ranking.pairs) == {(1, 0), (1, 3), (1, 2), (0, 3), (0, 2), (3, 2)}
    assert len(ranking.pairs) == 6
    assert ranking.weights == pytest.approx([1 / 6] * 6)


def test_ties_are_dropped_and_the_weight_stays():
    (ranking,) = rankings_of([{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}], setting="data")
    assert sorted(ranking.pairs) == [(0, 1), (0, 2)]
    assert ranking.weights == pytest.approx([1 / 3] * 2)


@pytest.mark.parametrize(("ties", "weight"), [("both", 1 / 3), ("half", 1 / 6)])
def test_a_tie_may_teach_both_orders_in_full_or_by_half(ties, weight):
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}]
    (ranking,) = rankings_of(rows, setting="data", ties=ties)
    weights = dict(zip(ranking.pairs, ranking.weights, strict=True))
    assert weights == pytest.approx({(0, 1): 1 / 3, (0, 2): 1 / 3, (1, 2): weight, (2, 1): weight})


def test_a_ranking_in_which_nothing_is_preferred_is_left_out():
    rows = [{"prompt": "p", "responses": ["a", "b"], "ranks": ranks} for ranks in ([1, 1], [2, 1])]
    assert [ranking.pairs for ranking in rankings_of(rows, setting="data")] == [[(1, 0)]]
    assert [len(ranking.pairs) for ranking in rankings_of(rows, setting="data", ties="both")] == [2, 1]


def test_a_pair_is_a_ranking_of_two_with_its_margin():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5},
        {"prompt": "q", "chosen": "c", "rejected": "d", "margin": None},
    ]
    first, second = rankings_of(rows, setting="data")
    assert (first.responses, first.pairs, first.weights, first.margin) == (["a", "b"], [(0, 1)], [1.0], 0.5)
    assert second.margin == 0.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}], "the `ranks` of every row are all equal"),
        ([{"prompt": "p", "responses": ["a"], "ranks": [1]}], "row 0: `responses` must be a list of two or more"),
        ([{"prompt": "p", "responses": ["a", "b"], "ranks": [1]}], "row 0: `ranks` must be a list of 2 numbers"),
        ([{"prompt": "p", "responses": ["a", "b"]}], "row 0: `ranks` must be a list of 2 numbers"),
        ([{"prompt": "p", "responses": ["a", 3], "ranks": [1, 2]}], "row 0: `responses` must be a list"),
        ([{"prompt": "p", "responses": ["a", "b"], "ranks": [1, None]}], "row 0: `ranks` must be a list of 2 numbers"),
        ([{"prompt": "p", "chosen": "a"}], "no column 'rejected'"),
        ([{"prompt": "p", "chosen": "a", "rejected": None}], "row 0, column 'rejected' is NoneType"),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}],
            "row 1, column 'rejected'|row 1 .*'rejected'",
        ),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"}], "row 0.*margin"),
    ],
)
def test_comparisons_that_do_not_fit_are_refused_by_name(rows, message):
    with pytest.raises(UserError, match=message):
        rankings_of(rows, setting="data")


def test_pairs_point_into_the_responses_that_stand_in_a_row():
    rankings = rankings_of(
        [
            {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]},
            {"prompt": "q", "responses": ["d", "e"], "ranks": [1, 2]},
        ],
        setting="data",
    )
    better, worse, weights, margins = pair_tensors(rankings, torch.device("cpu"))
    triples = set(zip(better.tolist(), worse.tolist(), [round(w, 6) for w in weights.tolist()], strict=True))
    assert triples == {(1, 0, 0.333333), (1, 2, 0.333333), (2, 0, 0.333333), (3, 4, 1.0)}
    assert margins.tolist() == [0.0] * 4


def test_the_loss_of_a_ranking_and_a_pair_is_the_mean_of_their_means():
    from ppo_rlhf.core import bradley_terry_loss

    rankings = rankings_of([{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}], setting="data")
    rankings += rankings_of([{"prompt": "q", "chosen": "d", "rejected": "e", "margin": 1.0}], setting="data")
    scores = torch.tensor([2.0, 1.0, 0.0, 3.0, 3.0])
    better, worse, weights, margins = pair_tensors(rankings, scores.device)
    loss = bradley_terry_loss(scores[better], scores[worse], margins, weight=weights, count=2.0)
    # −log σ(1) = 0.313262, −log σ(2) = 0.126928, −log σ(0 − 1) = 1.313262
    ranked = (0.313262 + 0.126928 + 0.313262) / 3
    assert float(loss) == pytest.approx((ranked + 1.313262) / 2, abs=1e-5)


def test_accuracy_counts_a_tie_as_half():
    assert accuracy_of(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(2.5 / 4)


def test_the_calibration_error_is_the_weighted_gap_of_confidence_and_accuracy():
    # confidences: σ(0.2) = 0.549834 (bin 0, right), σ(2) = 0.880797 (bin 7, right and wrong), σ(4) = 0.982014 (bin 9)
    differences = torch.tensor([0.2, 2.0, -2.0, 4.0])
    expected = (1 - 0.549834) / 4 + (0.880797 - 0.5) / 2 + (1 - 0.982014) / 4
    assert calibration_error(differences) == pytest.approx(expected, abs=1e-5)
    assert calibration_error(torch.tensor([1000.0, 1000.0])) == pytest.approx(0.0, abs=1e-6)


def test_a_tie_is_half_right_at_confidence_one_half_and_so_well_calibrated():
    assert calibration_error(torch.zeros(4)) == pytest.approx(0.0)


def test_held_out_metrics_compare_with_the_labels_and_with_gold():
    rankings = rankings_of(
        [{"prompt": "p", "chosen": "aa", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "ddd"}],
        setting="data",
    )

    def longer(prompts, responses, **columns):
        return [float(len(text)) for text in responses]

    orders = [gold_pairs(ranking, longer) for ranking in rankings]
    assert orders == [[(0, 1)], [(1, 0)]]
    metrics = held_out_metrics([[1.0, 0.0], [0.0, 2.0]], rankings, orders)
    assert metrics["eval/accuracy"] == 0.5
    assert metrics["eval/gold_accuracy"] == 1.0
    assert metrics["eval/loss"] == pytest.approx((0.313262 + 2.126928) / 2, abs=1e-5)


# ---------------------------------------------------------------------------------------------------- score


def scored(answer, count=2):
    def my_reward(prompts, responses, **columns):
        return answer

    return score(my_reward, ["p"] * count, [f"r{i}" for i in range(count)], {})


@pytest.mark.parametrize(
    "answer",
    [[0.0, 1], (0.0, 1.0), torch.tensor([0.0, 1.0]), torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]).bfloat16()],
    ids=["list", "tuple", "tensor", "column", "bf16"],
)
def test_numbers_of_any_kind_are_scores_and_zero_is_one_of_them(answer):
    scores = scored(answer)
    assert scores.total.tolist() == [0.0, 1.0]
    assert scores.total.dtype == torch.float32
    assert scores.parts["my_reward"] is scores.total


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([math.nan, 1.0], "my_reward returned nan for prompt 'p', response 'r0'"),
        ([1.0, math.inf], "my_reward returned inf for prompt 'p', response 'r1'"),
        (torch.tensor([1.0, -math.inf]), "my_reward returned -inf for prompt 'p', response 'r1'"),
        ([1.0], "my_reward returned 1 scores for 2 responses"),
        ([1.0, 2.0, 3.0], "my_reward returned 3 scores for 2 responses"),
        ([], "my_reward returned 0 scores for 2 responses"),
        (None, "my_reward must return numbers, one a response; it returned None"),
        (0.5, "my_reward must return numbers, one a response; it returned 0.5"),
        (torch.tensor(0.5), "my_reward must return numbers"),
        ([None, 1.0], "my_reward must return numbers"),
        (["good", "bad"], "my_reward must return numbers"),
        ("12", "my_reward must return numbers"),
        (torch.tensor([[1.0, 2.0]]), "my_reward"),
        (torch.ones(2, 2), "my_reward must return numbers"),
        ([1e39, 0.0], "my_reward returned 1e\\+39"),  # infinite in float32
    ],
    ids=str,
)
def test_an_answer_that_is_not_one_finite_number_a_response_is_refused_by_name(answer, message):
    with pytest.raises(UserError, match=message):
        scored(answer)


def test_what_a_reward_function_raises_is_told_by_name():
    def broken(prompts, responses, **columns):
        raise KeyError("topic")

    with pytest.raises(UserError, match="reward function broken raised KeyError: 'topic'"):
        score(broken, ["p"], ["r"], {})


def test_other_columns_of_the_prompts_reach_the_reward_function():
    def topical(prompts, responses, topic):
        return [float(response == wanted) for response, wanted in zip(responses, topic, strict=True)]

    assert score(topical, ["p", "q"], ["sea", "sky"], {"topic": ["sea", "sea"]}).total.tolist() == [1.0, 0.0]


# ---------------------------------------------------------------------------------------------------- load_reward


def by_length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


not_a_function = 3


def test_a_reward_is_loaded_from_a_module_a_file_or_a_folder(tmp_path):
    assert load_reward("test_reward_models:by_length", setting="reward")([""], ["abc"]) == [3.0]
    path = tmp_path / "my_reward.py"
    path.write_text(
        "def longest(prompts, responses, **columns):\n    return [max(map(len, responses))] * len(responses)\n"
    )
    assert load_reward(f"{path}:longest", setting="reward")(["", ""], ["a", "bcd"]) == [3, 3]
    model = make_reward_model()
    model.save(tmp_path / "model")
    loaded = load_reward(str(tmp_path / "model"), setting="reward")
    torch.testing.assert_close(loaded(PROMPTS, RESPONSES), model(PROMPTS, RESPONSES), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("test_reward_models:by_lenght", "has no by_lenght. Did you mean by_length?"),
        ("test_reward_models:not_a_function", "is not a function, but int"),
        ("no_such_module:reward", "importing no_such_module raised ModuleNotFoundError"),
        ("nowhere/reward.py:reward", "there is no file nowhere/reward.py"),
        ("./nowhere/model", "reward: there is no folder ./nowhere/model"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_named(source, message):
    with pytest.raises(UserError, match=message):
        load_reward(source, setting="reward")


def test_a_reward_file_that_fails_on_import_says_why(tmp_path):
    path = tmp_path / "failing.py"
    path.write_text("raise RuntimeError('no licence')\n")
    with pytest.raises(UserError, match="raised RuntimeError: no licence"):
        load_reward(f"{path}:reward", setting="reward")


def test_right_padding_is_masked():
    ids, mask = right_padded([[5, 6, 7], [8]], torch.device("cpu"))
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert ids[mask].tolist() == [5, 6, 7, 8]
