"""The chat page in the browser, by Gradio: one model, or two that answer the same questions side by side.

Everything that is asked or written is shown as text, never as HTML or Markdown. The page needs no network: it has the
system's fonts, no statistics, and a policy that forbids the browser to load anything from elsewhere.
"""

import html
import ipaddress
import socket
import sys
import time
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from litmoe.cli import UserError
from litmoe.data.conversations import Message
from litmoe.inference.chat import NOT_TUNED, Chat, Reply, describe
from litmoe.inference.generate import Model, Sampling

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

SECONDS_BETWEEN_UPDATES = 0.05

CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
"""Gradio's page needs inline code; what matters is that nothing comes from, or goes to, anywhere else."""

CSS = """
.gradio-container .main.fillable, .gradio-container .wrap.sidebar-parent { padding: 0 !important; max-width: none; }
#page { gap: 0; flex-wrap: nowrap; }
#main { height: 100dvh; min-width: 0 !important; padding: 20px 28px 16px; gap: 12px; flex-wrap: nowrap; }
#chats { flex: 1 1 0; min-height: 0; gap: 28px; }
#chats, #ask, #examples, .chat { min-width: 0 !important; max-width: 100%; }
.chat { height: 100%; min-height: 0; gap: 6px; flex-wrap: nowrap; }
.chat > * { flex: 0 0 auto !important; }
.chat .block, .chat .html-container, #settings .html-container { padding: 0 !important; border: none !important; }
.chat h1 { font-size: 1.05rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
.chat p { font-size: .82rem; margin: 2px 0 0; color: var(--body-text-color-subdued); }
.chat .note { border-left: 3px solid var(--color-accent); padding-left: 8px; margin-top: 6px; }
.chat > .talk { flex: 1 1 0 !important; min-height: 0; height: auto !important; background: none; }
.talk .icon-button-wrapper.top-panel { display: none; }
.talk .bubble-wrap { background: none; padding: 0; scrollbar-width: thin; }
.talk .message-wrap { padding: 8px 0; max-width: 46rem; margin: 0 auto; }
.talk .message-row { margin: 6px 0 !important; max-width: 100%; }
.talk .message-row.user-row { max-width: 85%; }
.talk .message { border: none !important; box-shadow: none !important; line-height: 1.6; overflow-wrap: anywhere; }
.talk .message.bot { background: none !important; padding: 4px 2px !important; }
.talk .message.user { max-height: 40dvh; overflow-y: auto; padding: 8px 14px !important;
  background: var(--color-accent-soft) !important; border-radius: 16px !important; }
.talk .message-buttons-right { display: none; }
.talk .message-buttons-left { margin: -8px 0 2px -6px; opacity: .35; }
.talk .message-buttons-left:hover { opacity: 1; }
.talk .message-buttons-left .icon-button-wrapper { border: none; box-shadow: none; background: none; }
.caption { font-size: .78rem; min-height: 1.3em; color: var(--body-text-color-subdued); }
.caption .wrong { color: var(--error-text-color); }
#ask { flex: 0 0 auto !important; gap: 10px; max-width: 60rem; margin: 0 auto; width: 100%; }
#question { background: none; border: none !important; box-shadow: none; overflow: visible; }
#question .input-container { align-items: center; background: var(--block-background-fill); border-radius: 16px;
  border: 1px solid var(--border-color-primary); padding: 6px 6px 6px 10px; box-shadow: var(--shadow-drop); }
#question .input-container:focus-within { border-color: var(--color-accent); }
#question textarea { background: none; border: none; box-shadow: none; }
#question .submit-button, #question .stop-button { background: var(--color-accent); color: white; border-radius: 12px; }
.quiet { gap: 8px; flex-wrap: nowrap; overflow-x: auto; scrollbar-width: none; justify-content: safe center; }
.quiet button { flex: 0 0 auto !important; min-width: 0 !important; padding: 5px 12px; border-radius: 999px;
  border: 1px solid var(--border-color-primary); background: none; box-shadow: none; font-weight: 450;
  color: var(--body-text-color-subdued); white-space: nowrap; }
.quiet button:hover { color: var(--body-text-color); border-color: var(--color-accent); }
#actions button { border: none; padding: 0 8px; }
#settings { flex: 0 0 270px !important; height: 100dvh; overflow-y: auto; scrollbar-width: thin; padding: 20px;
  gap: 10px; border-left: 1px solid var(--border-color-primary); }
#settings .form, #settings .block { background: none; border: none !important; box-shadow: none; padding: 0;
  overflow: visible; }
#settings .form { gap: 18px; }
#settings h2 { font-size: .95rem; margin: 0 0 6px; }
#settings .info-text { font-size: .76rem; margin: 0; }
@media (max-width: 860px) {
  #page { flex-direction: column; align-items: stretch; }
  #main { padding: 14px; height: auto; min-height: 100dvh; }
  #chats { flex: 1 0 auto; flex-direction: column; gap: 14px; }
  .chat { flex: 0 0 auto !important; height: auto; width: 100%; }
  .chat > .talk { flex: none !important; height: 60dvh !important; }
  #examples { justify-content: flex-start; }
  #settings { flex: 0 0 auto !important; height: auto; border-left: none;
    border-top: 1px solid var(--border-color-primary); }
}
"""

