"""The app without a browser: who gets in, what is refused, and what a page shows."""

import re
from urllib.parse import urlencode

import pytest
from starlette.testclient import TestClient

from ppo_rlhf.label import LabelSettings, make_app
from ppo_rlhf.label.text import html_of, language_of, turns_of
from ppo_rlhf.preferences import Pair, Store

ORIGIN = "http://127.0.0.1:8000"
FORM = {"content-type": "application/x-www-form-urlencoded"}


@pytest.fixture
def store(tmp_path):
    made = Store.open(f"sqlite:///{tmp_path}/preferences.db", setting="--db")
    made.add("work", [Pair(f"prompt {i}", [f"one {i}", f"two {i}"], ["runs/secret", "runs/hidden"]) for i in range(3)])
    yield made
    made.close()


def client_of(store, **settings):
    settings = {"annotator": "ada", "hosts": frozenset({"127.0.0.1"})} | settings
    return TestClient(make_app(store, LabelSettings("work", **settings)), base_url=ORIGIN, follow_redirects=False)


def fields_of(page):
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text))


def choose(client, fields=None, *, headers=None, **changes):
    fields = {**(fields or fields_of(client.get("/"))), "result": "left", **changes}
    return client.post("/choose", content=urlencode(fields), headers={**FORM, **(headers or {})})


# --------------------------------------------------------------------------------------------------------- choosing


def test_a_plain_form_goes_on_to_the_next_pair_by_a_redirect(store):
    client = client_of(store)
    first = fields_of(client.get("/"))
    answer = choose(client, first)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert fields_of(client.get("/"))["pair"] != first["pair"]
    assert [choice.result for choice in store.choices()] == ["left"]


def test_a_form_sent_twice_is_one_choice(store):
    client = client_of(store)
    fields = fields_of(client.get("/"))
    assert [choose(client, fields).status_code for _ in range(2)] == [303, 303]
    assert len(store.choices()) == 1


@pytest.mark.parametrize(
    ("sent", "result", "margin"),
    [
        ("left", "left", None),
        ("right much", "right", 1.0),
        ("left slightly", "left", 1 / 3),
        ("both bad", "both bad", None),
    ],
)
def test_the_strength_of_a_choice_becomes_its_margin(store, sent, result, margin):
    choose(client_of(store, strength=True), result=sent)
    (choice,) = store.choices()
    assert (choice.result, choice.margin) == (result, margin)


def test_note_and_seconds_are_kept_and_nonsense_is_not(store):
    client = client_of(store)
    choose(client, note="  why\0 \u05e9 ", seconds="2.5")
    choose(client, note="x" * 9000, seconds="-3")
    first, second = store.choices()
    assert (first.note, first.seconds) == ("why \u05e9", 2.5)
    assert (len(second.note), second.seconds) == (5000, None)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"result": "best"}, 400),
        ({"result": ""}, 400),
        ({"result": "ranking"}, 400),
        ({"result": "ranking", "place0": "1"}, 400),
        ({"result": "ranking", "place0": "first", "place1": "2"}, 400),
        ({"seconds": "soon"}, 400),
        ({"pair": "x"}, 400),
        ({"pair": "1000"}, 409),
        ({"csrf": ""}, 403),
        ({"csrf": "guess"}, 403),
        ({"csrf": "שלום"}, 403),
    ],
)
def test_what_is_no_choice_is_refused_and_keeps_nothing(store, changes, status):
    assert choose(client_of(store), **changes).status_code == status
    assert store.choices() == []


def test_a_ranking_is_kept_in_the_order_of_the_stored_responses(store):
    store.add("work", [Pair("rank", ["a", "b", "c"])])
    store.arrange(dict.fromkeys(store.pairs("work"), 1.0) | {4: 0.0})
    client = client_of(store)
    page = client.get("/")
    shown = re.findall(r"<p dir=\"auto\">([abc])</p>", page.text)
    places = {f"place{index}": str("cab".index(name) + 1) for index, name in enumerate(shown)}
    choose(client, fields_of(page), result="ranking", **places)
    assert store.choices()[0].ranks == [2, 3, 1]


