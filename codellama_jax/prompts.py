"""Every format a Code Llama reads, once: as functions from text to token ids.

Training data, generation and evals all build their ids here, and none goes through a text with
marks in it, because such a text has other ids (and lets a user write marks).

    document              BOS text EOS
    infilling, PSM        BOS PRE prefix SUF suffix MID            -> middle EOT
    infilling, SPM        BOS PRE SUF suffix MID prefix            -> middle EOT
    chat, 7B 13B 34B      BOS [INST] user [/INST]                  -> answer EOS      (per turn)
    chat, 70B             BOS Source: system STEP Source: user STEP Source: assistant -> answer STEP

Sources: the paper, sections 2.3 and 2.5, and Meta's reference implementation, whose ids these are.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from codellama_jax.tokenizer import Tokenizer

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>")


# -- documents and infilling ---------------------------------------------------------------------


def document(tokenizer: Tokenizer, text: str) -> list[int]:
    """A plain training document: BOS text EOS."""
    return tokenizer.encode(text, bos=True, eos=True)


def infilling(
    tokenizer: Tokenizer, prefix: str, suffix: str, suffix_first: bool = False
) -> list[int]:
    """The prompt after which the model writes what belongs between prefix and suffix, then EOT.

    suffix_first=False is PSM, the order to prefer for a prefix that ends anywhere. True is SPM:
    there training joined prefix and middle before encoding, so a prefix that does not end at the
    end of a token wants token healing (tokenizer.take_back). A prefix that ends in a newline is
    safe in both. For an empty prefix the two are one prompt. Raises ValueError for a tokenizer
    without infilling marks. Source: section 2.3, appendix E.
    """
    require_infilling(tokenizer)
    before = [tokenizer.bos_id, tokenizer.prefix_id]
    prefix_ids, suffix_ids = tokenizer.encode(prefix), tokenizer.encode_infilling(suffix)
    if suffix_first:
        return [*before, tokenizer.suffix_id, *suffix_ids, tokenizer.middle_id, *prefix_ids]
    return [*before, *prefix_ids, tokenizer.suffix_id, *suffix_ids, tokenizer.middle_id]


def infilling_example(
    tokenizer: Tokenizer, prefix: str, middle: str, suffix: str, suffix_first: bool = False
) -> list[int]:
    """A training document cut in three: the prompt, its middle, EOT, EOS.

    In SPM prefix and middle are joined before encoding (section 2.3), so this is not always
    `infilling(...)` and then the middle. The paper says nothing of what follows EOT; EOS is our
    choice, so that every document ends alike.
    """
    end = [tokenizer.eot_id, tokenizer.eos_id]
    if suffix_first:
        return infilling(tokenizer, prefix + middle, suffix, suffix_first=True) + end
    prompt = infilling(tokenizer, prefix, suffix)
    return prompt + tokenizer.encode_infilling(middle) + end


def infilled_middle(
    tokenizer: Tokenizer,
    prefix: str,
    generated: Iterable[int],
    suffix_first: bool = False,
    taken_back: str = "",
) -> str:
    """The middle that a model wrote after `infilling(tokenizer, prefix, suffix, suffix_first)`.

    generated: the ids before EOT; after token healing they begin with the text `taken_back` from
    the prompt, which is no part of the middle. A space that the middle begins with is kept. Only
    in SPM with an empty prefix, where Llama's training put a space before the middle, one is
    dropped.
    """
    text = _after(taken_back, tokenizer.decode_infilling(generated))
    space_was_put = suffix_first and not prefix and tokenizer.puts_space
    return text.removeprefix(" ") if space_was_put else text


def completed(
    tokenizer: Tokenizer, prompt: str, generated: Iterable[int], taken_back: str = ""
) -> str:
    """The text that a model wrote after the text `prompt` (BOS and tokenizer.encode(prompt)).

    Unlike a plain decode it keeps a space that the text begins with; see infilled_middle.
    """
    if not prompt:
        return tokenizer.decode(generated)
    return _after(taken_back, tokenizer.decode_infilling(generated))


def _after(start: str, text: str) -> str:
    """`text` without `start`; empty when generation ended before it had written `start`."""
    return text[len(start) :] if text.startswith(start) else ""


def require_infilling(tokenizer: Tokenizer) -> None:
    """Raises ValueError unless the tokenizer has the four infilling marks."""
    marks = (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id)
    if None in marks:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces and no infilling marks, so its "
            "model cannot infill. Code Llama 7B, 13B and 70B and their Instruct models can "
            "(32,016 pieces); 34B and the Python models cannot"
        )


# -- chat ----------------------------------------------------------------------------------------
# A dialog is a list of {"role": "system" | "user" | "assistant", "content": text}: at most one
# system message, first; then user and assistant in turn. The 70B format also takes "destination".


def chat(tokenizer: Tokenizer, dialog: Sequence[dict[str, str]]) -> list[int]:
    """The prompt after which the model answers the last message, which is a user's.

    The format is that of Code Llama 70B Instruct if the tokenizer has a step_id (the answer ends
    with it), else that of Llama 2 chat (it ends with EOS). There is no default system message.
    Raises ValueError for a dialog out of order and for a message that contains one of TAGS.
    """
    _check_dialog(tokenizer, dialog, last="user")
    return [token for ids, _ in _turns(tokenizer, dialog) for token in ids]


def chat_example(
    tokenizer: Tokenizer, dialog: Sequence[dict[str, str]]
) -> tuple[list[int], list[bool]]:
    """A training dialog, which ends with an answer: its ids, and True where they are answer.

    True are the tokens of every assistant message and the id that ends it (EOS, or STEP for 70B):
    all that the model has to write itself. The ids begin with those of `chat` for the dialog
    without its last answer. The paper does not say what the loss covered. Raises as `chat`.
    """
    _check_dialog(tokenizer, dialog, last="assistant")
    turns = list(_turns(tokenizer, dialog))
    ids = [token for turn, _ in turns for token in turn]
    return ids, [is_answer for turn, is_answer in turns for _ in turn]


def _turns(tokenizer: Tokenizer, dialog: Sequence[dict]) -> Iterator[tuple[list[int], bool]]:
    """Yields the ids of a dialog in parts, each with whether it is answer."""
    return (_inst_turns if tokenizer.step_id is None else _source_turns)(tokenizer, dialog)


def _inst_turns(tokenizer: Tokenizer, dialog: Sequence[dict]) -> Iterator[tuple[list[int], bool]]:
    """The format of 7B, 13B and 34B: every question and its answer a document of their own."""
    texts = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        texts = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}", *texts[2:]]
    for question, answer in itertools.zip_longest(texts[::2], texts[1::2]):
        prompt = f"[INST] {question.strip()} [/INST]"
        ids = tokenizer.encode(prompt, bos=True)
        yield ids, False
        if answer is not None:
            pair = tokenizer.encode(f"{prompt} {answer.strip()} ", bos=True, eos=True)
            assert pair[: len(ids)] == ids, "a piece holds the end of the prompt and more"
            yield pair[len(ids) :], True


def _source_turns(tokenizer: Tokenizer, dialog: Sequence[dict]) -> Iterator[tuple[list[int], bool]]:
    """The format of 70B: a header before every message, STEP after it, all in one document.

    The last answer follows the header that `chat` ends with, which has a space of its own.
    """
    if dialog[0]["role"] != "system":
        dialog = [{"role": "system", "content": ""}, *dialog]
    *history, last = dialog if dialog[-1]["role"] == "assistant" else [*dialog, None]
    yield [tokenizer.bos_id], False
    for message in history:
        header = f" Source: {message['role']}"
        if "destination" in message:
            header += f"\nDestination: {message['destination']}"
        yield tokenizer.encode(header), False
        gap, content = tokenizer.encode("\n\n"), message["content"].strip()
        text = tokenizer.encode(f"\n\n {content}")[len(gap) :] if message["content"] else []
        yield (gap if message["content"] else []), False
        yield [*text, tokenizer.step_id], message["role"] == "assistant"
    yield tokenizer.encode(" Source: assistant\nDestination: user"), False
    yield tokenizer.encode("\n\n "), False
    if last:
        yield [*tokenizer.encode_infilling(last["content"].strip()), tokenizer.step_id], True


def _check_dialog(tokenizer: Tokenizer, dialog: Sequence[dict[str, str]], last: str) -> None:
    """Raises ValueError, with the message's number, unless the dialog can be written as ids."""
    keys = {"role", "content"} | ({"destination"} if tokenizer.step_id is not None else set())
    for n, message in enumerate(dialog, 1):
        if not {"role", "content"} <= set(message) <= keys:
            raise ValueError(
                f"message {n} has the keys {sorted(message)}; this model's chat takes "
                f"{', '.join(sorted(keys))}, and needs role and content"
            )
        for text in message.values():
            if not isinstance(text, str):
                raise ValueError(f"message {n} holds {text!r}, which is not a text")
            if tag := next((tag for tag in TAGS if tag in text), None):
                raise ValueError(
                    f"message {n} contains {tag!r}, a tag of the chat format; "
                    "remove it, or write it another way"
                )
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[n % 2] for n in range(len(turns))]
    if turns != expected or turns[-1:] != [last]:
        raise ValueError(
            f"the roles of the dialog are {', '.join(roles) or 'none'}; they must be user and "
            f"assistant in turn, after at most one system message, and end with {last}"
        )
