"""The labelling app in a real browser, against the real command: what an annotator does, and what goes wrong."""

import itertools
import json

import pytest
import tiny_runs
from browsers import assert_accessible, page_of
from label_cases import choices_in, click, done, press, rows
from tiny_runs import write_rows

HOSTILE = """<script>document.title = "hacked"; alert(1)</script><img src="http://evil.example/x" onerror="alert(2)">
[link](javascript:alert(3)) ![picture](http://evil.example/y.png) <style>body{display:none}</style>
</div></section></main><form action="/undo" method="post"><button>A is better</button></form> {{ 7*7 }} \u202e\u0000"""


@pytest.fixture
def pairs_file(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", rows(50))


def start(serve, pairs, *more):
    return serve("label", "--pairs", pairs, "--db", "sqlite:///labels.db", "--port", "0", *more)


def test_fifty_pairs_by_keys_and_mouse_with_undo_and_a_reload(serve, browser, pairs_file, tmp_path):
    server = start(serve, pairs_file, "--annotator", "ada")
    with page_of(browser, server.address) as page:
        shown = []
        keys = [(press, key) for key in ("1", "3", "2", "ArrowLeft", "ArrowRight", "x", "s")]
        buttons = [(click, name) for name in ("A is better", "B is better", "Tie", "Both bad", "Skip")]
        actions = itertools.cycle([*keys, *buttons])
        while page.locator("#choice").count():
            shown.append((page.inner_text(".prompt .text"), page.inner_text(".response .text >> nth=0")))
            if done(page) == 20:
                page.reload()
                assert (page.inner_text(".prompt .text"), page.inner_text(".response .text >> nth=0")) == shown[-1]
            if done(page) == 30 and len(shown) == 31:
                press(page, "u")
                assert done(page) == 29
                assert page.inner_text(".prompt .text") == shown[29][0]
                press(page, "1")
                assert page.inner_text(".prompt .text") == shown[30][0]
            action, target = next(actions)
            action(page, target)
        assert done(page) == 50
        assert "nothing is left" in page.inner_text("h1")
        page.goto(server.address + "statistics")
        assert "50" in page.inner_text(".tiles")
    assert "50 choices" in server.end()

    kept = choices_in(tmp_path / "labels.db")
    assert len({choice.pair.prompt for choice in kept}) == len(kept) == 50
    assert {choice.result for choice in kept} == {"left", "right", "tie", "both bad", "skip"}
    first_shown = {choice.pair.prompt: choice.pair.responses[choice.shown[0]] for choice in kept}
    assert dict(shown) == first_shown
    assert all(0 < choice.seconds < 60 for choice in kept)
    assert 10 < sum(choice.shown == [0, 1] for choice in kept) < 40


def test_two_annotators_at_once_judge_every_pair_once_each(serve, browser, tmp_path):
    server = start(serve, write_rows(tmp_path / "pairs.jsonl", rows(12)), "--overlap", "2")
    with page_of(browser, server.address) as one, page_of(browser, server.address) as other:
        for page, name in ((one, "ada"), (other, "ben")):
            page.fill("#name", name)
            page.get_by_role("button", name="Begin").click()
            page.wait_for_selector("#choice")
        for turn in range(12):
            press(one, "1")
            press(other, "13"[turn % 2])
    server.end()
    kept = {(choice.pair.prompt, choice.annotator) for choice in choices_in(tmp_path / "labels.db")}
    assert len(kept) == len(choices_in(tmp_path / "labels.db")) == 24


def test_a_server_that_is_killed_between_choices_loses_nothing(serve, browser, tmp_path, pairs_file):
    server = start(serve, pairs_file, "--annotator", "ada")
    with page_of(browser, server.address, allowed=["ERR_CONNECTION_REFUSED"]) as page:
        for count in (3, 2):
            for _ in range(count):
                press(page, "1")
            prompt = page.inner_text(".prompt .text")
            server.kill()
            page.keyboard.press("3")
            page.wait_for_selector(".problem:not([hidden])")
            assert "Not saved" in page.inner_text(".problem")
            server = start(serve, pairs_file, "--annotator", "ada", "--port", str(server.port))
            assert page.inner_text(".prompt .text") == prompt
            press(page, "3")  # the same page goes on
        assert done(page) == 7
    kept = choices_in(tmp_path / "labels.db")
    assert [choice.result for choice in kept] == ["left"] * 3 + ["right"] + ["left"] * 2 + ["right"]
    assert len({choice.pair.prompt for choice in kept}) == 7


def test_hostile_text_is_inert(serve, browser, tmp_path):
    hostile = [{"prompt": HOSTILE, "responses": [HOSTILE, "b"], "sources": [HOSTILE, "x"]} for _ in range(2)]
    hostile[1]["prompt"] = [{"role": "user", "content": HOSTILE}]
    path = write_rows(tmp_path / "one.jsonl", hostile[:1])
    for pairs in (path, write_rows(tmp_path / "two.jsonl", hostile[1:])):
        server = start(serve, pairs)
        with page_of(browser, server.address) as page:
            page.fill("#name", "<script>alert(9)</script>")
            page.get_by_role("button", name="Begin").click()
            page.wait_for_selector("#choice")
            assert page.title() == "0 done, 1 left · ppo-rlhf"
            assert "<script>" in page.inner_text(".prompt .text")
            assert page.locator(".text script, .text img, .text a, .text form, .text style, .text button").count() == 0
            press(page, "1")
            page.goto(server.address + "statistics")
            assert "<script>" in page.inner_text("main")
        server.end()


def test_scripts_that_are_injected_all_the_same_do_not_run(serve, browser, pairs_file):
    server = start(serve, pairs_file, "--annotator", "ada")
    refused = ["Content Security Policy", "violates the following", "inline", "404"]
    with page_of(browser, server.address, allowed=refused) as page:
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 1'}))")
        page.wait_for_timeout(200)
        assert page.evaluate("window.hacked") is None


def test_a_ranking_by_keys_and_by_mouse(serve, browser, tmp_path):
    server = start(serve, write_rows(tmp_path / "pairs.jsonl", rows(3, responses=4)), "--rank", "--annotator", "ada")
    with page_of(browser, server.address) as page:
        for key in "3142":
            page.keyboard.press(key)
        press(page, "Enter")
        for name, place in (("A", 2), ("B", 2), ("C", 1), ("D", 4)):
            page.get_by_role("group", name=f"Place of {name}").get_by_role("radio", name=str(place)).click()
        click(page, "Save the ranking")
        page.keyboard.press("1")
        page.get_by_role("button", name="Save the ranking").click()  # three have no place yet
        assert done(page) == 2
        press(page, "s")
    server.end()
    first, second, third = choices_in(tmp_path / "labels.db")
    assert [first.ranks[position] for position in first.shown] == [2, 4, 1, 3]
    assert [second.ranks[position] for position in second.shown] == [2, 2, 1, 3]
    assert third.ranks is None


def test_more_than_two_responses_are_compared_two_by_two_where_no_ranking_is_asked_for(serve, browser, tmp_path):
    server = start(serve, write_rows(tmp_path / "pairs.jsonl", rows(1, responses=4)), "--annotator", "ada")
    with page_of(browser, server.address) as page:
        assert page.inner_text("#remaining") == "6"


def test_a_choice_with_its_strength_and_a_note(serve, browser, tmp_path, pairs_file):
    server = start(serve, pairs_file, "--annotator", "ada", "--strength")
    with page_of(browser, server.address) as page:
        page.keyboard.press("n")
        page.keyboard.type("1 because it is short")  # keys act on nothing while one writes
        assert done(page) == 0
        page.keyboard.press("Escape")
        press(page, "7")
        click(page, "A slightly better")
    first, second = choices_in(tmp_path / "labels.db")
    assert (first.result, first.margin, first.note) == ("right", 1.0, "1 because it is short")
    assert (second.result, second.note) == ("left", "")
    assert second.margin == pytest.approx(1 / 3)


def test_a_choice_taken_back_brings_its_note_to_write_on(serve, browser, tmp_path, pairs_file):
    server = start(serve, pairs_file, "--annotator", "ada")
    with page_of(browser, server.address) as page:
        page.keyboard.press("n")
        page.keyboard.type("too <b>short</b>")
        page.keyboard.press("Escape")
        press(page, "1")
        assert page.input_value("#note") == ""
        press(page, "u")
        assert page.input_value("#note") == "too <b>short</b>"
        assert page.is_visible("#note")
        press(page, "3")
    (kept,) = choices_in(tmp_path / "labels.db")
    assert (kept.result, kept.note) == ("right", "too <b>short</b>")


def test_a_text_is_read_as_markdown_or_as_it_was_written(serve, browser, tmp_path):
    rows = [{"prompt": f"# Title {i}", "responses": [f"**bold** {i}\n* one", f"<i>{i}</i>"]} for i in range(2)]
    server = start(serve, write_rows(tmp_path / "marked.jsonl", rows), "--annotator", "ada")
    with page_of(browser, server.address) as page:
        assert page.locator(".response strong").count() == 1
        assert "**" not in page.inner_text(".responses")
        page.keyboard.press("w")
        assert "**bold** " in page.inner_text(".responses")
        assert "\n* one" in page.inner_text(".responses")
        assert "# Title" in page.inner_text(".prompt")
        press(page, "1")  # the next pair is shown the same way
        assert "**bold** " in page.inner_text(".responses")
        page.keyboard.press("w")
        assert "**" not in page.inner_text(".responses")


def test_it_is_usable_by_the_tab_key_alone_and_says_what_it_did(serve, browser, pairs_file):
    server = start(serve, pairs_file, "--annotator", "ada")
    with page_of(browser, server.address) as page:
        page.keyboard.press("n")
        page.keyboard.press("Escape")
        names = []
        for _ in range(6):
            page.keyboard.press("Tab")
            names.append(page.evaluate("document.activeElement.innerText.split('\\n')[0].trim()"))
        assert any(name.startswith("A is better") for name in names), names
        page.get_by_role("button", name="B is better").focus()
        press(page, "Enter")
        assert page.evaluate("document.activeElement.id") == "task"
        assert page.inner_text("#said").startswith("Saved. 1 done")
        page.get_by_text("Keys", exact=True).click()
        page.uncheck("#shortcuts")
        page.keyboard.press("1")
        page.reload()
        page.keyboard.press("1")
        page.wait_for_timeout(100)
        assert done(page) == 1


def test_it_works_without_its_script(serve, browser, pairs_file, tmp_path):
    server = start(serve, pairs_file, "--annotator", "ada")
    with page_of(browser, server.address, java_script_enabled=False) as page:
        page.get_by_role("button", name="A is better").click()
        page.get_by_role("button", name="Tie").click()
        page.get_by_role("button", name="Undo").click()
        assert page.inner_text("#done") == "1"
    assert [choice.result for choice in choices_in(tmp_path / "labels.db")] == ["left"]


def test_a_token_lets_in_by_the_printed_link_alone(serve, browser, pairs_file):
    server = start(serve, pairs_file, "--annotator", "ada", "--token", "a word & another", "--host", "0.0.0.0")
    address = server.address.replace("0.0.0.0", "127.0.0.1")
    bare = address.partition("?")[0]
    with page_of(browser, bare, allowed=["401"]) as page:
        assert "?token=" in page.inner_text("body")
    with page_of(browser, address) as page:
        assert page.url == bare
        press(page, "1")


TEXTS = [
    {"role": "system", "content": "Answer in **Markdown**."},
    {"role": "user", "content": "ما هي عاصمة فرنسا؟"},
    {
        "role": "assistant",
        "content": "```python\nprint('a long line of code that must not make a phone scroll sideways')\n```",
    },
    {
        "role": "user",
        "content": "| a | b |\n|---|---|\n| 1 | " + "long" * 30 + " |\n\n# Title\n\n> quoted\n\n1. 東京\n2. x",
    },
]
VIEWS = {"pair": [], "strength": ["--strength"], "ranking": ["--rank"]}


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious_and_nothing_scrolls_sideways(serve, browser, tmp_path, view):
    count = 4 if view == "ranking" else 2
    content = [{"prompt": TEXTS, "responses": [TEXTS[2]["content"], TEXTS[3]["content"], "c", "d"][:count]}]
    content = [{**row, "sources": ["new", "old", "x", "y"][:count]} for row in content]
    server = start(serve, write_rows(tmp_path / "pairs.jsonl", content), "--overlap", "2", *VIEWS[view])
    for scheme, width in itertools.product(("light", "dark"), (360, 768, 1600)):
        with page_of(browser, server.address, color_scheme=scheme) as page:
            page.set_viewport_size({"width": width, "height": 900})
            assert_accessible(page)
            page.fill("#name", f"{scheme} {width}")
            page.get_by_role("button", name="Begin").click()
            page.wait_for_selector("#task")
            assert_accessible(page)
            if page.locator("#choice").count():
                page.keyboard.press("n")
                page.evaluate("document.querySelector('.keys').open = true")
                assert_accessible(page)
                page.keyboard.press("Escape")
                press(page, "x" if view == "ranking" else "1")
                assert_accessible(page)
            page.goto(server.address + "statistics")
            assert_accessible(page)
    server.end()


def test_two_runs_are_compared_blind_and_end_in_a_win_rate(serve, browser, models, data, tmp_path):
    words = ["--label", "--prompts", data["prompts"], "--num-pairs", "8", "--annotator", "ada", "--port", "0", "--json"]
    server = serve("compare", models["gpt2"], models["llama"], *words, "--db", "sqlite:///labels.db")
    with page_of(browser, server.address) as page:
        for key in "11112333":
            assert "gpt2" not in page.content()
            assert "llama" not in page.content()
            press(page, key)
        page.get_by_role("button", name="Finish and see the outcome").click()
        page.wait_for_selector("text=You may close this page")
    server.process.wait(20)
    told = json.loads(server.process.stdout.read().splitlines()[-1])
    kept = choices_in(tmp_path / "labels.db")
    wins = sum(choice.ranks == [1, 2] for choice in kept) + 0.5 * sum(choice.ranks == [1, 1] for choice in kept)
    assert told["win_rate"] == wins / 8
    assert told["low"] < told["win_rate"] < told["high"]
    again = tiny_runs.command("compare", models["gpt2"], models["llama"], "--db", "sqlite:///labels.db", cwd=tmp_path)
    assert again.returncode == 0
    assert f"wins {wins / 8:.1%}" in again.stdout