Said = list[list[Message]]
"""A conversation for each column."""


def listen(host: str, port: int) -> socket.socket:
    """Takes the address that the page will be served at.

    Raises:
        UserError: it can't be used.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; expected 0 (any that is free) to 65535.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, ValueError) as error:  # ValueError: no host can have such a name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot serve on {host}, port {port}: {reason}; name another by --port (0 for any free) or --host."
        ) from None


def serve(models: Sequence[Model], sampling: Sampling, seed: int | None, sock: socket.socket) -> None:
    """Serves the page at an address of `listen` until Ctrl-C."""
    host, port = sock.getsockname()[:2]
    if not _is_loopback(host):
        print(
            f"Warning: served on {host}: anyone on the network can use these models, without a password.",
            file=sys.stderr,
        )
    config = uvicorn.Config(make_app(models, sampling, seed), log_level="warning", timeout_graceful_shutdown=1)
    shown = f"[{host}]" if ":" in host else host
    print(f"The chat is at http://{shown}:{port} until Ctrl-C.", flush=True)
    uvicorn.Server(config).run(sockets=[sock])


def make_app(models: Sequence[Model], sampling: Sampling, seed: int | None) -> fastapi.FastAPI:
    """The page as a web application."""
    app = fastapi.FastAPI(openapi_url=None)
    app.add_middleware(_Policy)
    return gr.mount_gradio_app(
        app,
        build(models, sampling, seed),
        path="/",
        theme=theme(),
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        max_file_size="1kb",
    )


def build(models: Sequence[Model], sampling: Sampling, seed: int | None) -> gr.Blocks:
    """The page with a column for each model."""
    tuned = [Chat(model).is_tuned for model in models]
    with gr.Blocks(title=f"Chat: {models[0].config.name}", analytics_enabled=False, fill_height=True) as page:
        asked, busy, said = gr.State(""), gr.State(False), gr.State([[] for _ in models])
        chatbots, captions = [], []
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="main"):
                with gr.Row(elem_id="chats"):
                    for model, is_tuned in zip(models, tuned, strict=True):
                        with gr.Column(min_width=240, elem_classes="chat"):
                            gr.HTML(_heading(model, is_tuned), padding=False)
                            chatbots.append(_chatbot(model))
                            captions.append(gr.HTML(elem_classes="caption", padding=False))
                with gr.Column(elem_id="ask"):
                    with gr.Row(elem_classes="quiet", elem_id="examples"):
                        examples = [gr.Button(text, size="sm") for text in (QUESTIONS if any(tuned) else BEGINNINGS)]
                    box = gr.Textbox(
                        placeholder="Ask something" if any(tuned) else "Begin a story",
                        show_label=False,
                        container=False,
                        lines=1,
                        max_lines=8,
                        autofocus=True,
                        submit_btn=True,
                        elem_id="question",
                    )
                    with gr.Row(elem_classes="quiet", elem_id="actions"):
                        retry, undo, clear = (gr.Button(name, size="sm") for name in ("Retry", "Undo", "Clear"))
            with gr.Column(elem_id="settings", min_width=240):
                gr.HTML("<h2>Settings</h2>", padding=False)
                settings = _settings(sampling, seed, any(tuned))

        def begin(question: str, busy: bool, said: Said) -> list[Any]:
            """Shows the question at once, with an empty answer."""
            if busy:
                raise gr.Error("An answer is being written; stop it first.", 4, title="", print_exception=False)
            if not question.strip():
                raise gr.Error("There is nothing to answer.", 4, title="", print_exception=False)
            said = [_with_turn(history, question, "") for history in said]
            return [question, True, gr.Textbox(value="", submit_btn=False, stop_btn=True), said, *_shown(said)]

        def again(busy: bool, said: Said) -> list[Any]:
            return begin(_last_question(said), busy, [history[:-2] for history in said])

        def answer(question: str, busy: bool, said: Said, *values: Any) -> Iterator[list[Any]]:
            """Fills the empty answers, of all models in turn, token by token."""
            if not busy:  # stopped before it began
                yield [gr.skip()] * (2 + 2 * len(models))
                return
            before: Said = [history[:-2] for history in said]
            replies: list[Reply] = []
            try:
                options, number, system = _read_settings(*values)
                for model, history, is_tuned in zip(models, before, tuned, strict=True):
                    chat = Chat(model, history, seed=number)
                    chat.system = system if is_tuned else ""
                    replies.append(chat.ask(question, **options))
                for _ in _together(replies):
                    said = [
                        _with_turn(history, question, reply.text)
                        for history, reply in zip(before, replies, strict=True)
                    ]
                    yield [gr.skip(), said, *_shown(said), *(_caption(reply) for reply in replies)]
            except Exception as error:
                wrong = f"<span class='wrong'>{html.escape(str(error))}</span>"
                said, left = _without_empty(said)
                yield [gr.Textbox(value=left) if left else gr.skip(), said, *_shown(said), *[wrong] * len(models)]
                if not isinstance(error, UserError):
                    raise

        def ready(question: str = "") -> list[Any]:
            """Nothing is being written; a question that has no answer is there to be asked again."""
            typed: dict[str, Any] = {"value": question} if question else {}
            return [False, gr.Textbox(submit_btn=True, stop_btn=False, **typed)]

        def back(said: Said) -> list[Any]:
            shorter: Said = [history[:-2] for history in said]
            return [*ready(_last_question(said)), shorter, *_shown(shorter), *[""] * len(models)]

        def stop(said: Said) -> list[Any]:
            said, left = _without_empty(said)
            return [*ready(left), said, *_shown(said), *["stopped"] * len(models)]

        events = []
        starts: list[tuple[Any, Any, Sequence[gr.Component]]] = [
            (box.submit, begin, [box, busy, said]),
            (retry.click, again, [busy, said]),
            *((example.click, begin, [example, busy, said]) for example in examples),
        ]
        for trigger, first, inputs in starts:
            started = trigger(
                first,
                inputs,
                [asked, busy, box, said, *chatbots],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
            written = started.success(
                answer,
                [asked, busy, said, *settings],
                [box, said, *chatbots, *captions],
                concurrency_id="models",
                concurrency_limit=1,
                show_progress="hidden",
                api_visibility="private",
            )
            written.then(ready, None, [busy, box], queue=False, api_visibility="private")
            events.append(written)
        box.stop(
            stop,
            said,
            [busy, box, said, *chatbots, *captions],
            cancels=events,
            queue=False,
            api_visibility="private",
        )
        undo.click(
            back,
            said,
            [busy, box, said, *chatbots, *captions],
            cancels=events,
            queue=False,
            api_visibility="private",
        )
        clear.click(
            lambda: [*ready(), [[] for _ in models], *[[]] * len(models), *[""] * len(models)],
            None,
            [busy, box, said, *chatbots, *captions],
            cancels=events,
            queue=False,
            api_visibility="private",
        )
    return page


def theme() -> gr.themes.Base:
    """Calm colours, and fonts that every system has."""
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
        render_markdown=False,
        latex_delimiters=[],
        feedback_options=None,
        buttons=["copy"],
        group_consecutive_messages=False,
        layout="bubble",
        placeholder="Nothing has been said yet.",
        elem_classes="talk",
    )


def _settings(sampling: Sampling, seed: int | None, tuned: bool) -> list[gr.Component]:
    top_k, longest = sampling["top_k"] or 0, sampling["max_new_tokens"]
    return [
        gr.Slider(
            0,
            max(2, sampling["temperature"]),
            sampling["temperature"],
            step=0.05,
            label="Temperature",
            info="0: the likeliest",
        ),
        gr.Slider(0, max(200, top_k), top_k, step=1, label="Top k", info="0: all tokens"),
        gr.Slider(0, 1, sampling["top_p"], step=0.01, label="Top p", info="1: all tokens"),
        gr.Slider(1, max(2048, longest), longest, step=1, label="Longest answer", info="in tokens"),
        gr.Textbox("" if seed is None else str(seed), label="Seed", info="a number repeats answers"),
        gr.Textbox("", label="System message", info="told before the first question", lines=2, visible=tuned),
    ]


def _together(replies: Sequence[Reply]) -> Iterator[None]:
    """Writes several answers at once, a piece of each in turn; now and then, and at last, time to show them."""
    streams = [iter(reply) for reply in replies]
    shown = time.monotonic()
    while streams:
        streams = [stream for stream in streams if next(stream, None) is not None]
        if not streams or time.monotonic() - shown > SECONDS_BETWEEN_UPDATES:
            yield
            shown = time.monotonic()


def _read_settings(
    temperature: float, top_k: float, top_p: float, max_new_tokens: float, seed: str, system: str
) -> tuple[Sampling, int | None, str]:
    try:
        number = int(seed) if seed.strip() else None
    except ValueError:
        raise UserError(
            f"the seed is {seed[:40]!r}; expected a whole number, or nothing for another each time."
        ) from None
    options = Sampling(
        temperature=temperature, top_k=int(top_k) or None, top_p=top_p, max_new_tokens=int(max_new_tokens)
    )
    return options, number, system.strip()


def _with_turn(history: list[Message], question: str, answer: str) -> list[Message]:
    return [*history, Message(role="user", content=question), Message(role="assistant", content=answer)]


def _without_empty(said: Said) -> tuple[Said, str]:
    """The conversations without a last question that has no answer yet, and that question."""
    if said[0] and not all(history[-1]["content"] for history in said):
        return [history[:-2] for history in said], _last_question(said)
    return said, ""


def _last_question(said: Said) -> str:
    return said[0][-2]["content"] if said[0] else ""


def _shown(said: Said) -> list[list[dict[str, str]]]:
    """The columns' messages. Gradio takes a message for HTML, also where it is told to render no Markdown."""
    return [
        [{"role": message["role"], "content": html.escape(message["content"], quote=False)} for message in history]
        for history in said
    ]


def _caption(reply: Reply) -> str:
    return html.escape(reply.summary() if reply.end else f"{reply.tokens:,} tokens …")


def _heading(model: Model, is_tuned: bool) -> str:
    parts = [
        f"<h1>{html.escape(model.folder.as_posix())}</h1>",
        f"<p>{html.escape(describe(model))}</p>",
        "" if is_tuned else f"<p class='note'>{html.escape(NOT_TUNED.replace('`', ''))}</p>",
    ]
    return "".join(parts)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Policy:
    """Adds the content policy to every answer of the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", CONTENT_POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, with_policy)
