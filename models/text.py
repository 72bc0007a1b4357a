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
from .skeleton import quiet


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the folder's tokenizer.

    Raises:
        UsageError: there is none that transformers can load.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UsageError(
            f"no tokenizer can be loaded from `{folder}`",
            where=" ".join(str(error).split())[:300] or type(error).__name__,
            hint="put tokenizer.json and tokenizer_config.json beside the weights",
        ) from None
    tokenizer.model_max_length = 10**30  # rows are cut by llmopt; the library's warning about length would mislead
    return tokenizer


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


def padded_batch(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the beginnings of rows, each shorter than the one before it, padded to the first with a mask."""
    lengths = [max(1, len(row) * (len(rows) - index) // len(rows)) for index, row in enumerate(rows)]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[at, :length] = torch.tensor(list(row[:length]))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": ids, "attention_mask": mask.to(torch.int64)}


def random_rows(vocabulary: int, *, rows: int, length: int, seed: int) -> list[list[int]]:
    """Return rows of random token ids, for comparing two forms of one model where no text is at hand."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator).tolist()
