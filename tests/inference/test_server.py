"""The server with OpenAI's API, used by OpenAI's own client."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from litgpt.prompts import Phi2

from litmoe import load
from litmoe.config import PROJECT
from litmoe.inference.chat import Chat
from litmoe.inference.generate import Model, Sampling
from litmoe.inference.http import is_private_name, listen, url_of
from litmoe.inference.server import Service, make_app
from litmoe.inference.text_stream import StopStrings
from tests.helpers import CPU_FP32, DENSE_FIELDS, save_tiny, wordy_gpt

SAMPLING = Sampling(max_new_tokens=30, temperature=0.8, top_k=50, top_p=1.0)
# An answer of this length takes minutes.
CONTEXT = 1 << 16
QUESTION: Any = [{"role": "user", "content": "Who is Mia?"}]
FIELDS = dict(
    name="tiny",
    block_size=CONTEXT,
    padded_vocab_size=384,
    n_layer=2,
    n_embd=32,
    n_head=4,
    norm_class_name="RMSNorm",
    bias=False,
    rotary_percentage=1.0,
    **DENSE_FIELDS,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Model]:
    """A finetuned and a base model, which write words and never end an answer."""
    folders = {
        name: save_tiny(tmp_path_factory.mktemp(name) / name / "final", wordy_gpt(FIELDS), tokenizer_dir, **kwargs)
        for name, kwargs in (("tuned", {"prompt_style": Phi2()}), ("base", {}))
    }
    return {name: load(folder, **CPU_FP32) for name, folder in folders.items()}


@contextmanager
def served(model: Model) -> Iterator[openai.OpenAI]:
    """Serve a model on a port of this computer and return a client."""
    with listen("127.0.0.1", 0) as sock:
        app = make_app(Service(model, SAMPLING, None), local_only=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            yield openai.OpenAI(base_url=f"{url_of(sock)}/v1", api_key="any", max_retries=0, timeout=100)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def tuned(models: dict[str, Model]) -> Iterator[openai.OpenAI]:
    with served(models["tuned"]) as client:
        yield client


@pytest.fixture(scope="module")
def base(models: dict[str, Model]) -> Iterator[openai.OpenAI]:
    with served(models["base"]) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    """Return the answer to QUESTION."""
    fields = {"model": "", "messages": QUESTION} | fields
    return client.chat.completions.create(**fields)


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content


def read_stream(stream: Any) -> tuple[str, str]:
    """Return the text of a stream and the reason of its end."""
    text, reason = "", None
    for chunk in stream:
        assert reason is None, "nothing comes after the end"
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason
    assert reason is not None
    return text, reason


# ------------------------------------------------------------------------------------------------------------- answers


def test_answer_equals_the_terminal_chat(tuned: openai.OpenAI, models: dict[str, Model]) -> None:
    chat = Chat(models["tuned"], seed=3)
    chat.system = "You are a fox."
    expected = [("".join(reply), reply.tokens, len(reply.prompt)) for reply in map(chat.ask, ("Who is Mia?", "Why?"))]
    messages = [{"role": "system", "content": "You are a fox."}, *QUESTION]
    answer = ask(tuned, messages=messages, seed=3, max_tokens=256)
    assert (text_of(answer), answer.usage.completion_tokens, answer.usage.prompt_tokens) == expected[0]
    assert answer.usage.total_tokens == expected[0][1] + expected[0][2]
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == (
        "chat.completion",
        "tuned/final",
        "length",
    )

    # The client sends the conversation back, also as the parts of newer clients.
    parts = [{"type": "text", "text": "W"}, {"type": "text", "text": "hy?"}]
    messages += [{"role": "assistant", "content": expected[0][0]}, {"role": "user", "content": parts}]
    messages[0]["role"] = "developer"
    greedy = Chat(models["tuned"], chat.messages[:2])
    greedy.system = "You are a fox."
    again = ask(tuned, messages=messages, temperature=0, max_completion_tokens=20)
    assert text_of(again) == "".join(greedy.ask("Why?", temperature=0.0, max_new_tokens=20))


def test_stream_equals_the_answer(tuned: openai.OpenAI) -> None:
    answer = ask(tuned, seed=7)
    assert read_stream(ask(tuned, seed=7, stream=True)) == (text_of(answer), "length")
    chunks = list(ask(tuned, seed=7, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "length"


def test_stream_is_sent_token_by_token(tuned: openai.OpenAI) -> None:
    response = ask(tuned.with_raw_response, stream=True, temperature=0, max_tokens=5)  # type: ignore[arg-type]
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.http_response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    # The role, the tokens that have a text, and the end.
    assert 5 <= len(events) <= 7 and {event["object"] for event in events} == {"chat.completion.chunk"}


def test_sampling_settings(tuned: openai.OpenAI) -> None:
    texts = [text_of(ask(tuned, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({text_of(ask(tuned)) for _ in range(3)}) > 1, "without a seed the answers differ"
    greedy = text_of(ask(tuned, temperature=0))
    assert {text_of(ask(tuned, top_p=0)), text_of(ask(tuned, extra_body={"top_k": 1}))} == {greedy}
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(tuned, temperature=0, **{name: 4})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (4, "length")
        assert greedy.startswith(text_of(answer))


def test_stop_across_tokens(tuned: openai.OpenAI) -> None:
    text = text_of(ask(tuned, temperature=0))
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(tuned, temperature=0, stream=True)]
    # The end of one token and the beginning of the next.
    before = "".join(pieces[:6])
    stop = before[-1] + pieces[6][:2]
    expected = text[: text.index(stop)]
    for stops in (stop, ["never", stop], [stop, text[len(expected) : len(expected) + 9], "x" * 50]):
        answer = ask(tuned, temperature=0, stop=stops)
        assert (text_of(answer), answer.choices[0].finish_reason) == (expected, "stop")
        assert read_stream(ask(tuned, temperature=0, stop=stops, stream=True)) == (expected, "stop")
    # What was held back until the end is text.
    assert text_of(ask(tuned, temperature=0, stop=text[-3:] + "?")) == text


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_strings_in_any_division(size: int) -> None:
    text, strings = "aab aabc abcabd end", ["abcabd", "xyz", "aabd"]
    stops, result, stopped = StopStrings(strings), "", False
    for start in range(0, len(text), size):
        certain, stopped = stops.push(text[start : start + size])
        result += certain
        if stopped:
            break
    assert (result, stopped) == ("aab aabc ", True)
    stops = StopStrings(["end."])
    assert [stops.push("the e"), stops.push("nd"), stops.held] == [("the ", False), ("", False), "end"]


def test_end_of_text_is_a_stop(models: dict[str, Model], tokenizer_dir: Path, tmp_path: Path) -> None:
    gpt = wordy_gpt(FIELDS)
    with torch.no_grad():
        gpt.lm_head.weight[0] = 2 * gpt.lm_head.weight[260:360].mean(0)
    model = load(save_tiny(tmp_path / "final", gpt, tokenizer_dir, prompt_style=Phi2()), **CPU_FP32)
    with served(model) as client:
        answers = [ask(client, seed=seed, max_tokens=2000) for seed in range(8)]
    assert "stop" in {answer.choices[0].finish_reason for answer in answers}
    assert all("<|endoftext|>" not in text_of(answer) for answer in answers)


def test_base_model_continues_the_newest_text(base: openai.OpenAI, models: dict[str, Model]) -> None:
    expected = models["base"].generate("Who is Mia?", max_new_tokens=10, temperature=0.0)
    messages = [{"role": "user", "content": "Ignored"}, {"role": "assistant", "content": "too"}, *QUESTION]
    assert "Who is Mia?" + text_of(ask(base, messages=messages, temperature=0, max_tokens=10)) == expected
    with pytest.raises(openai.BadRequestError, match="base model, which does not use a system message"):
        ask(base, messages=[{"role": "system", "content": "You are a fox."}, *QUESTION])


def test_completions(base: openai.OpenAI, models: dict[str, Model]) -> None:
    expected = (
        models["base"].generate("Once upon", max_new_tokens=10, temperature=0.5, seed=9).removeprefix("Once upon")
    )
    options: Any = dict(model="base/final", max_tokens=10, temperature=0.5, seed=9)
    answer = base.completions.create(prompt="Once upon", **options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason, answer.object) == (
        expected,
        "length",
        "text_completion",
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 10
    chunks = list(base.completions.create(prompt=["Once upon"], stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert base.completions.create(prompt="", **options).choices[0].text
    with pytest.raises(openai.BadRequestError, match="expected one text"):
        base.completions.create(prompt=["a", "b"], **options)


# ------------------------------------------------------------------------------------------------------------- clients


def test_requests_at_the_same_time(tuned: openai.OpenAI) -> None:
    expected = [text_of(ask(tuned, seed=seed)) for seed in range(6)]
    with ThreadPoolExecutor(6) as threads:
        streams = threads.map(lambda seed: read_stream(ask(tuned, seed=seed, stream=True))[0], range(6))
        assert list(streams) == expected


def test_hang_up_frees_the_model(tuned: openai.OpenAI) -> None:
    """A streaming client, one that waits for its turn, and one that waits for a complete answer."""
    endless = {"max_tokens": CONTEXT}
    stream = ask(tuned, stream=True, **endless)
    assert len([next(iter(stream)) for _ in range(3)]) == 3
    waiting = ask(tuned, stream=True, **endless)
    assert next(iter(waiting)).choices[0].delta.role == "assistant", "it was accepted"
    waiting.close()
    stream.close()
    assert ask(tuned, max_tokens=2).usage.completion_tokens == 2
    with pytest.raises(openai.APITimeoutError):
        ask(tuned.with_options(timeout=1.0), **endless)
    assert ask(tuned, max_tokens=2).usage.completion_tokens == 2


def test_models(tuned: openai.OpenAI) -> None:
    assert [model.id for model in tuned.models.list()] == ["tuned/final"]
    assert tuned.models.retrieve("tuned/final").object == "model"
    assert text_of(ask(tuned, model="tuned/final"))
    for call in (lambda: tuned.models.retrieve("gpt-4"), lambda: ask(tuned, model="gpt-4")):
        with pytest.raises(
            openai.NotFoundError, match="'gpt-4' does not exist; this server has 'tuned/final'"
        ) as caught:
            call()
        assert caught.value.code == "model_not_found"


# -------------------------------------------------------------------------------------------------------------- errors


def test_prompt_over_the_context(models: dict[str, Model]) -> None:
    model = models["tuned"]
    short = load(model.folder, max_seq_length=64, **CPU_FP32)
    with served(short) as client:
        long: Any = [{"role": "user", "content": "Mia is a fox. " * 40}]
        for stream in (False, True):
            with pytest.raises(
                openai.BadRequestError, match=r"has \d+ tokens, and the context of the model is 64"
            ) as caught:
                ask(client, messages=long, stream=stream)
            assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        # An answer that is longer than the rest of the context is cut.
        answer = ask(client, max_tokens=1000)
        assert answer.usage.total_tokens == 65 and answer.choices[0].finish_reason == "length"


USER = QUESTION[0]
REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "two answers": ({"n": 2}, "one answer is returned", "n"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "does not call tools", "tools"),
    "tool result": ({"messages": [USER, {"role": "tool", "content": "1"}]}, "does not call tools", "messages"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        "only text",
        "messages",
    ),
    "log probabilities": ({"logprobs": True}, "not returned", "logprobs"),
    "json": ({"response_format": {"type": "json_object"}}, "format of the answer", "response_format"),
    "penalty": ({"presence_penalty": 0.5}, "penalties", "presence_penalty"),
    "temperature": ({"temperature": 2.5}, "less than or equal to 2", "temperature"),
    "max_tokens": ({"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
    "seed": ({"seed": 2**64}, "less than", "seed"),
    "five stops": ({"stop": list("abcde")}, "at most 4", "stop"),
    "empty stop": ({"stop": ""}, "at least 1 character", "stop.0"),
    "no messages": ({"messages": []}, "at least 1 item", "messages"),
    "role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        "'system', 'user' or 'assistant'",
        "messages.0.role",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "Field required", "messages.0.content"),
    "last is an answer": (
        {"messages": [USER, {"role": "assistant", "content": "A fox."}]},
        "does not end with a message of the user",
        "messages",
    ),
    "two questions": ({"messages": [USER, USER]}, "expected assistant's", "messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_requests(name: str, models: dict[str, Model]) -> None:
    fields, message, param = REFUSED[name]
    client = TestClient(make_app(Service(models["tuned"], SAMPLING, None), local_only=False))
    body = json.dumps({"messages": QUESTION} | fields)
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"] and (error["type"], error["param"]) == ("invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}


def test_neutral_and_unknown_fields_are_accepted(models: dict[str, Model]) -> None:
    client = TestClient(make_app(Service(models["tuned"], SAMPLING, None), local_only=False))
    neutral = {"n": 1, "tools": None, "logprobs": False, "response_format": {"type": "text"}, "presence_penalty": 0.0}
    nulls = dict.fromkeys(("temperature", "top_p", "max_tokens", "seed", "stop", "stream", "stream_options", "model"))
    body = {"messages": QUESTION, **neutral, **nulls, "user": "me", "store": False}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    # JSON can write half of a surrogate pair, which UTF-8 cannot.
    broken = r'{"messages": [{"role": "user", "content": "\ud800"}], "user": "\ud800"}'
    json_type = {"content-type": "application/json"}
    assert client.post("/v1/chat/completions", content=broken, headers=json_type).status_code == 200
    assert client.post("/v1/chat/completions", content=r'{"model": "\ud800"}', headers=json_type).status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"null", b"[]", b"[" * 50_000, b'"x"', b"{}"])
def test_bodies_that_are_no_request(body: bytes, models: dict[str, Model]) -> None:
    client = TestClient(make_app(Service(models["tuned"], SAMPLING, None), local_only=False))
    for route in ("/v1/chat/completions", "/v1/completions"):
        answer = client.post(route, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_unknown_route_and_method(tuned: openai.OpenAI) -> None:
    for method, route, status in (("GET", "embeddings", 404), ("GET", "chat/completions", 405)):
        answer = httpx.request(method, f"{tuned.base_url}{route}")
        assert answer.status_code == status and route in answer.json()["error"]["message"]


def test_model_that_diverged(tokenizer_dir: Path, tmp_path: Path) -> None:
    gpt = wordy_gpt(FIELDS)
    with torch.no_grad():
        gpt.lm_head.weight.fill_(float("nan"))
    with served(load(save_tiny(tmp_path / "final", gpt, tokenizer_dir), **CPU_FP32)) as client:
        with pytest.raises(openai.InternalServerError, match="NaN"):
            ask(client)
        with pytest.raises(openai.APIError, match="NaN"):
            list(ask(client, stream=True))


# ------------------------------------------------------------------------------------------------- pages of other sites


def test_other_sites_are_refused(tuned: openai.OpenAI) -> None:
    url = f"{tuned.base_url}models"
    for headers in (
        {"host": "example.com"},
        {"host": "localhost.example.com"},
        {"host": "["},
        {"origin": "https://example.com"},
        {"origin": "null"},
    ):
        answer = httpx.get(url, headers=headers)
        assert answer.status_code == 403 and answer.json()["error"]["message"], headers
    page = "http://localhost:3000"
    for host in ("localhost:8000", "[::1]:8000", "host.docker.internal:7860", "127.0.0.1"):
        answer = httpx.get(url, headers={"host": host, "origin": page})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == page
    asked = {"origin": page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert httpx.options(f"{tuned.base_url}chat/completions", headers=asked).status_code == 200
    # A browser sends such a request of any page without asking the server first.
    body = json.dumps({"messages": QUESTION}).encode()
    plain = httpx.post(f"{tuned.base_url}chat/completions", content=body, headers={"content-type": "text/plain"})
    assert plain.status_code == 400


def test_private_names() -> None:
    names = ("localhost", "a.localhost", "127.0.0.1", "::1", "10.0.0.7", "host.docker.internal", "", "example.com")
    assert [is_private_name(name) for name in names] == [*[True] * 6, False, False]


# ------------------------------------------------------------------------------------------------------------- process


@pytest.mark.slow
def test_process_serves_until_ctrl_c(models: dict[str, Model]) -> None:
    command = [sys.executable, str(PROJECT / "chat.py"), str(models["base"].folder), "--serve", "--port=0"]
    server = subprocess.Popen(
        [*command, "--device", "cpu", "--max_new_tokens", "7"], stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert server.stdout is not None
    assert server.stdout.readline().startswith("This is a base model")
    line = server.stdout.readline()
    url = re.search(r"base URL (http://127\.0\.0\.1:\d+/v1), model base/final", line)
    assert url is not None, line
    client = openai.OpenAI(base_url=url[1], api_key="any", max_retries=0)
    assert ask(client).usage.completion_tokens == 7
    server.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
    assert server.wait(60) in ((0, 130) if os.name != "nt" else (1,)), "Ctrl-C stops the server without a traceback"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--web", "--serve"], "two servers"),
        (["--port", "1"], "add --web for the page, or --serve"),
        (["--serve", "--compare", "x"], "add --web"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], message: str) -> None:
    result = subprocess.run(
        [sys.executable, str(PROJECT / "chat.py"), *flags], capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 1 and message in result.stderr
