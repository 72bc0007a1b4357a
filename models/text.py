"""Token rows to model inputs, and the tokenizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..core.errors import UsageError
from ..core.untrusted import UnreadableError, check_json_size, check_links
from .locate import context_length
from .skeleton import Skeleton, quiet

_TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "processor_config.json")
_PROOF_ROWS = 2
_PROOF_LENGTH = 16
"""Random tokens that two forms of one model are compared on."""


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the folder's tokenizer.

    Raises:
        UsageError: there is none that transformers can load.
    """
    try:
        check_tokenizer_files(folder)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ImportError) as error:
        raise UsageError(
            f"no tokenizer can be loaded from `{folder}`",
            where=" ".join(str(error).split())[:300] or type(error).__name__,
            hint="put tokenizer.json and tokenizer_config.json beside the weights",
        ) from None
    tokenizer.model_max_length = 10**30  # rows are cut by llmopt; the library's warning about length would mislead
    return tokenizer


def check_tokenizer_files(folder: Path) -> None:
    """Refuse files that a tokenizer's library would read whole, if they are too large, or lie elsewhere.

    Raises:
        UnreadableError: it names the file.
        LlmoptError: a file is a link that leads out of the folder.
    """
    check_links(folder, *_TOKENIZER_FILES)
    for pattern in _TOKENIZER_FILES:
        for path in sorted(folder.glob(pattern)):
            try:
                check_json_size(path)
            except UnreadableError as error:
                raise UnreadableError(f"{path.name}: {error}") from None


def batches(rows: Sequence[Sequence[int]], *, decoder: bool, tokens: int = 2048) -> list[dict[str, Tensor]]:
    """Return model inputs, rows of equal length together, so that nothing is padded.

    Args:
        rows: token ids.
        decoder: the model is an encoder-decoder; its decoder is given the same text.
        tokens: of a batch, where its rows are no longer than that.
    """
    by_length: defaultdict[int, list[Sequence[int]]] = defaultdict(list)
    for row in rows:
        by_length[len(row)].append(row)
    made: list[dict[str, Tensor]] = []
    for length, alike in by_length.items():
        size = max(1, tokens // length)
        for start in range(0, len(alike), size):
            ids = torch.tensor([list(row) for row in alike[start : start + size]])
            made.append({"input_ids": ids, "decoder_input_ids": ids} if decoder else {"input_ids": ids})
    return made


def random_rows(vocabulary: int, *, rows: int, length: int, seed: int) -> list[list[int]]:
    """Return rows of random token ids, for comparing two forms of one model where no text is at hand."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator).tolist()


def proof_batches(skeleton: Skeleton, seed: int) -> list[dict[str, Tensor]]:
    """Return the inputs on which two forms of one model must answer alike: a few random tokens."""
    length = min(_PROOF_LENGTH, context_length(skeleton.config.to_dict()) or _PROOF_LENGTH)
    vocabulary = skeleton.config.get_text_config().vocab_size
    rows = random_rows(vocabulary, rows=_PROOF_ROWS, length=length, seed=seed)
    return batches(rows, decoder=skeleton.has_decoder)
