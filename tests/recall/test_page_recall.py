"""The page shows, searches, corrects and erases memories, in a real browser; nothing of a memory becomes markup, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from browser import CHROMIUM, Chromium
from matplotlib.image import imread

from remanence.recall import server
from remanence.recall.access import Keys
from remanence.recall.items import NewMessage, Selection
from remanence.recall.server import ServerSettings, make_app
from remanence.recall.service import Recall

HOSTILE = "<img src=x onerror=alert(1)><script>document.title='owned'</script>\"'&"
LONG = "a-very-long-name-without-a-space-" * 5
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to look at the page")]
FOLDER = Path(server.__file__).parent


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Chromium(tmp_path_factory.mktemp("browser"))
    yield chromium
    chromium.close()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A served memory, its address with a key, and the memory."""
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("REMANENCE_KEY", str(tmp_path / "no-key.pem"))
    recall = Recall.open(tmp_path / "memory", embedder="hashing")
    recall.add("I moved from Porto to Lisbon", person="anna", conversation="moving", at=1e9)
    recall.add("Welcome to Lisbon!", role="assistant", conversation="moving", at=1e9 + 60)
    recall.add(HOSTILE, person=HOSTILE, conversation="moving", at=1e9 + 120)
    recall.add_many([NewMessage("user", f"entry number {n}", "bo", 5e8 + n) for n in range(150)], conversation=LONG)
    recall.add("elsewhere", space="other", person="anna")
    keys = Keys(tmp_path / "access.json")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    config = uvicorn.Config(make_app(recall, ServerSettings(keys=keys.path)), access_log=False, log_config=None)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/#key={keys.make('page')}", recall
    running.should_exit = True
    thread.join()
    recall.close()


@pytest.fixture
def page(site, browser):
    browser.window(1280, 900)
    browser.said.clear()
    browser.open(site[0])
    browser.until("document.querySelectorAll('.message').length === 3")
    yield browser
    browser.run("sessionStorage.clear(); localStorage.clear()")


def test_nothing_is_loaded_from_elsewhere():
    for path in FOLDER.glob("page*"):
        source = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", source), path
    script = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("page*.js"))
    for risk in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "new Function", ".style"):
        assert risk not in script
    assert not re.search(r"\son\w+=|style=|<script>|<style", (FOLDER / "page.html").read_text(encoding="utf-8"))


def test_the_key_leaves_the_address_and_a_wrong_one_is_told(page, site):
    assert page.run("location.hash") == ""
    page.run("document.getElementById('leave').click()")
    assert page.run("sessionStorage.length + localStorage.length") == 0
    assert page.run("document.activeElement.id") == "key"
    page.type("rk_wrong")
    page.key("Enter")
    page.until("document.getElementById('door-said').textContent.includes('not known')")
    page.type(site[0].partition("#key=")[2])
    page.key("Enter")
    page.until("document.querySelectorAll('.message').length === 3")


def test_a_memory_is_shown_as_text(page):
    assert page.run("[...document.querySelectorAll('.message .text')].at(-1).textContent") == HOSTILE
    assert page.run("document.querySelectorAll('#messages img, #messages script').length") == 0
    assert page.run("document.title") == "Remanence · recall"
    assert page.run("document.querySelector('.conversations [aria-current] b').textContent") == "moving"
    assert page.said == []  # no error and no refused load


def test_long_conversations_come_in_pages(page):
    page.run("document.querySelectorAll('.conversations button')[1].click()")
    page.until("document.querySelectorAll('.message').length === 60")
    page.run("document.getElementById('earlier').click()")
    page.until("document.querySelectorAll('.message').length === 120")
    page.run("document.getElementById('earlier').click()")
    page.until("document.querySelectorAll('.message').length === 150")
    assert page.run("document.getElementById('earlier').hidden")
    assert page.run("[...document.querySelectorAll('.message .text')].map((one) => one.textContent).join()") == ",".join(
        f"entry number {n}" for n in range(150)
    )


