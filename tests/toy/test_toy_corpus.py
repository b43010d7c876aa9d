"""The demonstrations and prompts: rich enough to need a language model, and all within the grammar."""

from ppo_rlhf import toy
from ppo_rlhf.toy import corpus, grammar, lexicon, reward


def words_of(text):
    return [token for token in grammar.tokens_of(text) if grammar.is_word(token)]


def test_the_same_demonstrations_come_every_time():
    assert toy.demonstrations() == toy.demonstrations()


def test_there_are_more_than_500_words_and_several_thousand_sentences(demonstrations):
    completions = [row["completion"] for row in demonstrations]
    sentences = {sentence.strip() for text in completions for sentence in text.replace("!", ".").split(".")}
    assert len({word for text in completions for word in words_of(text)}) >= 500
    assert len(sentences) >= 5_000
    assert len(completions) >= 5_000


def test_prompts_are_distinct_and_disjoint_from_the_demonstrations(demonstrations):
    prompts = [row["prompt"] for row in toy.prompts()]
    shown = {row["prompt"] for row in demonstrations}
    assert len(set(prompts)) == len(prompts) >= 2_000
    assert len(shown) == len(demonstrations)
    assert shown.isdisjoint(prompts)


def test_reviews_have_12_to_34_words_and_18_on_average(demonstrations):
    lengths = [len(words_of(row["completion"])) for row in demonstrations]
    assert min(lengths) >= 12
    assert max(lengths) <= 34
    assert sum(lengths) / len(lengths) >= 18


def test_a_completion_starts_with_the_space_that_its_prompt_lacks(demonstrations):
    assert all(row["completion"].startswith(" ") and not row["prompt"].endswith(" ") for row in demonstrations)


def test_praise_and_blame_are_balanced_and_some_reviews_are_mixed(demonstrations):
    sentiments = [reward.sentiment(grammar.read(grammar.tokens_of(row["completion"]))) for row in demonstrations]
    positive = sum(sentiment > 0.25 for sentiment in sentiments) / len(sentiments)
    negative = sum(sentiment < -0.25 for sentiment in sentiments) / len(sentiments)
    assert 0.35 < positive < 0.45
    assert 0.35 < negative < 0.45
    assert 1 - positive - negative > 0.1


def test_a_review_opens_with_a_verdict_and_bears_it_out(demonstrations):
    by_tone = {1.0: [], 0.3: [], 0.0: [], -0.3: [], -1.0: []}
    for row in demonstrations:
        verdict, *others = grammar.read(grammar.tokens_of(row["completion"]))
        by_tone[verdict.sentiment].append(sum(clause.weight * clause.sentiment for clause in others))
    means = [sum(values) / len(values) for values in by_tone.values()]
    assert all(len(values) > 0.15 * len(demonstrations) for values in by_tone.values())
    assert means == sorted(means, reverse=True)


def test_every_demonstration_is_grammatical_and_free_of_repetition(demonstrations):
    for row in demonstrations:
        tokens = grammar.tokens_of(row["completion"])
        clauses = grammar.read(tokens)
        words = list(filter(grammar.is_word, tokens))
        assert reward.broken_share(clauses) == 0, row
        assert reward.repetition_charge(words, clauses) == 0, row
        assert reward.off_topic_charge(row["prompt"], words) == 0, row


def test_every_surface_has_one_lexeme():
    surfaces = [entry.words for entry in lexicon.lexemes()]
    assert len(surfaces) == len(set(surfaces))


def test_every_skeleton_of_the_grammar_is_written():
    assert set(corpus.SKELETON_SHARES) == set(grammar.SKELETONS)