def test_undo_and_the_end_of_the_work(store):
    client = client_of(store)
    for _ in range(3):
        choose(client)
    page = client.get("/")
    assert "nothing is left" in page.text
    assert client.post("/undo", content=urlencode(fields_of(page)), headers=FORM).status_code == 303
    assert len(store.choices()) == 2
    assert "Which response is better" in client.get("/").text


def test_sources_are_never_on_the_page_that_judges(store):
    client = client_of(store)
    assert "runs/" not in client.get("/").text
    choose(client)
    assert "runs/secret" in client.get("/statistics").text
    assert "runs/" not in client_of(store, blind=True).get("/statistics").text


# ------------------------------------------------------------------------------------------------------------ names


def test_each_gives_a_name_and_sees_his_own_progress(store):
    client = client_of(store, annotator=None)
    assert client.get("/").headers["location"] == "/name"
    sent = {**fields_of(client.get("/name")), "name": " Zoë <b>ש "}
    assert client.post("/name", content=urlencode(sent), headers=FORM).status_code == 303
    assert "Zoë &lt;b&gt;ש" in client.get("/").text
    choose(client)
    assert [choice.annotator for choice in store.choices()] == ["Zoë <b>ש"]


@pytest.mark.parametrize("name", ["", "  ", "x" * 61, "a\nb", "a\u202eb"])
def test_a_name_that_is_none_is_refused(store, name):
    client = client_of(store, annotator=None)
    sent = {**fields_of(client.get("/name")), "name": name}
    assert client.post("/name", content=urlencode(sent), headers=FORM).status_code == 400


def test_nothing_is_chosen_without_a_name(store):
    client = client_of(store, annotator=None)
    sent = {**fields_of(client.get("/name")), "pair": "1", "result": "left"}
    assert client.post("/choose", content=urlencode(sent), headers=FORM).status_code == 403


# --------------------------------------------------------------------------------------------------------- security


def test_a_token_lets_in_once_and_stays_out_of_the_address(store):
    client = client_of(store, token="let me in")
    for path in ("/", "/statistics", "/static/label.js", "/?token=wrong"):
        assert client.get(path).status_code == 401
    answer = client.get("/?token=let+me+in")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "let me in" not in cookie
    assert client.get("/").status_code == 200
    stranger = client_of(store, token="let me in")
    stranger.cookies.set("label_access", "forged")
    assert stranger.get("/").status_code == 401


def test_the_token_s_redirect_stays_here(store):
    assert (
        client_of(store, token="word").get(f"{ORIGIN}//evil.example?token=word").headers["location"] == "/evil.example"
    )


def test_without_the_token_no_choice_is_taken(store):
    client = client_of(store, token="let me in")
    assert client.post("/choose", content="pair=1&result=left&csrf=x", headers=FORM).status_code == 401
    assert store.choices() == []


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8001"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_site_cannot_choose_for_an_annotator(store, headers):
    assert choose(client_of(store), headers=headers).status_code == 403
    assert store.choices() == []


def test_our_own_page_can(store):
    assert choose(client_of(store), headers={"origin": ORIGIN, "sec-fetch-site": "same-origin"}).status_code == 303


def test_a_form_without_our_cookie_is_refused(store):
    fields = fields_of(client_of(store).get("/"))
    assert choose(client_of(store), fields).status_code == 403


def test_a_name_that_points_here_from_outside_is_refused(store):
    assert client_of(store).get("/", headers={"host": "evil.example:8000"}).status_code == 400


@pytest.mark.parametrize("chunked", [True, False])
def test_a_large_request_is_refused(store, chunked):
    body = b"note=" + b"x" * 70_000
    content = (part for part in [body]) if chunked else body
    assert client_of(store).post("/choose", content=content, headers=FORM).status_code == 413


@pytest.mark.parametrize("body", [b"\xff\xfe", "&".join(f"a{i}=1" for i in range(99)).encode()])
def test_a_body_that_is_no_form_of_ours_is_refused(store, body):
    client = client_of(store)
    client.get("/")
    assert client.post("/choose", content=body, headers=FORM).status_code == 400


