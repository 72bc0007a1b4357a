"""From a row of a data set to a text: which columns hold it, and how a conversation becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import LlmoptError, UsageError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

LAYOUTS = (("text",), ("messages",), ("prompt", "completion"))
"""What data sets for language models commonly call their columns, in order of preference."""


class Document(NamedTuple):
    """One text, as it goes to the tokenizer.

    Attributes:
        text: the text; may be empty.
        special: whether the tokenizer adds its special tokens. A chat template writes them itself.
    """

    text: str
    special: bool = True


class Record(NamedTuple):
    """One row of a file or a data set: where it stands, such as `line 12`, and its values by column."""

    place: str
    values: Mapping[str, Any]


def documents_of(
    records: Iterable[Record], column: str | None, origin: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Document]:
    """Yield the text of every record.

    The columns are chosen once, on the first record; every later record must have them.

    Args:
        records: the rows, in order.
        column: the column that the user named.
        origin: the file or data set, for messages.
        tokenizer: its chat template renders `messages`.

    Raises:
        UsageError: the column is not there, or cannot be told.
        LlmoptError: a record lacks it, or holds something that is no text.
    """
    columns: tuple[str, ...] = ()
    for record in records:
        columns = columns or choose_columns(record.values, column, origin)
        yield _document(record, columns, origin, tokenizer)


def choose_columns(first: Mapping[str, Any], column: str | None, origin: str) -> tuple[str, ...]:
    """Return the columns that hold the text: the one named, one of `LAYOUTS`, or the only column of text.

    Args:
        first: the first row; it shows which columns hold text.
        column: the column that the user named.
        origin: the file or data set, for messages.

    Raises:
        UsageError: the named column is not there, or none was named and several could be meant.
    """
    listed = f"columns: {', '.join(first)}"
    if column is not None:
        if column not in first:
            raise UsageError(f"no column `{column}` in `{origin}`", where=listed, hint=nearest(column, first))
        return (column,)
    for layout in LAYOUTS:
        if all(name in first for name in layout):
            return layout
    texts = [name for name, value in first.items() if isinstance(value, str) and not _is_number(value)]
    candidates = list(first) if len(first) == 1 else texts
    if len(candidates) != 1:
        raise UsageError(
            f"cannot tell which column of `{origin}` holds the text",
            where=listed,
            hint="name it with --column, by number if there is no header",
        )
    return (candidates[0],)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _document(record: Record, columns: tuple[str, ...], origin: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    missing = [name for name in columns if name not in record.values]
    if missing:
        raise LlmoptError(
            f"no `{missing[0]}` in {record.place} of `{origin}`",
            where=f"columns there: {', '.join(record.values) or 'none'}",
            hint="every row needs it, because the first has it; mend the row, or name another column with --column",
        )
    # An absent value (null) is an empty text, as in the sets that mark paragraphs so.
    values = [record.values[name] for name in columns if record.values[name] is not None]
    if all(isinstance(value, str) for value in values):
        return Document("".join(values))
    if all(isinstance(value, list) for value in values):
        messages = [message for value in values for message in value]
        return Document(_render(messages, f"{record.place} of `{origin}`", tokenizer), special=False)
    raise LlmoptError(
        f"`{'`, `'.join(columns)}` in {record.place} of `{origin}` is no text",
        where=f"it holds {', '.join(type(value).__name__ for value in values)}",
        hint="name a column of text, or of chat messages, with --column",
    )


def _render(messages: Sequence[Any], place: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation as the tokenizer's chat template writes it."""
    if not messages:
        return ""
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise LlmoptError(
            f"no chat messages in {place}",
            where=f"it holds {str(messages[0])[:80]}",
            hint="a message is an object with `role` and `content`",
        )
    if tokenizer.chat_template is None:
        raise LlmoptError(
            f"cannot render the messages in {place}",
            where="the model's tokenizer has no chat template",
            hint="name a column of plain text with --column, or add chat_template.jinja to the model's folder",
        )
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    except (TemplateError, TypeError) as error:
        raise LlmoptError(
            f"the chat template refuses the messages in {place}",
            where=str(error),
            hint="mend the row, or name another column with --column",
        ) from error
    assert isinstance(text, str)
    return text
