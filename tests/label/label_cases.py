"""Pairs to judge, and the keys that judge them."""

from ppo_rlhf.preferences import Store


def rows(count, responses=2):
    return [
        {"prompt": f"prompt {i}", "responses": [f"{name} {i}" for name in "pqrstu"[:responses]]} for i in range(count)
    ]


def done(page):
    return int(page.inner_text("#done"))


def press(page, key):
    """A key, and the next pair on the screen."""
    before = done(page)
    page.keyboard.press(key)
    page.wait_for_function("count => document.getElementById('done').textContent != count", arg=str(before))


def click(page, name):
    before = done(page)
    page.get_by_role("button", name=name).click()
    page.wait_for_function("count => document.getElementById('done').textContent != count", arg=str(before))


def choices_in(path):
    store = Store.open(f"sqlite:///{path}", setting="--db", create=False)
    try:
        return store.choices()
    finally:
        store.close()
