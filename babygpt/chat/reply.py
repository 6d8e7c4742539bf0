"""Replies of a chat model: fit a conversation into the context, and generate the assistant's next message."""

from collections.abc import Callable, Iterator

from babygpt.chat.template import ChatTemplate, Conversation
from babygpt.data.tokenizer import stream_decode
from babygpt.errors import UserError
from babygpt.nn.generation import Decoder, SamplingParams, generate


def fit_context(
    template: ChatTemplate, messages: Conversation, block_size: int, max_new_tokens: int
) -> tuple[Conversation, int]:
    """Return the messages without the oldest turns that exceed the context, and the number of dropped messages.

    The reply gets room for `max_new_tokens`, or for half of the context if that is less. A system message at the start
    is kept, and the first message after it is the user's. UserError if the last message alone does not fit.
    """
    room = block_size - min(max_new_tokens, block_size // 2)
    has_system = bool(messages) and messages[0]["role"] == "system"
    system, turns = (messages[:1], messages[1:]) if has_system else ([], messages)
    for first in range(max(1, len(turns))):
        if first and turns[first]["role"] != "user":
            continue
        kept = [*system, *turns[first:]]
        if len(template.prompt(kept)) <= room:
            return kept, first
    num_tokens = len(template.prompt([*system, *turns[-1:]]))
    raise UserError(
        f"The message is too long: the prompt has {num_tokens:,} tokens, but can have {room:,}. The context has "
        f"{block_size:,}, and the reply needs the rest. Use a shorter message."
    )


def reply(
    model: Decoder, template: ChatTemplate, messages: Conversation, params: SamplingParams,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[str]:  # fmt: skip
    """Yield the pieces of the assistant's next message as they are generated, up to its end or `stop()`.

    The prompt must fit into the context; see `fit_context`.
    """
    steps = generate(model, [template.prompt(messages)], params, template.im_end_id, stop)
    return stream_decode(template.tokenizer, (token for (token,) in steps if token is not None))
