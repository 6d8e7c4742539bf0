"""Replies of a chat model: fit a conversation into the context, and generate the assistant's next message."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import takewhile

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
    num_tokens = [len(template.encode([message])[0]) - 1 for message in messages]  # of each message, without EOT
    start = 1 if messages and messages[0]["role"] == "system" else 0
    num_fixed = len(template.prompt(messages[:start]))  # the system message and the beginning of the reply
    for first in [start, *(i for i in range(start + 1, len(messages)) if messages[i]["role"] == "user")]:
        total = num_fixed + sum(num_tokens[first:])
        if total <= room:
            return [*messages[:start], *messages[first:]], first - start
    raise UserError(
        f"The message is too long: the prompt has {total:,} tokens, but can have {room:,}. The context has "
        f"{block_size:,}, and the reply needs the rest. Use a shorter message."
    )


def limit_to_context(params: SamplingParams, num_prompt_tokens: int, block_size: int) -> SamplingParams:
    """Return the parameters with as many new tokens at most as the context has left after the prompt.

    With more, generation would drop the start of the prompt.
    """
    return replace(params, max_new_tokens=min(params.max_new_tokens, block_size - num_prompt_tokens))


def reply(
    model: Decoder, template: ChatTemplate, messages: Conversation, params: SamplingParams,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[str]:  # fmt: skip
    """Yield the text of each token of the assistant's next message, up to its end or `stop()`.

    A text is empty until a character is complete. Any special token ends the message, not only `<|im_end|>`: a model
    with little training may begin another message or document. The prompt and the new tokens must fit into the context;
    see `fit_context` and `limit_to_context`.
    """
    ends = {template.tokenizer.eot_id, *template.tokenizer.special_ids.values()}
    steps = generate(model, [template.prompt(messages)], params, template.im_end_id, stop)
    tokens = (token for (token,) in steps if token is not None)
    return stream_decode(template.tokenizer, takewhile(lambda token: token not in ends, tokens))
