"""A fast tokenizer's file, tokenizer.json, with fewer tokens.

The tokens that stay are chosen so that texts made of them are cut into the same pieces. For BPE that needs what is made
on the way: a merge is applied only if its two parts were made before it, so the steps by which each token is made stay
too. WordPiece takes the longest piece that fits and Unigram the likeliest way; with fewer pieces, all of which the text
needs are among them, both take what they took.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..core.errors import UsageError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ONE_ID = re.compile(r"(^|_)token_ids?$")
_DROPPABLE = frozenset({"suppress_tokens", "begin_suppress_tokens"})
_SEQUENCES = frozenset({"bad_words_ids", "force_words_ids"})
_KNOWN = ("BPE", "Unigram", "WordPiece", "WordLevel")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer.json.

    Attributes:
        file: its content.
        ids: of every token, those that were added among them.
    """

    file: Mapping[str, Any]
    ids: Mapping[str, int]

    @classmethod
    def read(cls, file: Mapping[str, Any], *, where: str) -> Vocabulary:
        """Return the vocabulary of a tokenizer.json.

        Raises:
            UsageError: its kind is unknown.
        """
        model = file["model"]
        kind = model.get("type")
        if kind not in _KNOWN or (kind == "BPE" and model.get("continuing_subword_prefix")):
            raise UsageError(
                f"a tokenizer of the kind `{kind}` cannot be made smaller",
                where=f"{where}: known are {', '.join(_KNOWN)}, BPE without a prefix for what continues a word",
                hint="leave `prune-vocab` out",
            )
        pieces = model["vocab"]
        ids = dict(pieces) if isinstance(pieces, Mapping) else {one[0]: index for index, one in enumerate(pieces)}
        ids |= {one["content"]: one["id"] for one in file.get("added_tokens") or ()}
        return cls(file, ids)

    @property
    def needed(self) -> set[int]:
        """Tokens that stay whatever the text: added ones, bytes or single characters, the unknown one."""
        model = self.file["model"]
        kept = {one["id"] for one in self.file.get("added_tokens") or ()}
        if model.get("unk_token") in self.ids:
            kept.add(self.ids[model["unk_token"]])
        if isinstance(model.get("unk_id"), int):
            kept.add(model["unk_id"])
        prefix = model.get("continuing_subword_prefix") or ""
        suffix = model.get("end_of_word_suffix") or ""
        for token, number in self.ids.items():
            bare = token.removeprefix(prefix) if token != prefix else token
            bare = bare.removesuffix(suffix) if bare != suffix else bare
            if _BYTE.fullmatch(token) if model.get("byte_fallback") else len(bare) == 1:
                kept.add(number)
        return kept

    def steps(self) -> dict[int, list[int]]:
        """Return the tokens that are made on the way to each, itself among them; itself alone where merges do not."""
        model = self.file["model"]
        if model["type"] != "BPE":
            return {number: [number] for number in self.ids.values()}
        ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
        suffix = model.get("end_of_word_suffix") or ""
        return {number: self._made(token, number, ranks, suffix) for token, number in self.ids.items()}

    def _made(self, token: str, number: int, ranks: Mapping[tuple[str, str], int], suffix: str) -> list[int]:
        ends = bool(suffix) and token.endswith(suffix) and token != suffix
        parts = list(token.removesuffix(suffix) if ends else token)
        if ends:
            parts[-1] += suffix
        made = set(parts)
        while len(parts) > 1:
            pairs = [(ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(parts))]
            rank, at = min(pairs)
            if rank == len(ranks):
                return [number]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            made.add(parts[at])
        return [self.ids[one] for one in made if one in self.ids] if made <= self.ids.keys() else [number]

    def reduced(self, kept: Mapping[int, int]) -> dict[str, Any]:
        """Return tokenizer.json with the tokens of `kept`, old id -> new id, which are told by `steps`."""
        model = dict(self.file["model"])
        pieces = model["vocab"]
        if isinstance(pieces, Mapping):
            model["vocab"] = {token: kept[number] for token, number in pieces.items() if number in kept}
        else:
            model["vocab"] = [one for number, one in enumerate(pieces) if number in kept]
            if isinstance(model.get("unk_id"), int):
                model["unk_id"] = kept[model["unk_id"]]
        if "merges" in model:
            left = model["vocab"]
            model["merges"] = [
                merge
                for merge in model["merges"]
                for first, second in [_pair(merge)]
                if first in left and second in left and first + second in left
            ]
        added = [{**one, "id": kept[one["id"]]} for one in self.file.get("added_tokens") or ()]
        made = {**self.file, "model": model, "added_tokens": added}
        if isinstance(made.get("padding"), Mapping):
            made["padding"] = {**made["padding"], "pad_id": kept[made["padding"]["pad_id"]]}
        made["post_processor"] = _processor(made.get("post_processor"), kept)
        return made


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _processor(value: Any, kept: Mapping[int, int]) -> Any:
    """Return a post-processor with new ids: pairs of a token and its id, and templates' lists of `ids`."""
    if isinstance(value, Mapping):
        return {
            key: [kept[number] for number in one]
            if key == "ids"
            else [one[0], kept[one[1]]]
            if key in {"sep", "cls"} and isinstance(one, list)
            else _processor(one, kept)
            for key, one in value.items()
        }
    return [_processor(one, kept) for one in value] if isinstance(value, list) else value


def special_ids(config: Mapping[str, Any]) -> set[int]:
    """Return the token ids that a config.json or generation_config.json names and cannot do without."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= special_ids(value)
        elif _ONE_ID.search(key):
            found |= {one for one in (value if isinstance(value, list) else [value]) if type(one) is int and one >= 0}
        elif key == "forced_decoder_ids":
            found |= {pair[1] for pair in value or () if pair[1] is not None}
    return found


def renumbered(config: Mapping[str, Any], kept: Mapping[int, int]) -> dict[str, Any]:
    """Return what changes in a config.json or generation_config.json when tokens get new ids.

    An id that the old vocabulary does not have stays as it is.
    """

    def one(number: Any) -> Any:
        return kept.get(number, number)

    changes: dict[str, Any] = {}
    for key, value in config.items():
        new = value
        if isinstance(value, Mapping):
            new = {**value, **renumbered(value, kept)}
        elif _ONE_ID.search(key):
            new = [one(number) for number in value] if isinstance(value, list) else one(value)
        elif key in _DROPPABLE and isinstance(value, list):
            new = [kept[number] for number in value if number in kept]
        elif key in _SEQUENCES and isinstance(value, list):
            new = _sequences(value, kept)
        elif key == "forced_decoder_ids" and isinstance(value, list):
            new = [[place, one(number)] for place, number in value]
        if new != value:
            changes[key] = new
    return changes


def _sequences(value: Iterable[Any], kept: Mapping[int, int]) -> list[Any]:
    """Return sequences of ids, or lists of them, without those that hold a token which is gone."""
    made: list[Any] = []
    for one in value:
        if one and isinstance(one[0], list):
            made.append(_sequences(one, kept))
        elif all(number in kept for number in one):
            made.append([kept[number] for number in one])
    return made


def closed(wanted: Collection[int], steps: Mapping[int, Collection[int]]) -> set[int]:
    """Return tokens and all that is made on the way to them."""
    return {step for number in wanted for step in steps.get(number, (number,))}
