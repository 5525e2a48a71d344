"""A model's chat template, rendered by jinja2 in the environment that templates are written for (transformers').

Templates come with models from anywhere, so they run in jinja2's sandbox, and see nothing but plain data.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the usual one first


def render(template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **variables: Any) -> str:
    """`variables`: the special tokens by name, tools, documents, and whatever else this template asks for."""
    given = {"tools": None, "documents": None, **variables}
    shown = [_message(message) for message in messages]
    return _compiled(template).render(messages=shown, add_generation_prompt=add_generation_prompt, **given)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without empty fields, and with the reasoning under the names that templates read."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
    from jinja2 import TemplateError, ext, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's words for training; here it stands for its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Dict:
        """The builtin's calls without the class itself, through which the sandbox could be left."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict:
            return dict.fromkeys(*args)

    class Attributes(Namespace):
        """namespace() that takes no underscored names."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            given = dict(*args[1:], **kwargs)
            for name in given:
                refuse_underscore(name)
            Namespace.__init__(args[0], given)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_underscore(name)
            super().__setitem__(name, value)

    def refuse_underscore(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a chat template may not set {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        # jinja2's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda layout: datetime.now().strftime(layout),
        "dict": Dict(),
        "namespace": Attributes,
    }
    return env
