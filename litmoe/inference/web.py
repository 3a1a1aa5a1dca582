"""The chat on a web page with Gradio: one model, or two that answer the same questions side by side.

Gradio's ChatInterface serves one model per page, so the page is built from its parts. Questions and answers are shown
as text, never as HTML or Markdown. The page needs no network: it uses the fonts of the system, sends no statistics, and
a content policy forbids the browser to load anything from elsewhere.
"""

import html
import socket
import time
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from starlette.types import ASGIApp, Receive, Scope, Send

from litmoe.cli import UserError
from litmoe.data.conversations import Message
from litmoe.inference.chat import NOT_TUNED, Chat, Reply, describe
from litmoe.inference.generate import Model, Sampling
from litmoe.inference.http import run, url_of

QUESTIONS = (
    "Write a story about a mole named Milo who is afraid of the dark.",
    "Write a story about a lost scarf.",
    "Tell me about two friends.",
)
BEGINNINGS = (
    "Once upon a time there was a little rabbit named Ruby.",
    "One day Otto lost his blue scarf.",
    "In spring Ben put a seed into the earth.",
)

# Each update sends complete conversations to the browser, so not every token gets its own.
SECONDS_BETWEEN_UPDATES = 0.05

# Gradio's page needs inline code. The policy forbids to load from, or send to, any other server.
CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"

CSS = Path(__file__).with_name("chat.css")

Conversations = list[list[Message]]  # one conversation for each column


# -------------------------------------------------------------------------------------------------------------- server


def serve(models: Sequence[Model], sampling: Sampling, seed: int | None, sock: socket.socket) -> None:
    """Serve the page at an address from `http.listen` until Ctrl-C."""
    run(make_app(models, sampling, seed), sock, f"Open {url_of(sock)} in a browser.")


def make_app(models: Sequence[Model], sampling: Sampling, seed: int | None) -> fastapi.FastAPI:
    """Return the page as a web application."""
    # Without FastAPI's pages about the interface, which load scripts from another server.
    app = fastapi.FastAPI(openapi_url=None)
    app.add_middleware(_ContentPolicy)
    return gr.mount_gradio_app(
        app,
        build(models, sampling, seed),
        path="/",
        theme=theme(),
        css=CSS.read_text(encoding="utf-8"),
        footer_links=[],
        # Rendering on the server needs Node.js.
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        # Gradio accepts uploads even if a page has no place for them.
        max_file_size="1kb",
    )


