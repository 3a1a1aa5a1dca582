"""Requests of OpenAI's API: the fields that the server reads, those that it refuses, and its errors.

Fields that are neither read nor refused do not change the answer (``user``, ``store``, ``metadata``) and are ignored.
A null counts as a missing field, as clients send it for their defaults.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from litmoe.data.conversations import Message
from litmoe.inference.chat import encodable

_NO_TOOLS = "the model does not call tools. Send the conversation without tools, tool calls and their results"
_NO_PENALTY = "penalties are not supported"
_NO_LOGPROBS = "log probabilities are not returned"
_TEXT_ONLY = "the model reads and writes only text"

REFUSED: dict[str, tuple[Any, str]] = {
    "n": (1, "one answer is returned per request. Send the request several times"),
    "best_of": (1, "one answer is returned per request. Send the request several times"),
    "tools": ([], _NO_TOOLS),
    "functions": ([], _NO_TOOLS),
    "logprobs": (False, _NO_LOGPROBS),
    "top_logprobs": (0, _NO_LOGPROBS),
    "presence_penalty": (0, _NO_PENALTY),
    "frequency_penalty": (0, _NO_PENALTY),
    "logit_bias": ({}, "biases of tokens are not supported"),
    "response_format": ({"type": "text"}, "the format of the answer cannot be prescribed"),
    "modalities": (["text"], _TEXT_ONLY),
    "audio": (None, _TEXT_ONLY),
    "echo": (False, "the prompt is not returned"),
    "suffix": ("", "text can only be continued at its end"),
}
"""Fields that would change the answer: the only value that is accepted besides null, and the reason."""

Text = Annotated[str, AfterValidator(encodable)]


class ApiError(Exception):
    """An error that the client gets, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid_request(errors: Sequence[Any]) -> ApiError:
    """Return the first of pydantic's errors as an error of the API."""
    # The first part of each location is "body".
    param = ".".join(str(part) for part in errors[0]["loc"][1:])
    message = errors[0]["msg"].removeprefix("Value error, ")
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON ({errors[0]['ctx']['error']}).")
    return ApiError(400, f"{param or 'The body'}: {message}.", param or None)


class StreamOptions(BaseModel):
    """``stream_options``"""

    include_usage: bool | None = None


class Options(BaseModel):
    """Fields of both kinds of requests."""

    model: str | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    # Not OpenAI's. vLLM and llama.cpp have it too; 0 and -1 mean all tokens.
    top_k: Annotated[int | None, Field(ge=-1)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] = Field(default_factory=list)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, fields: Any) -> Any:
        for name, value in fields.items() if isinstance(fields, dict) else ():
            accepted, reason = REFUSED.get(name, (value, ""))
            if value is not None and value != accepted:
                raise ApiError(400, f"{name}: {reason}.", name, "unsupported_parameter")
        return fields

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of_stops(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop or []

    @property
    def includes_usage(self) -> bool:
        """Return whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(Options):
    """The body of ``/v1/completions``."""

    prompt: Text

    @field_validator("prompt", mode="before")
    @classmethod
    def _single_text(cls, prompt: Any) -> Any:
        if isinstance(prompt, list):
            if len(prompt) != 1 or not isinstance(prompt[0], str):
                raise ApiError(400, "prompt: expected one text, not tokens or several texts.", "prompt")
            return prompt[0]
        return prompt


class ChatMessage(BaseModel):
    """One of the messages of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Text

    @model_validator(mode="before")
    @classmethod
    def _refuse_tools(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            is_tool = (
                fields.get("role") in ("tool", "function") or fields.get("tool_calls") or fields.get("function_call")
            )
            if is_tool:
                raise ApiError(400, f"messages: {_NO_TOOLS}.", "messages", "unsupported_parameter")
        return fields

    @field_validator("role", mode="before")
    @classmethod
    def _new_name(cls, role: Any) -> Any:
        # OpenAI's newer models call the system message so.
        return "system" if role == "developer" else role

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(texts) < len(content):
            raise ApiError(400, f"messages: {_TEXT_ONLY}; a message has a part of another type.", "messages")
        return "".join(texts)


class ChatRequest(Options):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    # The newer name of max_tokens
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None

    def conversation(self) -> list[Message]:
        """Return the messages in the form of this project."""
        return [Message(role=message.role, content=message.content) for message in self.messages]
