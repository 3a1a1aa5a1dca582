"""The chat page in a real browser: two models answer, no input is executed, and nothing is sent elsewhere."""

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from litgpt import Tokenizer
from litgpt.prompts import Phi2

from litmoe.cli import UserError
from litmoe.config import PROJECT
from litmoe.data.conversations import Message
from litmoe.inference.chat import Chat
from litmoe.inference.generate import Model, Sampling, load
from litmoe.inference.http import is_loopback, listen
from tests.helpers import load_script, save_tiny, tiny_gpt
from tests.no_skips import find_browser

SAMPLING = Sampling(max_new_tokens=30, temperature=0.8, top_k=50, top_p=1.0)
HOSTILE = (
    '<script>window.ran = 1</script><img src="http://192.0.2.1/x.png" onerror="window.ran = 1"> **bold** $x$ '
    "![remote](http://192.0.2.1/y.png) [link](javascript:window.ran=1) \x00\x1b[2J\x07 &lt;b&gt;"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> list[Path]:
    """A finetuned and a base model, tiny, which write printable text and never end an answer."""
    fields = dict(
        name="tiny",
        block_size=8192,  # an answer takes minutes
        padded_vocab_size=384,
        n_layer=2,
        n_embd=32,
        n_head=4,
        mlp_class_name="LLaMAMLP",
        intermediate_size=48,
        norm_class_name="RMSNorm",
        bias=False,
        rotary_percentage=1.0,
    )
    tokenizer = Tokenizer(tokenizer_dir)
    result = []
    for seed, style in ((0, Phi2()), (1, None)):
        gpt = tiny_gpt(fields, seed)
        with torch.no_grad():
            for token in range(384):
                text = tokenizer.decode(torch.tensor([token])) if token < tokenizer.vocab_size else ""
                if not re.fullmatch(r" ?[A-Za-z]+", text):
                    gpt.lm_head.weight[token] = 0
        folder = tmp_path_factory.mktemp("web") / "final"
        result.append(save_tiny(folder, gpt, tokenizer_dir, prompt_style=style))
    return result


def _greedy(folder: Path, question: str, tokens: int = 30) -> str:
    model = load(folder, device="cpu")
    return "".join(Chat(model).ask(question, temperature=0.0, max_new_tokens=tokens))


# ------------------------------------------------------------------------------------------------- without a browser


def test_page_loads_nothing_from_elsewhere(folders: list[Path]) -> None:
    from fastapi.testclient import TestClient

    from litmoe.inference.web import CONTENT_POLICY, make_app

    client = TestClient(make_app([load(folder, device="cpu") for folder in folders], SAMPLING, None))
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-security-policy"] == CONTENT_POLICY and "'self'" in CONTENT_POLICY
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//(?!testserver)""", page.text)
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert not config["stylesheets"], "it uses fonts of the system"
    assert all(event["api_visibility"] == "private" for event in config["dependencies"])


def test_answers_are_generated_together(folders: list[Path]) -> None:
    from litmoe.inference.web import _together

    replies = [
        Chat(load(folder, device="cpu")).ask("Mia", temperature=0.0, max_new_tokens=size)
        for folder, size in zip(folders, (3, 8), strict=True)
    ]
    assert len(list(_together(replies))) >= 1
    assert [reply.tokens for reply in replies] == [3, 8]
    assert [reply.text for reply in replies] == [_greedy(folders[0], "Mia", 3), _greedy(folders[1], "Mia", 8)]


def _event(models: list[Model], name: str, sampling: Sampling = SAMPLING) -> Any:
    """Return an event handler of the page."""
    from litmoe.inference.web import build

    return next(event.fn for event in build(models, sampling, None).fns.values() if event.name == name)


def test_one_question_at_a_time(folders: list[Path]) -> None:
    import gradio as gr

    begin = _event([load(folders[0], device="cpu")], "begin")
    asked, busy, _, said, _ = begin("Who?", False, [[]])
    assert (asked, busy) == ("Who?", True)
    with pytest.raises(gr.Error, match="Wait for the answer"):
        begin("And now?", busy, said)
    with pytest.raises(gr.Error, match="question is empty"):
        begin(" ", False, said)


def test_empty_answer_is_removed(folders: list[Path]) -> None:
    """Stopped before the first token, or the model fails: the question goes back to the box, with the error."""
    model = load(folders[0], device="cpu")
    earlier = [Message(role="user", content="Hi"), Message(role="assistant", content="Hello")]
    conversations = [[*earlier, Message(role="user", content="Who?"), Message(role="assistant", content="")]]
    busy, box, left, *_ = _event([model], "stop")(conversations)
    assert (busy, box["value"] if isinstance(box, dict) else box.value, left) == (False, "Who?", [earlier])
    with torch.no_grad():
        model.gpt.lm_head.weight.fill_(float("nan"))
    box, left, _, caption = list(_event([model], "answer")("Who?", True, conversations, 1.0, 0, 1.0, 5, "", ""))[-1]
    assert (box["value"] if isinstance(box, dict) else box.value, left) == ("Who?", [earlier])
    assert "NaN" in caption
    caption = list(_event([model], "answer")("Who?", True, conversations, 1.0, 0, 1.0, 5, str(2**64), ""))[-1][-1]
    assert "at most 64 bits" in caption


def test_sliders_reach_the_given_settings() -> None:
    from litmoe.inference.web import _settings

    given = Sampling(max_new_tokens=4000, temperature=3.0, top_k=500, top_p=1.0)
    assert [slider.preprocess(slider.value) for slider in _settings(given, None, True)[:4]] == [3.0, 500, 1.0, 4000]


def test_serves_only_this_computer_by_default() -> None:
    defaults = {name: found.default for name, found in inspect.signature(load_script("chat").main).parameters.items()}
    with listen(defaults["host"], 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


def test_refuses_a_used_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=r"Use another --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    for port in (-1, 65536):
        with pytest.raises(UserError, match=f"--port is {port}; expected 0"):
            listen("127.0.0.1", port)
    assert [is_loopback(host) for host in ("localhost", "::1", "127.0.0.1", "0.0.0.0", "::", "example.com")] == [
        *[True] * 3,
        *[False] * 3,
    ]


SECRET = "this file is private"


def _asked(model: Model, question: str) -> list[Any]:
    """Return what the page shows in the end: box, conversations, messages as HTML, caption."""
    said = _event([model], "begin")(question, False, [[]])[3]
    return list(_event([model], "answer")(question, True, said, 0.8, 50, 1.0, 5, "", ""))[-1]


@pytest.mark.parametrize(
    "question",
    [
        *(
            "\x00",
            "\x00" * 1000,
            "\ud800",
            "a\udfff\ud800b",
            HOSTILE,
            "\u202e\u2066 \U0010ffff \ufffe",
            "<|endoftext|>" * 50,
        ),
        *(
            pytest.param("x" * 2_000_000, marks=pytest.mark.slow),
            "<b>" * 300_000,
            bytes(range(256)).decode("latin-1") * 5,
        ),
    ],
    ids=lambda text: f"{len(text)} characters",
)
def test_hostile_questions_are_answered_or_refused(question: str, folders: list[Path]) -> None:
    box, said, shown, caption = _asked(load(folders[0], device="cpu"), question)
    for text in (json.dumps(said), json.dumps(shown), caption):
        text.encode("utf-8")  # what is sent to the browser
    assert "tokens/s" in caption or "class='wrong'" in caption
    assert all(
        "<" not in message["content"] and ">" not in message["content"] for column in [shown] for message in column
    )
    if "wrong" in caption:
        assert (box["value"] if isinstance(box, dict) else box.value) == question, "the question can be shortened"


def test_html_of_a_model_is_shown_as_text() -> None:
    from litmoe.inference.web import _as_html

    said = [[Message(role="user", content="?"), Message(role="assistant", content=HOSTILE)]]
    (shown,) = _as_html(said)
    assert "<" not in shown[1]["content"] and "&lt;script&gt;window.ran = 1&lt;/script&gt;" in shown[1]["content"]


def test_requests_read_no_files(folders: list[Path], tmp_path: Path) -> None:
    """Paths outside the page, bodies that are not JSON or have other fields, many at once; the server survives."""
    from concurrent.futures import ThreadPoolExecutor

    from fastapi.testclient import TestClient

    from litmoe.inference.web import make_app

    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET, encoding="utf-8")
    path = secret.as_posix().removeprefix("/")
    up = "../" * 20
    api = "/gradio_api"
    app = make_app([load(folders[0], device="cpu")], SAMPLING, None)
    starts = [f"{api}/file=", "/file=", "/static/", "/assets/", "/svelte/", "/custom_component/", f"{api}/proxy=", "/"]
    names = [path, f"/{path}", *(f"{up}{path}".replace("/", slash) for slash in ("/", "%2f", "\\"))]
    names = [
        coded for name in names for coded in (name, name.replace("..", "%2e%2e"), f"file://{name}", f"{name}%00.svg")
    ]
    with TestClient(app, raise_server_exceptions=False) as client:
        events = client.get("/config").json()["dependencies"]
        begin = next(event["id"] for event in events if event["api_name"] == "begin")
        for address in (start + name for start in starts for name in names):
            answer = client.get(address)
            assert SECRET not in answer.text and answer.status_code != 200, address
        assert client.post(f"{api}/upload", files={"files": ("../../up.txt", b"x" * 100_000)}).status_code == 413
        calls = [
            {"fn_index": number, "data": data, "session_hash": session}
            for number, data, session in (
                (begin, [], "a"),
                (begin, [{"a": 1}, [1], "x"], "\ud800"),
                (begin, ["\ud800", None, None], "x" * 10**5),
                (-1, ["Who?", False, None], "a"),
                (10**10, None, "a"),
            )
        ]
        no_json = [
            b"",
            b"{",
            b"\xff\xfe\x00",
            b"[" * 100_000,
            b'{"a":' * 10_000,
            b"nan",
            b"null",
            b"[]",
            b'"' + b"x" * 10**6,
        ]
        bodies = [*no_json, *(json.dumps(call).encode() for call in calls)]
        routes = [
            f"{api}/{name}"
            for name in ("queue/join", "run/predict", "api/predict", "reset", "cancel", "component_server")
        ]

        def post(route: str, body: bytes) -> int:
            return client.post(route, content=body, headers={"content-type": "application/json"}).status_code

        with ThreadPoolExecutor(16) as threads:
            codes = list(threads.map(post, *zip(*((route, body) for route in routes for body in bodies), strict=True)))
        assert len(codes) == len(routes) * len(bodies)
        assert client.get("/").status_code == 200 and client.get("/config").status_code == 200
        asked = {"fn_index": begin, "data": ["Who?", False, None], "session_hash": "a new one"}
        assert client.post(f"{api}/run/predict", json=asked).json()["data"][4][0]["content"][0]["text"] == "Who?"


# ------------------------------------------------------------------------------------------------------- the browser

browser_test = pytest.mark.skipif(find_browser() is None, reason="needs a Chromium browser")


@pytest.fixture(scope="module")
def address(folders: list[Path]) -> Iterator[str]:
    """The page with both models, served by the script itself."""
    command = [
        sys.executable,
        str(PROJECT / "chat.py"),
        str(folders[0]),
        "--compare",
        str(folders[1]),
        "--web",
        "--port=0",
    ]
    server = subprocess.Popen(
        [*command, "--device", "cpu", "--max_new_tokens", "30"], stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found is not None, line
    yield found.group()
    server.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
    assert server.wait(60) in ((0, 130) if os.name != "nt" else (1,)), "Ctrl-C stops the server without a traceback"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # no sandbox as root in a container; these pages are our own
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A tab of the browser."""

    def __init__(self, browser: Any, address: str) -> None:
        self.tab = browser.new_page(viewport={"width": 1280, "height": 800})
        self.tab.set_default_timeout(120_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(address)
        self.ready()

    def ready(self) -> None:
        self.tab.wait_for_selector("#question .submit-button")

    def settled(self, expression: str) -> Any:
        """Return its value when it has not changed for half a second, so that pending updates have arrived."""
        for _ in range(40):
            before = self.tab.evaluate(expression)
            self.tab.wait_for_timeout(500)
            if self.tab.evaluate(expression) == before:
                return before
        raise AssertionError(f"{expression} keeps changing")

    def set(self, label: str, value: float) -> None:
        box = self.tab.get_by_label(f"number input for {label}")
        box.fill(str(value))
        box.press("Tab")

    def ask(self, question: str) -> None:
        self.tab.fill("#question textarea", question)
        self.tab.press("#question textarea", "Enter")

    def texts(self, role: str, column: int = 0) -> list[str]:
        return [
            text.strip() for text in self.tab.locator(".talk").nth(column).locator(f".message.{role}").all_inner_texts()
        ]

    def wait(self, condition: str, argument: Any = None) -> None:
        self.tab.wait_for_function(condition, arg=argument)

    def answered(self, answers: int) -> None:
        """Wait until both columns have this many complete answers."""
        self.wait(
            "n => [...document.querySelectorAll('.talk')].every(t => t.querySelectorAll('.message.bot').length == n)"
            " && [...document.querySelectorAll('.caption .prose')].every(c => c.innerText.includes('tokens/s'))",
            answers,
        )
        self.ready()

    def captions(self) -> list[str]:
        return self.tab.locator(".caption .prose").all_inner_texts()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    page = Page(browser, address)
    yield page
    page.tab.close()
    away = {url for url in page.requests if urlsplit(url).scheme not in ("data", "blob")}
    assert away and all(urlsplit(url).hostname == "127.0.0.1" for url in away)
    assert not page.errors


LONGEST = "Math.max(...[...document.querySelectorAll('.talk .message.bot')].map(m => m.innerText.length))"


@browser_test
@pytest.mark.slow
def test_answers_equal_generate(page: Page, folders: list[Path]) -> None:
    page.set("Temperature", 0)
    page.ask("Where did Mia go?")
    page.answered(1)
    expected = [_greedy(folder, "Where did Mia go?").strip() for folder in folders]  # as `texts`
    assert [page.texts("bot", column) for column in range(2)] == [[text] for text in expected]
    written = load(folders[1], device="cpu").generate("Where did Mia go?", max_new_tokens=30, temperature=0.0)
    assert written.removeprefix("Where did Mia go?").strip() == expected[1]
    assert page.texts("user") == ["Where did Mia go?"]
    assert all("30 tokens, " in caption and "cut at max_new_tokens" in caption for caption in page.captions())
    headings = page.tab.locator(".chat h1").all_inner_texts()
    assert headings == [folder.as_posix() for folder in folders]
    assert page.tab.locator(".note").all_inner_texts()[0].startswith("This is a base model")
    for button, left in (("Retry", 1), ("Undo", 0)):
        page.tab.get_by_role("button", name=button).click()
        page.wait("n => document.querySelectorAll('.talk .message.bot').length == 2 * n", left)
        page.ready()
    assert page.tab.input_value("#question textarea") == "Where did Mia go?"
    page.tab.press("#question textarea", "Enter")
    page.answered(1)
    assert page.texts("bot", 1) == [expected[1]]
    page.tab.get_by_role("button", name="Clear").click()
    page.wait("() => document.querySelectorAll('.talk .message').length == 0")


@browser_test
@pytest.mark.slow
def test_answer_can_be_stopped(page: Page) -> None:
    page.set("Longest answer", 8000)
    page.ask("Who?")
    page.wait(f"() => {LONGEST} > 10")
    first = page.tab.evaluate(LONGEST)
    page.wait(f"n => {LONGEST} > n + 50", first)
    # Click within the page: a locator waits until the button does not move, and on a busy machine the answer may be
    # complete by then.
    page.tab.evaluate("document.querySelector('#question .stop-button').click()")
    page.wait("() => document.querySelector('.caption').innerText.includes('stopped')")
    page.ready()
    stopped = page.settled(LONGEST)
    page.set("Longest answer", 5)
    page.ask("And then?")
    page.answered(2)
    assert page.tab.evaluate(LONGEST) == stopped, "no token was added after the stop"


@browser_test
@pytest.mark.slow
def test_input_is_shown_as_text(page: Page) -> None:
    page.ask(HOSTILE)
    page.answered(1)
    shown = page.texts("user")[0]
    for literal in (
        "<script>window.ran = 1</script>",
        "<img src=",
        "**bold**",
        "![remote](http://",
        "$x$",
        "&lt;b&gt;",
    ):
        assert literal in shown
    assert page.tab.evaluate("window.ran") is None
    assert page.tab.locator(".talk .message img, .talk .message script, .talk .message a").count() == 0
    page.ask("x" * 200_000)
    page.tab.wait_for_selector(".caption .wrong")
    assert "expected at most" in page.captions()[0]
    page.ready()
    assert len(page.tab.input_value("#question textarea")) == 200_000, "the question can be shortened"
    assert page.texts("user") == [shown]
    page.tab.get_by_label("Seed").fill("<b>seven</b>")
    page.ask("Who?")
    page.wait("() => document.querySelector('.caption .wrong').innerText.includes('seed')")
    assert "'<b>seven</b>'" in page.captions()[0]


@browser_test
@pytest.mark.slow
def test_two_tabs_and_a_closed_one(browser: Any, address: str, page: Page) -> None:
    closed = Page(browser, address)
    closed.set("Longest answer", 1900)
    closed.ask("Who?")
    closed.wait(f"() => {LONGEST} > 10")
    closed.tab.close()
    other = Page(browser, address)
    for tab, seed in ((page, "1"), (other, "1")):
        tab.tab.get_by_label("Seed").fill(seed)
        tab.ask("Where did Tom go?")
    for tab in (page, other):
        tab.answered(1)
    assert page.texts("bot") == other.texts("bot") and page.texts("bot", 1) == other.texts("bot", 1)
    other.tab.close()


@browser_test
@pytest.mark.slow
def test_page_fits_a_phone(page: Page) -> None:
    page.tab.set_viewport_size({"width": 390, "height": 844})
    page.ask("Where did Mia go?")
    page.answered(1)
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 390