class _ContentPolicy:
    """Add the content policy to every response of the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: MutableMapping[str, Any]) -> None:
            # Only the start of a response has headers.
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", CONTENT_POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, with_policy)


# ---------------------------------------------------------------------------------------------------------------- page


def build(models: Sequence[Model], sampling: Sampling, seed: int | None) -> gr.Blocks:
    """Return the page with one column for each model."""
    with gr.Blocks(title=f"Chat: {models[0].config.name}", analytics_enabled=False, fill_height=True) as page:
        chat_page = _ChatPage(models)
        chat_page.add_components(sampling, seed)
        chat_page.connect_events()
    return page


class _ChatPage:
    """The components of the page and what happens at its events.

    The state of a browser tab is in ``gr.State`` components, so several tabs do not mix: the question, whether an
    answer is being written, and the conversations. Event handlers get it as arguments and return the new values.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = models
        self.is_tuned = [Chat(model).is_tuned for model in models]
        self.question, self.busy = gr.State(""), gr.State(False)
        self.conversations = gr.State([[] for _ in models])
        self.chatbots: list[gr.Component] = []
        self.captions: list[gr.Component] = []

    def add_components(self, sampling: Sampling, seed: int | None) -> None:
        """Lay out the page: columns with answers, the question below, settings on the right."""
        any_tuned = any(self.is_tuned)
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="main"):
                with gr.Row(elem_id="chats"):
                    for model, is_tuned in zip(self.models, self.is_tuned, strict=True):
                        with gr.Column(min_width=240, elem_classes="chat"):
                            gr.HTML(_heading(model, is_tuned), padding=False)
                            self.chatbots.append(_chatbot(model))
                            self.captions.append(gr.HTML(elem_classes="caption", padding=False))
                with gr.Column(elem_id="ask"):
                    with gr.Row(elem_classes="quiet", elem_id="examples"):
                        texts = QUESTIONS if any_tuned else BEGINNINGS
                        self.examples = [gr.Button(text, size="sm") for text in texts]
                    self.box = gr.Textbox(
                        placeholder="Ask a question" if any_tuned else "Start a story",
                        show_label=False,
                        container=False,
                        lines=1,
                        max_lines=8,
                        autofocus=True,
                        submit_btn=True,
                        elem_id="question",
                    )
                    with gr.Row(elem_classes="quiet", elem_id="actions"):
                        self.retry = gr.Button("Retry", size="sm")
                        self.undo = gr.Button("Undo", size="sm")
                        self.clear = gr.Button("Clear", size="sm")
            with gr.Column(elem_id="settings", min_width=240):
                gr.HTML("<h2>Settings</h2>", padding=False)
                self.settings = _settings(sampling, seed, any_tuned)

    def connect_events(self) -> None:
        """Connect buttons and question box with the event handlers below."""
        answers = []
        starts: list[tuple[Any, Any, Sequence[gr.Component]]] = [
            (self.box.submit, self.begin, [self.box, self.busy, self.conversations]),
            (self.retry.click, self.again, [self.busy, self.conversations]),
        ]
        starts += [(example.click, self.begin, [example, self.busy, self.conversations]) for example in self.examples]
        for trigger, handler, inputs in starts:
            # Without the queue, so that the question appears at once, even if an answer in another tab is running.
            started = trigger(
                handler,
                inputs,
                [self.question, self.busy, self.box, self.conversations, *self.chatbots],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
            # One answer at a time, because the models share the device. Other tabs wait in the queue. `success` and not
            # `then`: no answer follows a question that `begin` refused.
            answer = started.success(
                self.answer,
                [self.question, self.busy, self.conversations, *self.settings],
                [self.box, self.conversations, *self.chatbots, *self.captions],
                concurrency_id="models",
                concurrency_limit=1,
                show_progress="hidden",
                api_visibility="private",
            )
            # `then` also runs after an error, so the page never stays busy.
            answer.then(self.ready, None, [self.busy, self.box], queue=False, api_visibility="private")
            answers.append(answer)
        # These cancel a running answer, so they must not wait behind it in the queue.
        for trigger, handler in (
            (self.box.stop, self.stop),
            (self.undo.click, self.back),
            (self.clear.click, self.reset),
        ):
            trigger(
                handler,
                self.conversations,
                [self.busy, self.box, self.conversations, *self.chatbots, *self.captions],
                cancels=answers,
                queue=False,
                api_visibility="private",
            )

    def begin(self, question: str, busy: bool, conversations: Conversations) -> list[Any]:
        """Show the question at once, with an empty answer."""
        if busy:
            raise gr.Error("Wait for the answer, or stop it first.", 4, title="", print_exception=False)
        if not question.strip():
            raise gr.Error("The question is empty.", 4, title="", print_exception=False)
        conversations = [_with_turn(messages, question, "") for messages in conversations]
        # The stop button replaces the submit button while the answer is written.
        box = gr.Textbox(value="", submit_btn=False, stop_btn=True)
        return [question, True, box, conversations, *_as_html(conversations)]

    def again(self, busy: bool, conversations: Conversations) -> list[Any]:
        """Ask the last question again."""
        return self.begin(_last_question(conversations), busy, _without_last_turn(conversations))

    def answer(self, question: str, busy: bool, conversations: Conversations, *settings: Any) -> Iterator[list[Any]]:
        """Fill the empty answers of all models, token by token."""
        if not busy:
            # Stopped before the answer started.
            # A value for each output: box, conversations, and chat and caption of each model.
            yield [gr.skip()] * (2 + 2 * len(self.models))
            return
        history = _without_last_turn(conversations)
        try:
            replies = self._ask(question, history, *settings)
            # Each update contains all conversations, because Gradio replaces the complete value of a component.
            for _ in _together(replies):
                conversations = [
                    _with_turn(messages, question, reply.text) for messages, reply in zip(history, replies, strict=True)
                ]
                captions = [_caption(reply) for reply in replies]
                yield [gr.skip(), conversations, *_as_html(conversations), *captions]
        except Exception as error:
            # Show any error below the question. Without this, the page would wait for the answer forever.
            message = f"<span class='wrong'>{html.escape(str(error))}</span>"
            conversations, question = _without_empty_turn(conversations)
            box = gr.Textbox(value=question) if question else gr.skip()
            yield [box, conversations, *_as_html(conversations), *[message] * len(self.models)]
            # A bug also goes to the log of the server.
            if not isinstance(error, UserError):
                raise

    def _ask(self, question: str, history: Conversations, *settings: Any) -> list[Reply]:
        sampling, seed, system = _read_settings(*settings)
        replies = []
        for model, messages, is_tuned in zip(self.models, history, self.is_tuned, strict=True):
            # A new object for each question, because the messages belong to a browser tab.
            chat = Chat(model, messages, seed=seed)
            chat.system = system if is_tuned else ""
            replies.append(chat.ask(question, **sampling))
        return replies

    def ready(self, question: str = "") -> list[Any]:
        """Accept the next question; a question without an answer goes back into the box."""
        value: dict[str, Any] = {"value": question} if question else {}
        return [False, gr.Textbox(submit_btn=True, stop_btn=False, **value)]

    def stop(self, conversations: Conversations) -> list[Any]:
        """Keep the text so far."""
        conversations, question = _without_empty_turn(conversations)
        return self._page_state(question, conversations, "stopped")

    def back(self, conversations: Conversations) -> list[Any]:
        """Remove the last turn and put its question into the box."""
        return self._page_state(_last_question(conversations), _without_last_turn(conversations))

    def reset(self, conversations: Conversations) -> list[Any]:
        """Start new conversations."""
        return self._page_state("", [[] for _ in conversations])

    def _page_state(self, question: str, conversations: Conversations, caption: str = "") -> list[Any]:
        return [*self.ready(question), conversations, *_as_html(conversations), *[caption] * len(self.models)]


# ---------------------------------------------------------------------------------------------------------- components


def theme() -> gr.themes.Base:
    """Return calm colors, and fonts that every system has."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        radius_size="lg",
        font=("system-ui", "-apple-system", "Segoe UI", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    ).set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#1a1918",
        block_background_fill="#ffffff",
        block_background_fill_dark="#262524",
        color_accent_soft="#d9f0ec",
        color_accent_soft_dark="#134e4a",
    )


def _chatbot(model: Model) -> gr.Chatbot:
    return gr.Chatbot(
        label=model.folder.as_posix(),
        show_label=False,
        container=False,
        height="auto",
        # What a model writes must not become links, images or formulas.
        render_markdown=False,
        latex_delimiters=[],
        feedback_options=None,
        buttons=["copy"],
        group_consecutive_messages=False,
        layout="bubble",
        placeholder="No messages yet.",
        elem_classes="talk",
    )


def _settings(sampling: Sampling, seed: int | None, any_tuned: bool) -> list[gr.Component]:
    """Return the inputs for `_read_settings`; sliders reach at least to the values of the command line."""
    temperature, top_k, longest = sampling["temperature"], sampling["top_k"] or 0, sampling["max_new_tokens"]
    seed_text = "" if seed is None else str(seed)
    return [
        gr.Slider(0, max(2, temperature), temperature, step=0.05, label="Temperature", info="0: most probable token"),
        gr.Slider(0, max(200, top_k), top_k, step=1, label="Top k", info="0: all tokens"),
        gr.Slider(0, 1, sampling["top_p"], step=0.01, label="Top p", info="1: all tokens"),
        gr.Slider(1, max(2048, longest), longest, step=1, label="Longest answer", info="in tokens"),
        gr.Textbox(seed_text, label="Seed", info="the same number repeats the same answers"),
        gr.Textbox("", label="System message", info="read before the first question", lines=2, visible=any_tuned),
    ]


def _read_settings(
    temperature: float, top_k: float, top_p: float, max_new_tokens: float, seed_text: str, system: str
) -> tuple[Sampling, int | None, str]:
    try:
        seed = int(seed_text) if seed_text.strip() else None
    except ValueError:
        raise UserError(
            f"the seed is {seed_text[:40]!r}; expected a whole number, or nothing for different answers each time."
        ) from None
    sampling = Sampling(
        temperature=temperature, top_k=int(top_k) or None, top_p=top_p, max_new_tokens=int(max_new_tokens)
    )
    return sampling, seed, system.strip()


def _heading(model: Model, is_tuned: bool) -> str:
    # Folder names come from the user and may contain HTML.
    heading = f"<h1>{html.escape(model.folder.as_posix())}</h1><p>{html.escape(describe(model))}</p>"
    if not is_tuned:
        heading += f"<p class='note'>{html.escape(NOT_TUNED.replace('`', ''))}</p>"
    return heading


def _caption(reply: Reply) -> str:
    return html.escape(reply.summary() if reply.end else f"{reply.tokens:,} tokens …")


# ------------------------------------------------------------------------------------------------------- conversations


def _together(replies: Sequence[Reply]) -> Iterator[None]:
    """Generate several answers at once, a piece of each in turn; yield when it is time to show them."""
    streams = [iter(reply) for reply in replies]
    last_update = time.monotonic()
    while streams:
        streams = [stream for stream in streams if next(stream, None) is not None]
        if not streams or time.monotonic() - last_update > SECONDS_BETWEEN_UPDATES:
            yield
            last_update = time.monotonic()


def _with_turn(messages: list[Message], question: str, answer: str) -> list[Message]:
    return [*messages, Message(role="user", content=question), Message(role="assistant", content=answer)]


def _without_last_turn(conversations: Conversations) -> Conversations:
    return [messages[:-2] for messages in conversations]


def _without_empty_turn(conversations: Conversations) -> tuple[Conversations, str]:
    """Remove the last turn if an answer is empty; return the conversations and the question of that turn."""
    if conversations[0] and not all(messages[-1]["content"] for messages in conversations):
        return _without_last_turn(conversations), _last_question(conversations)
    return conversations, ""


def _last_question(conversations: Conversations) -> str:
    return conversations[0][-2]["content"] if conversations[0] else ""


def _as_html(conversations: Conversations) -> list[list[dict[str, str]]]:
    """Escape the messages, because Gradio renders HTML even without Markdown."""
    return [
        [{"role": message["role"], "content": html.escape(message["content"], quote=False)} for message in messages]
        for messages in conversations
    ]