def test_search_by_keyboard_alone(page):
    page.run("document.activeElement.blur()")
    page.key("/", text="/")
    assert page.run("document.activeElement.id") == "query"
    page.type("moved to Lisbon")
    page.key("Enter")
    page.until("document.querySelector('.score')")
    assert "moved from Porto" in page.run("document.querySelector('.message .text').textContent")
    assert page.run("document.querySelector('mark').textContent") == "moved"
    page.key("Tab")
    assert page.run("document.activeElement.id") == "where"


def test_a_message_is_remembered_and_corrected(page, site):
    page.run("document.getElementById('add-text').focus()")
    page.type("A thing with a misteak")
    page.key("Enter", modifiers=2)
    page.until("document.querySelectorAll('.message').length === 4")
    page.run("[...document.querySelectorAll('.message .acts button')].filter((one) => one.textContent === 'Correct').at(-1).click()")
    page.until("document.querySelector('.message textarea')")
    page.run("document.querySelector('.message textarea').value = 'A thing without a mistake'")
    page.run("document.querySelector('.message form').requestSubmit()")
    page.until("document.querySelector('#messages').textContent.includes('corrected')")
    texts = [one.text for one in site[1].messages(Selection(conversation="moving"))]
    assert texts[-1] == "A thing without a mistake"
    assert "A thing with a misteak" not in texts


def test_a_long_message_that_was_found_is_corrected_whole(page, site):
    text = "zebra " + "filler words " * 600
    made = site[1].add(text, conversation="moving")
    page.run("document.getElementById('query').value = 'zebra'; document.getElementById('search').requestSubmit()")
    page.until("document.querySelector('mark')")
    page.run("document.querySelector('.message:has(mark) .acts button').click()")
    page.until("document.querySelector('.message textarea')")
    assert page.run("document.querySelector('.message textarea').value") == text  # not the piece that was found
    page.key("Escape")
    page.until("!document.querySelector('.message textarea')")
    assert site[1].messages(Selection(ids=(made.id,)))[0].text == text


def test_a_person_is_erased_after_a_preview(page, site):
    page.run("document.querySelector('.message .acts .erase').click()")
    page.until("document.getElementById('erase').open")
    page.run("[...document.querySelectorAll('.choices label')].find((one) => one.textContent.includes('every space')).click()")
    page.run("document.getElementById('erase-look').click()")
    page.until("document.querySelector('.seen')")
    assert "2messages" in page.run("document.querySelector('.tally').textContent")
    assert "I moved from Porto" in page.run("document.querySelector('.seen').textContent")
    assert len(site[1].messages(Selection(space=None, person="anna"))) == 2  # not yet
    assert page.run("document.activeElement.id") == "erase-go"
    page.key("Enter")
    page.until("document.querySelector('.seen.done')")
    assert "found nothing of it" in page.run("document.querySelector('.seen.done').textContent")
    assert site[1].messages(Selection(space=None, person="anna")) == []
    page.key("Escape")
    page.until("!document.getElementById('erase').open")
    page.until("document.querySelectorAll('.message').length === 2")


def test_what_was_found_is_erased_and_the_figures_follow(page, site):
    page.run("document.getElementById('query').value = 'Lisbon'; document.getElementById('search').requestSubmit()")
    page.until("document.querySelector('.score')")
    count = page.run("document.querySelectorAll('.message').length")
    page.run("document.getElementById('erase-some').click()")
    page.until("document.getElementById('erase').open")
    page.run("document.getElementById('erase-look').click()")
    page.until("document.querySelector('.seen')")
    assert f"{count}messages" in page.run("document.querySelector('.tally').textContent")
    page.run("document.getElementById('erase-go').click()")
    page.until("document.querySelector('.seen.done')")
    left = 153 - count
    page.until(f"document.getElementById('figures').textContent.startsWith('{left} messages')")


