"""A server with OpenAI's API for one model: /v1/chat/completions, /v1/completions and /v1/models.

Clients of OpenAI work with it, after setting their base URL. The formats are described at
https://platform.openai.com/docs/api-reference. The model answers one request at a time, in the order of arrival. A
client that hangs up ends its request, and the next one is served.
"""

import asyncio
import json
import secrets
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import fastapi
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from litmoe.cli import UserError
from litmoe.data import conversations
from litmoe.data.conversations import Message
from litmoe.inference.chat import NO_SYSTEM_MESSAGE, NOT_TUNED
from litmoe.inference.generate import Model, Piece, Sampling, encode_prompt, stream_pieces
from litmoe.inference.http import is_loopback, is_private_name, run, url_of
from litmoe.inference.openai_requests import ApiError, ChatRequest, CompletionRequest, Options, invalid_request
from litmoe.inference.text_stream import StopStrings

# Pages that this computer serves may read the answers.
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def serve(model: Model, sampling: Sampling, seed: int | None, sock: socket.socket) -> None:
    """Serve the API at an address from `http.listen` until Ctrl-C.

    Args:
        model: from `litmoe.load`.
        sampling: settings for requests that do not have them.
        seed: of requests without one; if None, each gets another one.
        sock: from `http.listen`.
    """
    service = Service(model, sampling, seed)
    announcement = f"OpenAI's API: base URL {url_of(sock)}/v1, model {service.name}, any API key."
    if not service.is_tuned:
        announcement = f"{NOT_TUNED}\n{announcement}"
    run(make_app(service, local_only=is_loopback(sock.getsockname()[0])), sock, announcement)


