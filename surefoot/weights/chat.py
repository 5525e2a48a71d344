"""Chat messages to prompt text through the model's own template.

Content may be a string or OpenAI's parts. Templates differ in what they take: most want strings, multimodal ones take
both, some take parts only and would silently drop a string. Two probe messages tell which, and content is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from surefoot.core.errors import InputError
from surefoot.weights.messages import one_line

Render = Callable[..., str]  # (messages, add_generation_prompt=..., **kwargs) -> text
PROBE = "7f3a91c4"


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A list of {"role": ..., "content": ...} objects; content may be absent where e.g. tool calls take its place."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages must be a list with at least one message")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {i} must be an object with a role and a content")
        content = message.get("content")
        if not (content is None or isinstance(content, str)):
            content = _text_parts(content, i)
        checked.append({**message, "content": content})
    return checked


def _text_parts(content: Any, i: int) -> list[dict[str, str]]:
    parts = []
    for part in content if isinstance(content, Sequence) else [None]:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise InputError(
                f'the content of message {i} must be a string or a list of {{"type": "text", "text": ...}}'
            )
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"message {i} has content of type {part['type']!r}: only text can be used here")
        parts.append({"type": "text", "text": part["text"]})
    return parts


class ContentFormat:
    """What kinds of content a template takes, found out by rendering a probe both ways."""

    def __init__(self, render: Render) -> None:
        as_string = _probe(render, PROBE)
        as_parts = _probe(render, [{"type": "text", "text": PROBE}])
        self.takes_string = as_string is not None and PROBE in as_string
        # A template that does not know about parts prints the list as Python shows it, and differs from the string.
        parts_only = not self.takes_string and as_parts is not None and PROBE in as_parts and "'text'" not in as_parts
        self.takes_parts = parts_only or (self.takes_string and as_parts == as_string)

    def convert(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        if isinstance(content, list) and not self.takes_parts:
            return {**message, "content": "\n".join(part["text"] for part in content)}
        if isinstance(content, str) and self.takes_parts and not self.takes_string:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message


def _probe(render: Render, content: Any) -> str | None:
    try:
        return render([{"role": "user", "content": content}], add_generation_prompt=False)
    except Exception:  # the template's own complaint, of any type: it does not take this
        return None


def render_chat(
    render: Render, messages: list[dict[str, Any]], add_generation_prompt: bool, kwargs: dict[str, Any]
) -> str:
    """Render; whatever goes wrong inside the template is the input's fault and becomes one line."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
    except TemplateSyntaxError as error:
        raise InputError(
            f"the model's chat template cannot be compiled (line {error.lineno}: {one_line(error.message)}); "
            "repair chat_template.jinja or use plain completion instead of chat"
        ) from None
    except TemplateError as error:  # raise_exception("...") in the template
        raise InputError(f"the model's chat template refuses these messages: {one_line(error)}") from None
    except Exception as error:
        raise InputError(
            f"the model's chat template fails on these messages: {one_line(f'{type(error).__name__}: {error}')}"
        ) from None
