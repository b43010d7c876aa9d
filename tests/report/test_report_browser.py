"""The report in a real browser, from a file and without a network: what a reader does, and what must not happen."""

import itertools
import re

import pytest
from browsers import assert_accessible, page_of
from report_cases import TEXTS, write_run
from tiny_runs import jsonl, write_rows

from ppo_rlhf.report import write_report

HOSTILE = """</script><script>document.title = "hacked"; alert(1)</script>
<img src="http://evil.example/x" onerror="alert(2)"><style>body{display:none}</style>{{ 7*7 }}"""


def address_of(*folders, **more):
    return write_report(list(folders), **more).absolute().as_uri()


def opened(browser, *folders):
    """The page, with the network refused."""
    return page_of(browser, address_of(*folders), offline=True)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The address of the report of a run of six steps."""
    return address_of(write_run(tmp_path_factory.mktemp("plain") / "run"))


@pytest.fixture
def page(browser, plain):
    with page_of(browser, plain, offline=True) as page:
        yield page


def card(page):
    return page.inner_text("#card")


def tokens_of(page, panel=0):
    return page.locator(f".panel >> nth={panel} >> .token")


def colour_of(token):
    return token.evaluate("element => getComputedStyle(element).backgroundColor")


def hover_over_a_chart(page):
    """Until its numbers are told."""
    picture = page.locator(".charts:not(.wide) .picture").first
    picture.locator("canvas").first.wait_for()
    picture.hover()
    page.get_by_text(re.compile(r"^ *step [0-9]")).first.wait_for()


def test_charts_are_drawn_and_the_pointer_reads_their_numbers(page):
    hover_over_a_chart(page)
    assert all(picture.locator("canvas").count() for picture in page.locator(".picture").all())


def test_pointing_at_a_token_shows_its_numbers_and_the_formula(page):
    page.select_option("#kind", "rollouts")
    token = tokens_of(page, 1).nth(11)
    token.hover()
    # step 3, t = 11, wave 0.7: log π_ref = −1.5 − sin 7.7 = −2.488, log π = −2.488 + 0.15·cos 7.7 = −2.465
    told = card(page)
    assert "token 12 of 12 · step 3" in told
    assert "log π − log π_ref = −2.465 − (−2.488) = 0.023" in told
    # r = −0.1·0.023 + 1, V = 0.3·sin 11 = −0.300, and nothing follows
    assert "−β·KL + score = −0.100·0.023 + 1.000 = 0.998" in told
    assert "δ = r + γ·V′ − V = 0.998 + 1·0.000 − (−0.300) = 1.298" in told
    assert "A = δ + γλ·A′ = 1.298 + 1·0.95·0.000 = 1.298" in told
    assert "A + V = 1.298 + (−0.300) = 0.998" in told
    # each epoch adds 0.15 to log π: e^0.15 = 1.162, e^0.3 = 1.350
    assert "exp(log π_new − log π_old) = exp(−2.315 − (−2.465)) = 1.162" in told
    assert "within ε: its gradient flows" in told


@pytest.mark.parametrize(
    ("advantage", "told"),
    [
        ("rloo", "Σ rewards of the response − their mean over the prompt's other responses"),
        ("grpo", "(Σ rewards of the response − their mean over the prompt's responses) / their standard deviation"),
        ("mine.py:estimate", "by mine.py:estimate"),
        ({"name": "mine.py:estimate", "arguments": {"scale": 2}}, "by mine.py:estimate"),
    ],
)
def test_an_advantage_that_is_no_gae_is_not_explained_as_one(browser, tmp_path, advantage, told):
    with opened(browser, write_run(tmp_path / "run", advantage=advantage)) as page:
        page.select_option("#kind", "rollouts")
        tokens_of(page, 1).nth(11).hover()
        assert told in card(page)
        assert "δ" not in card(page)
        assert ("A + V" in card(page)) == ("mine" in told)  # against others there is no value function


def test_after_another_epoch_the_ratio_has_moved_and_the_clip_holds(page):
    page.select_option("#kind", "rollouts")
    page.select_option("#quantity", "clip")
    page.select_option("#epoch", "1")
    tokens_of(page, 1).nth(11).hover()
    told = card(page)
    assert "= 1.350" in told
    # A = 1.298: −A·1.350 = −1.752 is below −A·1.2 = −1.557
    assert "−A·ρ = −1.752, −A·clip(ρ, 0.80, 1.20) = −1.557; the clipped one is larger and active" in told
    tops = [page.locator("#card dt", has_text=name).first.bounding_box()["y"] for name in ("clipped", "log-prob")]
    assert tops[0] < tops[1]  # what colours comes first


def test_switching_the_colour_paints_the_tokens_anew(page):
    page.select_option("#kind", "rollouts")
    painted = {}
    for quantity in page.locator("#quantity option").evaluate_all("all => all.map(one => one.value)"):
        page.select_option("#quantity", quantity)
        painted[quantity] = tuple(colour_of(token) for token in tokens_of(page, 1).all())
    assert len(painted) == 10
    varied = {quantity for quantity, colours in painted.items() if len(set(colours)) > 2}
    assert varied == {"logprob", "reference", "kl", "reward", "value", "advantage", "return"}
    assert len(set(painted.values())) > 7


def test_the_slider_moves_through_the_steps_with_the_same_prompt_before_and_after(browser, tmp_path):
    with opened(browser, write_run(tmp_path / "run", steps=8)) as page:
        titles = page.locator(".panel h3").all_inner_texts()
        assert [re.sub(r"\s+", " ", title) for title in titles] == [
            "Before step 0",
            "On the way step 4",
            "After step 8",
        ]
        page.focus("#step")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#step-shown") == "6"
        assert "step 6" in page.inner_text(".panel.chosen h3")
        page.keyboard.press("End")
        assert page.locator(".panel").count() == 2  # before, and after, which the slider shows
        assert "step 8" in card(page)
        page.select_option("#prompt", "1")
        assert set(page.locator(".panel .prompt").all_inner_texts()) == {"prompt 1 ?"}


def test_the_keyboard_walks_from_token_to_token_and_a_link_leads_to_the_guide(page):
    first = tokens_of(page).first
    first.focus()
    for key, place in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", 12), ("ArrowRight", 12)):
        page.keyboard.press(key)
        assert f"token {place} of 12" in card(page)
    page.keyboard.press("Home")
    assert page.locator(".token[tabindex='0']").count() == page.locator(".panel").count()
    page.locator("#card a", has_text="KL").click()
    assert page.url.endswith("#guide-kl")
    assert "log_ratio = logprobs_p - logprobs_q" in page.inner_text("#guide-kl")


def test_all_scripts_bytes_and_white_space_are_shown_as_what_they_are(browser, tmp_path):
    folder = write_run(tmp_path / "run", texts=TEXTS, tokens=len(TEXTS))
    with opened(browser, folder) as page:
        texts = tokens_of(page).evaluate_all("all => all.map(one => one.textContent)")
        bold = TEXTS.index("<b>bold</b>")
        assert texts[:4] == TEXTS[:4]
        assert texts[4:8] == ["↵\n", "␣␣", "⇥\t", "∅"]
        assert texts[TEXTS.index("\u202eevil\u0000")] == "[U+202E]evil[U+0000]"
        assert texts[bold] == "<b>bold</b>"
        tokens_of(page).nth(8).hover()
        assert "bytes that are no whole character" in card(page)
        heights = {token.bounding_box()["height"] > 5 for token in tokens_of(page).all()}
        assert heights == {True}


def test_right_to_left_text_runs_from_the_right(browser, tmp_path):
    folder = write_run(tmp_path / "run", texts=[" שלום", " עולם", " שוב"], tokens=3)
    with opened(browser, folder) as page:
        first, second, third = (token.bounding_box()["x"] for token in tokens_of(page).all())
        assert first > second > third


def test_pieces_of_a_character_say_which_one_they_make(browser, tmp_path):
    folder = write_run(tmp_path / "run", texts=["\ufffd", "\ufffd", "\ufffd"], tokens=5)
    rows = [{**row, "fragments": [[0, 3, "你"]]} for row in jsonl(folder / "samples.jsonl")]
    write_rows(folder / "samples.jsonl", rows)
    with opened(browser, folder) as page:
        assert tokens_of(page).evaluate_all("all => all.map(one => one.textContent)")[:4] == ["你", "▹", "▹", " word0"]
        tokens_of(page).nth(1).hover()
        assert "piece 2 of 3: a character of several tokens" in card(page)
        assert "“你”" in card(page)


def test_hostile_text_is_inert(browser, tmp_path):
    folder = write_run(tmp_path / "<img src=x onerror=alert(3)>", texts=[HOSTILE], reward=HOSTILE)
    finding = dict.fromkeys(("name", "evidence", "folder", "step", "cause", "remedy", "threshold"), HOSTILE)
    with page_of(browser, address_of(folder, findings=[finding]), offline=True) as page:
        assert tokens_of(page).first.inner_text().startswith("</script><script>")
        for place in range(12):
            tokens_of(page).nth(place).hover()
        hover_over_a_chart(page)
        assert page.title() == "<img src=x onerror=alert(3)>: run report"
        assert page.locator("img").count() == 0
        assert page.evaluate("getComputedStyle(document.body).display") != "none"
        assert "{{ 7*7 }}" in page.inner_text("#doctor")


def test_the_legend_hides_a_run_in_every_chart(browser, tmp_path):
    folders = [write_run(tmp_path / name, kl_coef=kl_coef) for name, kl_coef in (("one", 0.1), ("two", 0.2))]
    shown = """name => window.Bokeh.documents.flatMap(each => [...each.all_models])
        .filter(model => model.name === name).map(model => model.visible)"""
    with opened(browser, *folders) as page:
        page.wait_for_function("window.Bokeh.documents.length > 0")
        assert set(page.evaluate(shown, "two")) == {True}
        page.locator(".legend").get_by_text("two").click()
        assert set(page.evaluate(shown, "two")) == {False}
        assert set(page.evaluate(shown, "one")) == {True}
        page.select_option("#run", "1")
        assert page.locator(".token").count() > 0


def test_a_run_of_an_older_version_shows_its_texts(browser, tmp_path):
    folder = write_run(tmp_path / "run")
    kept = ("step", "kind", "prompt", "response", "finished", "score")
    rows = [{name: row[name] for name in kept} for row in jsonl(folder / "samples.jsonl") if row["kind"] == "held-out"]
    write_rows(folder / "samples.jsonl", rows)
    with opened(browser, folder) as page:
        assert "made by an older version" in page.inner_text("#unknown")
        assert "word3" in page.inner_text(".panel >> nth=1")
        assert page.locator(".token").count() == 0


def test_a_report_without_ppo_has_no_inspector(browser, tmp_path):
    with opened(browser, write_run(tmp_path / "run", stage="sft")) as page:
        assert page.is_hidden("#inspector")
        assert page.is_visible("#no-tokens")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_checker_finds_nothing_serious_and_nothing_scrolls_sideways(browser, tmp_path, scheme):
    texts = [*TEXTS, "averylongwordwithoutanyspace" * 8]
    folders = [write_run(tmp_path / name, kl_coef=k, texts=texts, tokens=20) for name, k in (("one", 0.1), ("two", 9))]
    finding = dict.fromkeys(("name", "evidence", "folder", "step", "cause", "remedy", "threshold"), "word " * 9)
    address = address_of(*folders, findings=[finding])
    with page_of(browser, address, offline=True, color_scheme=scheme) as page:
        page.wait_for_function("window.Bokeh.documents.length > 0")
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        for width, kind in itertools.product((360, 768, 1600), ("held_out", "rollouts")):
            page.set_viewport_size({"width": width, "height": 900})
            page.select_option("#kind", kind)
            page.select_option("#quantity", "advantage")
            tokens_of(page).nth(1).click()
            assert_accessible(page)
