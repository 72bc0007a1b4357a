"""A smaller vocabulary: tokens that the text never has, taken out of the model and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from ..core.errors import LlmoptError, UsageError
from ..core.facts import ModelFacts
from ..core.model import ModelHandle
from ..core.params import Params
from ..core.passes import ModelPass, Need, PassContext, PassResult
from ..core.target import Target
from ..core.untrusted import read_json
from .tokenizer_json import Vocabulary, closed, renumbered, special_ids

FILE = "tokenizer.json"
_SLOW = ("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "added_tokens.json")
"""What describes the old vocabulary to slow tokenizers; tokenizer.json alone is left."""


class PruneVocabParams(Params, frozen=True, kw_only=True):
    """Parameters of `prune-vocab`."""

    multiple: Annotated[
        int,
        Meta(
            ge=1,
            description="What the number of tokens is rounded up to; the room is filled with the unseen tokens of the "
            "lowest ids.",
        ),
    ] = 8


class PruneVocab(ModelPass[PruneVocabParams]):
    """Take tokens that the calibration data never has out of embeddings, head and tokenizer.

    Special and added tokens stay, and so do bytes, or single characters where the tokenizer falls back on none, so that
    any text can still be written; what a BPE makes on the way to a token stays with it. The calibration data is cut
    into the same pieces as before, which is checked; other text is cut into more of them. Ids change: in
    tokenizer.json, config.json, generation_config.json and tokenizer_config.json. A model of which few languages are
    used loses much of its embeddings and nothing else.
    """

    name = "prune-vocab"
    needs = frozenset({Need.CALIBRATION})
    not_after = frozenset({"prune-vocab"})
    before_rounding = True
    Params = PruneVocabParams

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse a model whose tokenizer has no tokenizer.json."""
        if facts.has_tokenizer and not facts.has_fast_tokenizer:
            raise UsageError(
                f"`{facts.source}` has a slow tokenizer only",
                where=f"pass `{self.name}` rewrites {FILE}, and there is none",
                hint="convert it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) with transformers, if it can",
            )

    def run(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:
        """Take out what is never seen."""
        folder, size = model.folder, model.vocabulary_size
        vocabulary = Vocabulary.read(_json(folder / FILE), where=str(folder / FILE))
        rows, ids = _recut(folder, context.rows)
        known = set(vocabulary.ids.values())
        steps = vocabulary.steps()
        wanted = {*chain.from_iterable(rows), *chain.from_iterable(context.rows)} | vocabulary.needed
        for config in (model.facts.config, _json(folder / "generation_config.json")):
            wanted |= {number for number in special_ids(config) if number < size}
        kept = closed(wanted, steps)
        beyond = [number for number in kept if number >= size]
        if beyond:
            raise UsageError(
                f"the tokenizer has tokens that the model has not: {beyond[0]} of {size}",
                where=str(folder / FILE),
                hint="use the tokenizer that belongs to the weights",
            )
        self._fill(kept, known, steps, size)
        order = sorted(kept)
        places = {old: new for new, old in enumerate(order)}
        smaller = model.with_vocabulary(
            order,
            renumbered(model.facts.config, places),
            side_files=_rewriting(vocabulary, places),
            seed=context.seed,
        )
        _check_pieces(smaller.folder, ids, rows, places)
        result = PassResult(changed=[FILE], vocabulary=order)
        result.metrics = {
            "tokens_before_count": size,
            "tokens_after_count": len(order),
            "parameters_before_count": model.facts.parameters,
            "parameters_after_count": smaller.facts.parameters,
        }
        result.notes.append(f"{size} tokens became {len(order)}; {len(rows)} texts are cut into the same pieces")
        return smaller, result

    def _fill(self, kept: set[int], known: set[int], steps: Mapping[int, Sequence[int]], size: int) -> None:
        """Add unseen tokens until their number is round, or there are no more."""
        target = min(-(-len(kept) // self.params.multiple) * self.params.multiple, size)
        for number in (*sorted(known - kept), *(one for one in range(size) if one not in known)):
            if len(kept) >= target:
                return
            added = set(steps.get(number, (number,))) - kept
            if number < size and len(kept) + len(added) <= target:
                kept |= added


def _recut(folder: Path, rows: Iterable[Sequence[int]]) -> tuple[list[list[int]], list[str]]:
    """Return what the tokenizer makes of the text of each row, and the texts.

    A row may begin in the middle of a word, which alone is cut otherwise.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / FILE))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=True)
    return [one.ids for one in tokenizer.encode_batch(texts)], texts


def _check_pieces(folder: Path, texts: Sequence[str], rows: Sequence[Sequence[int]], places: Mapping[int, int]) -> None:
    """Prove that the new tokenizer cuts the texts as the old one did.

    Raises:
        LlmoptError: it does not.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / FILE))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for number, (row, made) in enumerate(zip(rows, tokenizer.encode_batch(list(texts)), strict=True)):
        if [places[one] for one in row] != made.ids:
            raise LlmoptError(
                "the smaller tokenizer cuts the calibration data otherwise",
                where=f"text {number + 1} of {len(rows)}: {texts[number][:60]!r}",
                hint="leave `prune-vocab` out, and report this as a defect",
            )


def _rewriting(vocabulary: Vocabulary, places: Mapping[int, int]) -> Callable[[Path], None]:
    """Return what changes the files beside the weights, in the folder of the new model."""

    def rewrite(folder: Path) -> None:
        for pattern in _SLOW:
            for path in folder.glob(pattern):
                path.unlink()
        _write(folder / FILE, vocabulary.reduced(places))
        generation = _json(folder / "generation_config.json")
        if generation:
            _write(folder / "generation_config.json", {**generation, **renumbered(generation, places)})
        settings = _json(folder / "tokenizer_config.json")
        decoder = settings.get("added_tokens_decoder")
        if decoder:
            settings["added_tokens_decoder"] = {str(places[int(number)]): one for number, one in decoder.items()}
            _write(folder / "tokenizer_config.json", settings)

    return rewrite


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
