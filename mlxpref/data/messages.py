"""Prompts and responses in the shapes data sets keep them in, as :class:`Message` and text.

Strings become one user turn, unless they spell a dialogue out ("Human: … Assistant:"); lists of
messages are read in OpenAI's keys (role, content) and in ShareGPT's (from, value).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlxpref.records import Message


class Unusable(Exception):
    """A row that cannot become an example. Caught where rows are counted; users never see it.

    Attributes:
        reason: short, the same for every row with this fault; the key it is counted under.
        detail: what was found in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_EXTRA_ID = re.compile(r"<extra_id_1>(User|Assistant)\n")


def conversation(value: Any) -> list[Message]:
    """Messages of a prompt or a whole exchange: text, a list of messages, or one message.

    Raises:
        Unusable: neither text nor messages, or a message without role or text.
    """
    if isinstance(value, str):
        return dialogue(value) or [Message("user", value)]
    if isinstance(value, Mapping):
        return [message(value)]
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [message(item) for item in value]
    if value is None:
        return []
    raise Unusable("prompt is neither text nor messages", type(value).__name__)


def message(value: Any) -> Message:
    """One message from {role, content} or {from, value}; what else it holds goes along."""
    if not isinstance(value, Mapping):
        raise Unusable("a message is not an object", repr(value)[:60])
    rest = without_none(value)
    role = rest.pop("role", None) or rest.pop("from", None)
    if not isinstance(role, str):
        raise Unusable("a message has no role", ", ".join(map(str, value)))
    content = rest.pop("content", None)
    if content is None:
        content = rest.pop("value", None)
    role = _ROLES.get(role.lower(), role.lower())
    return Message.from_dict({**rest, "role": role, "content": _text(content)})


def _text(content: Any) -> str:
    """Content as text; a list of text parts is joined, anything but text refused."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        if all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise Unusable("a message holds more than text", ", ".join(str(part.get("type")) for part in content))
    raise Unusable("a message's content is not text", type(content).__name__)


def without_none(value: Any) -> Any:
    """A copy of nested dicts without the keys that are None: Arrow fills every struct up with them."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value


def dialogue(text: str) -> list[Message] | None:
    """Turns of a text that begins with "Human:" and goes on in paragraphs "Assistant:", "Human:".

    The HH-RLHF and Nectar convention. A last, empty "Assistant:" only asks for the answer and is
    left out. None when the text is not such a dialogue; text with "Human:" alone is not.
    """
    marks = list(_TURN.finditer(text))
    if len(marks) < 2 or marks[0].start() != 0 or marks[0].group(1) != "Human":
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [
        Message(_ROLES.get(mark.group(1).lower(), "assistant"), text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
    return turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns


def helpsteer_turns(prompt: str) -> list[Message]:
    """Turns of a HelpSteer2 prompt: the first is the user's, ``<extra_id_1>Role`` opens each next."""
    first, *rest = _EXTRA_ID.split(prompt)
    turns = [Message("user", first.strip("\n"))]
    for role, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append(Message(role.lower(), content.strip("\n")))
    return turns


def response(value: Any) -> str:
    """The one text of a response: a string, or exactly one assistant message.

    Raises:
        Unusable: several messages, another role, or a tool call instead of text.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    turns = conversation(value)
    if not turns:
        return ""
    if len(turns) > 1:
        raise Unusable("response is more than one message", " ".join(turn.role for turn in turns))
    if turns[0].role != "assistant":
        raise Unusable("response is not the assistant's", turns[0].role)
    if "tool_calls" in turns[0].extra:
        raise Unusable("response calls a tool; only text can be trained on")
    return turns[0].content


def split_pair(prompt: Any, chosen: Any, rejected: Any) -> tuple[list[Message], str, str]:
    """Prompt and the two responses, however the prompt is given.

    - explicit: ``prompt`` is text or messages, the sides are the responses alone;
    - implicit: the sides are whole exchanges, and what they share is the prompt. So it is too when
      a text prompt stands beside message lists that hold it (UltraFeedback-binarized).

    Args:
        prompt: None when the data have no such column.

    Raises:
        Unusable: the sides share no prompt, or differ in more than their last message.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            return conversation(prompt), chosen, rejected
        left, right = dialogue(chosen), dialogue(rejected)
        if left is None or right is None:
            return _split_texts(chosen, rejected)
    elif isinstance(chosen, str) or isinstance(rejected, str):
        if prompt is None:
            raise Unusable("one side is text, the other messages")
        return conversation(prompt), response(chosen), response(rejected)
    else:
        left, right = conversation(chosen), conversation(rejected)
    return _split_messages([] if prompt is None else conversation(prompt), left, right)


def _split_messages(
    prompt: list[Message], left: list[Message], right: list[Message]
) -> tuple[list[Message], str, str]:
    shared = 0
    # The last message of each side is its response, so two identical sides keep one each.
    while shared < min(len(left), len(right)) - 1 and left[shared] == right[shared]:
        shared += 1
    if shared:
        prompt = _joined(prompt, left[:shared])
    elif len(left) > 1 and len(right) > 1:
        raise Unusable("chosen and rejected answer different prompts")
    return prompt, _only(left[shared:]), _only(right[shared:])


def _joined(prompt: list[Message], head: list[Message]) -> list[Message]:
    """The prompt column and the messages both sides begin with, as one prompt.

    The head goes on where the prompt column ends (a tool call and its result), or says it again:
    whole, its end (a system turn in front), or only the text of one user turn.
    """
    if not prompt or prompt == head:
        return head
    if head[0].role == "assistant" and prompt[-1].role != "assistant":
        return prompt + head
    if prompt[-len(head) :] == head:
        return prompt
    said = {turn.content.strip() for turn in head if turn.role == "user"}
    if len(prompt) == 1 and prompt[0].content.strip() in said:
        return head
    raise Unusable("prompt column and messages disagree")


def _only(turns: list[Message]) -> str:
    return response([turn.as_dict() for turn in turns])


def _split_texts(chosen: str, rejected: str) -> tuple[list[Message], str, str]:
    """Longest common beginning, cut back to the end of a word, as the user's turn."""
    shared = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise Unusable("chosen and rejected are the same text")
    # Cut inside a word ("bl|ue", "bl|ack") the prompt would already hold half of the answer.
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    prompt = chosen[:shared].rstrip()
    return [Message("user", prompt)], chosen[len(prompt) :], rejected[len(prompt) :]