def test_every_answer_forbids_what_a_page_of_ours_never_does(store):
    client = client_of(store, token="word")
    for answer in (
        client.get("/"),
        client.get("/?token=word"),
        client.get("/static/label.css"),
        client.get("/nowhere"),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
    assert "http" not in re.sub(r"http://127.0.0.1:8000", "", client.get("/").text)  # nothing from elsewhere


def test_choosing_needs_a_post(store):
    assert client_of(store).get("/choose").status_code == 405


def test_a_page_that_there_is_not_says_so(store):
    answer = client_of(store).get("/nowhere")
    assert answer.status_code == 404
    assert "There is no such page." in answer.text


def test_only_a_comparison_has_an_end_that_a_browser_can_ask_for(store):
    client = client_of(store)
    assert client.post("/finish", content=urlencode(fields_of(client.get("/"))), headers=FORM).status_code == 404


def test_a_database_that_fails_is_told_and_nothing_counts_as_saved(store, monkeypatch):
    client = TestClient(
        make_app(store, LabelSettings("work", annotator="ada")), base_url=ORIGIN, raise_server_exceptions=False
    )
    fields = fields_of(client.get("/"))
    monkeypatch.setattr(store, "choose", lambda *_, **__: 1 / 0)
    answer = choose(client, fields)
    assert answer.status_code == 500
    assert "nothing was saved" in answer.text


# ------------------------------------------------------------------------------------------------------------- text

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](http://evil.example)",
    "![a](http://evil.example/a.png)",
    "<http://evil.example>",
    "[a]: http://evil.example\n\n[a]",
    "```\n</code></pre><script>alert(1)</script>\n```",
    "    </code><script>",
    "`<script>`",
    '| <b onclick="x"> |\n|---|\n| <i> |',
    '<p style="position:fixed">',
    "</div></section></main><h1>fake</h1>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "x" * 30_000 + "<script>",
]
KNOWN_TAGS = {"p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:30])
def test_hostile_text_stays_text(text):
    html = html_of(text)
    assert set(re.findall(r"</?([a-z0-9]+)", html)) <= KNOWN_TAGS
    assert not re.search(r"<[^>]*\b(href|src|style|on\w+)=", html)


def test_links_are_shown_as_they_were_written():
    assert "[a](http://x.example) ![b](c.png)" in html_of("[a](http://x.example) ![b](c.png)")


def test_markdown_and_code_are_readable():
    html = html_of("# Title\n\nsome **bold**\nnext line\n\n```python\nif x:\n    y()\n```\n\n- a\n- b")
    assert '<h3 dir="auto">Title</h3>' in html
    assert "<strong>bold</strong><br>" in html
    assert '<pre dir="ltr"><code>if x:\n    y()</code></pre>' in html
    assert '<ul dir="auto">' in html


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("plain English", None),
        ("日本の首都は東京です。", "ja"),
        ("首都是北京。", "zh"),
        ("수도는 서울입니다.", "ko"),
        ("عاصمة فرنسا هي باريس", "ar"),
        ("בירת צרפת היא פריז", "he"),
        ("The word 東京 means Tokyo in a sentence of English", None),
        ("123 !?", None),
        ("", None),
    ],
)
def test_languages_are_told_by_their_script(text, language):
    assert language_of(text) == language


def test_a_chat_is_shown_in_turns_whether_messages_or_text():
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    text = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: more\n\nAssistant:"
    assert [turn.role for turn in turns_of(messages, None)] == ["user", "assistant"]
    assert [(turn.role, turn.html.striptags()) for turn in turns_of(text, None)] == [
        ("user", "hello"),
        ("assistant", "hi"),
        ("user", "more"),
    ]
    for plain in ("a text", "note to Human: be kind", "Human: one line"):
        assert [turn.role for turn in turns_of(plain, None)] in ([""], ["user"])
    assert [turn.role for turn in turns_of("a text\n\nHuman: hello\n\nAssistant:", None)] == [""]