def test_receipts_are_listed_and_checked(page, site):
    site[1].forget(Selection(conversation="moving"), reason="ticket 7")
    page.run("document.getElementById('tab-receipts').click()")
    page.until("document.querySelector('#receipts li')")
    assert "Erased: 3 messages" in page.run("document.querySelector('#receipts li').textContent")
    assert "nothing left in any file" in page.run("document.querySelector('#receipts li').textContent")
    page.run("[...document.querySelectorAll('#receipts button')].at(-1).click()")
    page.until("document.querySelectorAll('#checks .yes').length > 2")
    assert page.run("document.querySelectorAll('#checks .no').length") == 0


def test_cancelling_erases_nothing(page, site):
    page.run("document.getElementById('erase-some').click()")
    page.until("document.getElementById('erase').open")
    page.run("document.getElementById('erase-look').click()")
    page.until("document.querySelector('.seen')")
    page.key("Escape")
    page.until("!document.getElementById('erase').open")
    assert len(site[1].messages(Selection(conversation="moving"))) == 3


def test_facts_prompt_and_tabs(page, site):
    page.run("document.getElementById('tab-messages').focus()")
    page.key("ArrowRight")
    assert page.run("document.activeElement.id") == "tab-facts"
    page.run("document.getElementById('fact-text').value = 'Anna lives in Lisbon'; document.getElementById('add-fact').requestSubmit()")
    page.until("document.querySelector('.facts li')")
    assert [fact.text for fact in site[1].facts()] == ["Anna lives in Lisbon"]
    page.run("document.getElementById('tab-prompt').click()")
    page.run("document.getElementById('compose-text').value = 'Where does she live?'; document.getElementById('compose').requestSubmit()")
    page.until("document.querySelector('.part')")
    assert "Anna lives in Lisbon" in page.run("document.getElementById('prompt').textContent")
    page.run("document.getElementById('tab-facts').click(); document.querySelector('.facts button').click()")
    page.until("!document.querySelector('.facts li')")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_page_fits_its_window(page, width):
    page.window(width, 844, phone=width < 500)
    for index in (0, 1):
        page.run(f"document.querySelectorAll('.conversations button')[{index}].click()")
        page.until(f"document.querySelectorAll('.conversations button')[{index}].hasAttribute('aria-current')")
        time.sleep(0.1)
        assert page.run("document.documentElement.scrollWidth") <= width
    page.run("document.getElementById('erase-some').click()")
    assert page.run("document.getElementById('erase').getBoundingClientRect().right") <= width
    page.run("document.getElementById('erase').close()")


def test_every_control_has_a_name(page):
    unnamed = """[...document.querySelectorAll('button, input, select, textarea')].filter((one) => one.offsetParent
      && !(one.textContent.trim() && one.tagName === 'BUTTON') && !one.labels?.length && !one.getAttribute('aria-label')).map((one) => one.outerHTML).join()"""
    assert page.run(unnamed) == ""
    assert page.run("[...document.querySelectorAll('h1')].filter((one) => one.offsetParent).length") == 1


@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_drawn_light_and_dark(page, tmp_path, width):
    grounds = {}
    for theme in ("light", "dark"):
        page.window(width, 844, dark=theme == "dark", phone=width < 500)
        time.sleep(0.1)
        page.picture(tmp_path / f"{theme}.png")
        pixels = imread(tmp_path / f"{theme}.png")[..., :3]
        assert pixels.std() > 0.04  # something is drawn
        grounds[theme] = float(np.median(pixels))
    assert grounds["light"] > 0.9
    assert grounds["dark"] < 0.2


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_stand_out_from_their_ground(theme):
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    block = css[css.index("prefers-color-scheme: dark") :] if theme == "dark" else css
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block.partition("}")[0]))

    def light(name):  # WCAG 2.2, relative luminance
        values = [int(colour[name][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(ink, ground) for ink in ("ink", "soft", "accent", "erase") for ground in ("paper", "ground", "hold")]
    pairs += [
        ("on-accent", "accent"),
        ("paper", "erase"),
        ("user-ink", "user"),
        ("ink", "assistant"),
        ("ink", "mark"),
        ("erase", "erase-ground"),
    ]
    for ink, ground in pairs:
        low, high = sorted((light(ink), light(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)