def make_app(service: "Service", *, local_only: bool) -> fastapi.FastAPI:
    """Return the API as a web application; with ``local_only`` requests from pages of other sites are refused."""
    # Without FastAPI's pages about the interface, which load scripts from another server.
    app = fastapi.FastAPI(openapi_url=None)
    app.add_middleware(CORSMiddleware, allow_origin_regex=LOCAL_ORIGINS, allow_methods=["*"], allow_headers=["*"])
    if local_only:
        app.add_middleware(_LocalOnly)
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.model_named, methods=["GET"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/completions", service.complete, methods=["POST"])

    async def as_api_error(request: fastapi.Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = invalid_request(error.errors())
        elif isinstance(error, HTTPException):
            error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        elif isinstance(error, UserError):
            # The request was checked before, so this is a fault of the model: its output is not finite.
            error = ApiError(500, str(error))
        assert isinstance(error, ApiError)
        return JSONResponse(error.content, error.status)

    for kind in (ApiError, RequestValidationError, HTTPException, UserError):
        app.add_exception_handler(kind, as_api_error)
    return app


@dataclass
class Job:
    """A request that was checked, and what is to be generated for it."""

    request: fastapi.Request
    options: Options
    is_chat: bool
    prompt_tokens: int
    pieces: Generator[Piece, None, None]
    """Generates the answer during iteration."""
    fields: dict[str, Any]
    """Of the answer and of every part of a stream: id, time and model"""

    def answer(self, text: str, last: Piece) -> dict[str, Any]:
        """Return the complete answer."""
        kind = "text_completion"
        content: dict[str, Any] = {"text": text}
        if self.is_chat:
            kind, content = "chat.completion", {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {**self.fields, "object": kind, "choices": [_choice(content, last)], "usage": self.usage(last)}

    def chunk(self, text: str, last: Piece | None = None) -> dict[str, Any]:
        """Return a part of a stream; with ``last`` the reason of the end."""
        content: dict[str, Any] = {"text": text}
        if self.is_chat:
            content = {"delta": {} if last else {"content": text}}
        return self._event([_choice(content, last)])

    def first_chunk(self) -> dict[str, Any]:
        """Return the beginning of a stream of a chat, which names the role."""
        return self._event([_choice({"delta": {"role": "assistant", "content": ""}}, None)])

    def usage_chunk(self, last: Piece) -> dict[str, Any]:
        """Return the end of a stream with the numbers of tokens."""
        return {**self._event([]), "usage": self.usage(last)}

    def usage(self, last: Piece) -> dict[str, int]:
        """Return the numbers of tokens."""
        total = self.prompt_tokens + last.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": last.tokens, "total_tokens": total}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        event = {**self.fields, "object": kind, "choices": choices}
        # OpenAI sends a null in all other parts, if the client asks for the numbers.
        return {**event, "usage": None} if self.options.includes_usage else event


def _choice(content: dict[str, Any], last: Piece | None) -> dict[str, Any]:
    reason = None
    if last is not None:
        reason = "stop" if last.end == "end_of_text" else "length"
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


class Service:
    """The endpoints of the API, and the model that they share."""

    def __init__(self, model: Model, sampling: Sampling, seed: int | None) -> None:
        """Arguments as `serve`."""
        self.model, self.sampling, self.seed = model, sampling, seed
        # Such as quickstart/final. The complete path would tell clients about the folders of this computer.
        self.name = "/".join(model.folder.resolve().parts[-2:])
        self.style = conversations.load_prompt_style(model.folder)
        self.is_tuned = conversations.is_tuned(self.style)
        self.created = int(time.time())
        # One request at a time. asyncio's lock is fair: who waits longest is next.
        self.turn = asyncio.Lock()

    async def models(self) -> dict[str, Any]:
        """List the model."""
        return {"object": "list", "data": [await self.model_named(self.name)]}

    async def model_named(self, name: str) -> dict[str, Any]:
        """Describe the model."""
        self._check_name(name)
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "litmoe"}

    async def chat(self, body: ChatRequest, request: fastapi.Request) -> Response:
        """Answer the last message of a conversation."""
        prompt = self._chat_prompt(body.conversation())
        return await self._respond(self._job(request, body, prompt, body.max_completion_tokens or body.max_tokens))

    async def complete(self, body: CompletionRequest, request: fastapi.Request) -> Response:
        """Continue a text."""
        prompt = encode_prompt(self.model.tokenizer, body.prompt).tolist()
        return await self._respond(self._job(request, body, prompt, body.max_tokens))

    # --- from a request to a job

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404, f"The model {name!r} does not exist; this server has {self.name!r}.", "model", "model_not_found"
            )

    def _chat_prompt(self, messages: list[Message]) -> list[int]:
        if not self.is_tuned:
            # As in the terminal: a base model continues the newest text and does not read the messages before it.
            if any(message["role"] == "system" for message in messages):
                raise ApiError(400, f"messages: {NO_SYSTEM_MESSAGE}", "messages")
            return encode_prompt(self.model.tokenizer, messages[-1]["content"]).tolist()
        problem = conversations.problem_with(messages, last="user")
        if problem is not None:
            raise ApiError(400, f"messages: not a conversation: {problem}.", "messages")
        return conversations.encode_prompt(messages, self.model.tokenizer, self.style)

    def _job(self, request: fastapi.Request, body: Options, prompt: list[int], max_tokens: int | None) -> Job:
        if body.model:
            self._check_name(body.model)
        context = self.model.gpt.max_seq_length
        if len(prompt) > context:
            raise ApiError(
                400,
                f"The prompt has {len(prompt):,} tokens, and the context of the model is {context:,}. Shorten it.",
                "messages" if isinstance(body, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        is_chat = isinstance(body, ChatRequest)
        is_answer = is_chat and self.is_tuned
        pieces = stream_pieces(
            self.model.gpt,
            self.model.tokenizer,
            prompt,
            stop=conversations.stop_sequences(self.style, self.model.tokenizer) if is_answer else (),
            # Answers are tokenized on their own in training.
            join=not is_answer,
            seed=next(seed for seed in (body.seed, self.seed, secrets.randbits(63)) if seed is not None),
            **self._sampling(body, max_tokens),  # type: ignore[misc]
        )
        prefix = "chatcmpl" if is_chat else "cmpl"
        fields = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        return Job(request, body, is_chat, len(prompt), pieces, fields)

    def _sampling(self, body: Options, max_tokens: int | None) -> Sampling:
        sampling = self.sampling.copy()
        if max_tokens is not None:
            sampling["max_new_tokens"] = max_tokens
        if body.temperature is not None:
            sampling["temperature"] = body.temperature
        if body.top_p is not None:
            sampling["top_p"] = body.top_p
        if body.top_k is not None:
            sampling["top_k"] = body.top_k if body.top_k > 0 else None
        return sampling

    # --- from a job to a response

    async def _respond(self, job: Job) -> Response:
        if job.options.stream:
            return _EventStream(self._events(job), media_type="text/event-stream")
        text = ""
        async with aclosing(self._generate(job)) as pieces:
            async for piece in pieces:
                text += piece.text
                if piece.end is not None:
                    return JSONResponse(job.answer(text, piece))
        return Response(status_code=499)  # the client has disconnected, so this is not sent

    async def _events(self, job: Job) -> AsyncGenerator[str, None]:
        """Yield the events of a stream."""
        if job.is_chat:
            # At once, so that a client sees that its request was accepted while others are served.
            yield _event(job.first_chunk())
        try:
            async with aclosing(self._generate(job)) as pieces:
                async for piece in pieces:
                    if piece.text:
                        yield _event(job.chunk(piece.text))
                    if piece.end is not None:
                        yield _event(job.chunk("", piece))
                        if job.options.includes_usage:
                            yield _event(job.usage_chunk(piece))
                        yield "data: [DONE]\n\n"
        except UserError as error:
            # The status was sent with the first event.
            yield _event(ApiError(500, str(error)).content)

    async def _generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Yield the answer in pieces when it is the turn of the request; end early if the client hangs up."""
        stop = StopStrings(job.options.stop)
        async with self.turn:
            with closing(job.pieces):
                while not await job.request.is_disconnected():
                    # In a thread, so that the server accepts requests meanwhile.
                    piece = await run_in_threadpool(next, job.pieces)
                    text, stopped = stop.push(piece.text)
                    if stopped:
                        piece = piece._replace(end="end_of_text")
                    elif piece.end is not None:
                        text += stop.held
                    yield piece._replace(text=text)
                    if piece.end is not None:
                        return


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _EventStream(StreamingResponse):
    """A stream that ends its generator when the client hangs up, and not only when Python collects it."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


class _LocalOnly:
    """Refuse requests that pages of other sites send through the user's browser.

    A page may let its own name lead to 127.0.0.1 (DNS rebinding). Then the browser takes this server for the server of
    the page, and only the name in the header ``Host`` tells the difference.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = _hostname(f"//{headers.get('host', '')}"), headers.get("origin")
            problem = None
            if not is_private_name(host):
                problem = f"This server is for this computer, and the request names the host {host!r}."
            elif origin is not None and not is_loopback(_hostname(origin)):
                problem = f"A page of {origin!r} may not use this server."
            if problem is not None:
                await JSONResponse(ApiError(403, problem).content, 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # a bracket that is not closed
        return ""
