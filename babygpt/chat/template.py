"""The chat template, ChatML: how a conversation becomes tokens, and which of them are trained on.

    <|endoftext|><|im_start|>system
    You are helpful.<|im_end|>
    <|im_start|>user
    What is 2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

The loss is that of the assistant messages and the `<|im_end|>` after them. Contents are stripped of surrounding
whitespace and encoded as ordinary text, so a literal `<|im_end|>` in a message never becomes the special token.

>>> tokenizer = chat_tokenizer(load_tokenizer("gpt2"))
>>> ids, supervised = ChatTemplate(tokenizer).encode([{"role": "user", "content": "Hi"}])
"""

import hashlib
from typing import Any

from babygpt.data.tokenizer import FileTokenizer, Tokenizer, to_json
from babygpt.errors import ConfigError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")

Message = dict[str, str]  # role, content
Conversation = list[Message]

# the same template for Hugging Face tokenizers; {% generation %} marks what `encode` marks as supervised
JINJA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ (message['content'] | trim) + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ (message['content'] | trim) + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def is_chat_tokenizer(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer has the special tokens of the template."""
    return isinstance(tokenizer, FileTokenizer) and {IM_START, IM_END} <= tokenizer.special_ids.keys()


def chat_tokenizer(tokenizer: Tokenizer) -> FileTokenizer:
    """Return the tokenizer with the special tokens of the template, at the end of its vocabulary if they are new.

    ConfigError for a character-level tokenizer, which cannot encode the names of the roles.
    """
    from tokenizers import Tokenizer as Backend

    if tokenizer.is_character_level:
        raise ConfigError(
            "The tokenizer is character-level, so it cannot encode conversations. Use a model with a BPE tokenizer."
        )
    if isinstance(tokenizer, FileTokenizer) and is_chat_tokenizer(tokenizer):
        return tokenizer
    backend = Backend.from_str(to_json(tokenizer))
    backend.add_special_tokens([IM_START, IM_END])
    return FileTokenizer("tokenizer.json", backend.to_str(pretty=True).encode())


class ChatTemplate:
    """Encodes conversations with a tokenizer that `chat_tokenizer` returned."""

    def __init__(self, tokenizer: Tokenizer):
        if not isinstance(tokenizer, FileTokenizer) or not is_chat_tokenizer(tokenizer):
            raise ConfigError(
                f"The tokenizer {tokenizer.file} has no {IM_START} and {IM_END}: the model is not a chat model. Train "
                "one with `python finetune.py sft MODEL DATA`."
            )
        self.tokenizer = tokenizer
        self.im_start_id, self.im_end_id = tokenizer.special_ids[IM_START], tokenizer.special_ids[IM_END]
        self.newline = tokenizer.encode("\n")
        # hash of everything that determines the tokens; JINJA represents `encode`, and the tests check that both agree
        self.sha256 = hashlib.sha256(f"{tokenizer.sha256} {JINJA}".encode()).hexdigest()
        self.headers = {role: [self.im_start_id, *tokenizer.encode(f"{role}\n")] for role in ROLES}

    def encode(self, messages: Conversation, only_last: bool = False) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation and which of them are supervised, two lists of equal length.

        With `only_last`, only the last message is supervised, if the assistant wrote it.
        """
        ids, supervised = [self.tokenizer.eot_id], [False]
        for i, message in enumerate(messages):
            content = [*self.tokenizer.encode(message["content"].strip()), self.im_end_id]
            header = self.headers[message["role"]]
            is_supervised = message["role"] == "assistant" and (not only_last or i == len(messages) - 1)
            ids += [*header, *content, *self.newline]
            supervised += [*[False] * len(header), *[is_supervised] * len(content), *[False] * len(self.newline)]
        return ids, supervised

    def prompt(self, messages: Conversation) -> list[int]:
        """Return the tokens of a conversation and of the beginning of the assistant's next message."""
        return [*self.encode(messages)[0], *self.headers["assistant"]]


def check_conversation(messages: Any) -> Conversation:
    """Return messages with a role and a content each. ValueError with a reason if they are invalid."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a non-empty list of messages")
    checked: Conversation = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message must have a role and a content, both strings, unlike {message!r:.60}")
        if message.get("role") not in ROLES:
            raise ValueError(f"the role must be one of {', '.join(ROLES)}, not {message.get('role')!r:.60}")
        checked.append({"role": message["role"], "content": message["content"]})
    return checked
