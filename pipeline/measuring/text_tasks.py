"""Tasks of encoders: classes, similarity of sentences, retrieval of documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...calibration.fields import Role, Row
from ...calibration.records import Document
from ...core.errors import LlmoptError, UsageError
from ...core.progress import Step
from ...core.runtime import Session
from ...evaluation.figures import ndcg
from ..batching import BUDGET, by_tokens
from ..texts import Encoded, Encoder, longest_text
from .subjects import Subject
from .tasks import Found, Task, batch_inputs, number_in, output, text_in, unknown_answer


def _encode(subject: Subject, texts: Sequence[tuple[str, str | None]]) -> list[Encoded]:
    """Return texts, or pairs of them, as the model's own tokens."""
    encoder = Encoder(subject.tokenizer(), longest_text(subject.folder, subject.config, None))
    return encoder([(Document(one), None if other is None else Document(other)) for one, other in texts])


def _run(subject: Subject, session: Session, texts: Sequence[Encoded], name: str, done: Any) -> dict[int, Any]:
    """Return one output of every text, by its place; `done` is told how many a batch had."""
    made: dict[int, Any] = {}
    for batch in by_tokens([len(text.ids) for text in texts], BUDGET):
        rows = output(session, batch_inputs([texts[place] for place in batch], subject), name, subject)
        made.update(zip(batch, rows, strict=True))
        done(len(batch))
    return made


class Classify(Task):
    """Whether a classifier gives the right one of its classes."""

    name = "classify"
    title = "classes"
    roles = (
        Role("text", ("text", "sentence", "sentence1", "premise", "question1", "content", "review", "first")),
        Role("label", ("label", "labels", "class", "category", "target")),
        Role("pair", ("pair", "sentence2", "hypothesis", "question2", "text_pair", "second"), required=False),
    )

    @classmethod
    def measures(cls, config: Mapping[str, Any], *, sentence: bool) -> bool:
        """Return whether it is a classifier of texts with classes that exclude each other."""
        named = str((config.get("architectures") or ["?"])[0])
        kinds = {"regression", "multi_label_classification"}
        return not sentence and named.endswith("ForSequenceClassification") and config.get("problem_type") not in kinds

    def prepare(self, subject: Subject) -> None:
        """Read texts and classes."""
        rows = self.rows()
        paired = "pair" in self.fields.columns
        self.texts = [(text_in(row, "text"), text_in(row, "pair") if paired else None) for row in rows]
        named = {str(name): int(at) for at, name in dict(subject.config.get("id2label") or {}).items()}
        self.names = sorted(named, key=lambda name: named[name])
        lower = {name.lower(): at for name, at in named.items()}
        self.expected = [self._expected(row, lower) for row in rows]

    def _expected(self, row: Row, named: Mapping[str, int]) -> int:
        value = row.values["label"]
        text = str(value).strip()
        if text.lower() in named:
            return named[text.lower()]
        if text.isdecimal() and int(text) < len(self.names):
            return int(text)
        raise unknown_answer(row, "label", value, self.names)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)

    def given(self) -> Found:
        """Return the right classes."""
        return {"expected": list(self.expected)}

    def find(self, subject: Subject, session: Session, step: Step) -> Found:
        """Compute the class of every text."""
        logits = _run(subject, session, _encode(subject, self.texts), "logits", step.advance)
        if logits[0].shape[-1] < 2:
            raise UsageError(
                f"`{subject.name}` gives one number for a text, no classes",
                where=f"{subject.directory}: logits of {logits[0].shape[-1]}",
                hint="measure it by similarity or ranking in a tool of its own",
            )
        predicted = [int(logits[place].argmax()) for place in range(len(self.texts))]
        right = [float(one == other) for one, other in zip(predicted, self.expected, strict=True)]
        return {"predicted": predicted, "correct": right}

    def shown(self, index: int) -> dict[str, Any]:
        """Return the text, or the pair."""
        text, pair = self.texts[index]
        return {"text": text} if pair is None else {"text": text, "pair": pair}


def _embed(subject: Subject, session: Session, texts: Sequence[str], done: Any) -> Any:
    """Return embeddings of length 1, (texts, embedding), float64."""
    import numpy as np

    made = _run(subject, session, _encode(subject, [(text, None) for text in texts]), "sentence_embedding", done)
    vectors = np.stack([made[place] for place in range(len(texts))]).astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


class Similarity(Task):
    """How well the cosine of two sentences' embeddings follows the scores that people gave them."""

    name = "similarity"
    title = "similarity of sentences"
    roles = (
        Role("first", ("first", "sentence1", "sentence_1", "sentence_a", "text1", "anchor", "premise")),
        Role("second", ("second", "sentence2", "sentence_2", "sentence_b", "text2", "positive", "hypothesis")),
        Role("score", ("score", "similarity", "similarity_score", "relatedness_score", "relatedness", "label")),
    )

    @classmethod
    def measures(cls, config: Mapping[str, Any], *, sentence: bool) -> bool:  # noqa: ARG003
        """Return whether it gives embeddings of whole texts."""
        return sentence

    def prepare(self, subject: Subject) -> None:  # noqa: ARG002
        """Read pairs and scores."""
        rows = self.rows()
        self.pairs = [(text_in(row, "first"), text_in(row, "second")) for row in rows]
        self.scores = [number_in(row, "score") for row in rows]
        if len(set(self.scores)) < 2:
            raise LlmoptError(
                f"all scores in `{self.fields.source.spec}` are equal",
                where=f"{len(rows)} rows",
                hint="a rank correlation needs scores that differ",
            )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def given(self) -> Found:
        """Return the scores."""
        return {"score": list(self.scores)}

    def find(self, subject: Subject, session: Session, step: Step) -> Found:
        """Compute the cosine of every pair; a sentence that occurs often is computed once."""
        texts = list(dict.fromkeys(text for pair in self.pairs for text in pair))
        progress = _Share(step, len(self.pairs), len(texts))
        vectors = _embed(subject, session, texts, progress.advance)
        places = {text: place for place, text in enumerate(texts)}
        return {"similarity": [float(vectors[places[one]] @ vectors[places[other]]) for one, other in self.pairs]}

    def shown(self, index: int) -> dict[str, Any]:
        """Return the pair."""
        return dict(zip(("first", "second"), self.pairs[index], strict=True))


class Retrieval(Task):
    """How high the relevant documents rank among all documents of the file, by cosine."""

    name = "retrieval"
    title = "retrieval"
    roles = (
        Role("query", ("query", "question", "anchor", "query_text")),
        Role("document", ("document", "passage", "positive", "corpus", "text", "answer", "context")),
        Role("relevance", ("relevance", "score", "label"), required=False),
    )
    DEPTH: ClassVar[int] = 10

    @classmethod
    def measures(cls, config: Mapping[str, Any], *, sentence: bool) -> bool:  # noqa: ARG003
        """Return whether it gives embeddings of whole texts."""
        return sentence

    def prepare(self, subject: Subject) -> None:  # noqa: ARG002
        """Read queries, documents and which belong together."""
        self.relevant: dict[str, dict[str, float]] = {}
        self.documents: list[str] = []
        seen: set[str] = set()
        graded = "relevance" in self.fields.columns
        for row in self.rows():
            query, document = text_in(row, "query"), text_in(row, "document")
            relevance = number_in(row, "relevance") if graded else 1.0
            if document not in seen:
                seen.add(document)
                self.documents.append(document)
            if relevance > 0:
                self.relevant.setdefault(query, {})[document] = relevance
        if not self.relevant:
            raise LlmoptError(
                f"no query in `{self.fields.source.spec}` has a relevant document",
                hint="a row with a relevance above 0 says that a document answers a query",
            )
        self.queries = list(self.relevant)

    def __len__(self) -> int:
        """Return the number of queries that have relevant documents."""
        return len(self.queries)

    def given(self) -> Found:
        """Return how many documents are relevant."""
        return {"relevant": [len(self.relevant[query]) for query in self.queries]}

    def find(self, subject: Subject, session: Session, step: Step) -> Found:
        """Rank the documents for every query."""
        import numpy as np

        progress = _Share(step, len(self.queries), len(self.queries) + len(self.documents))
        corpus = _embed(subject, session, self.documents, progress.advance)
        found: Found = {"ndcg": [], "best": []}
        for query, vector in zip(self.queries, _embed(subject, session, self.queries, progress.advance), strict=True):
            order: list[int] = np.argsort(-(corpus @ vector), kind="stable")[: self.DEPTH].tolist()
            gains = [self.relevant[query].get(self.documents[place], 0.0) for place in order]
            found["ndcg"].append(ndcg(gains, list(self.relevant[query].values()), self.DEPTH))
            found["best"].append(self.documents[order[0]])
        return found

    def shown(self, index: int) -> dict[str, Any]:
        """Return the query."""
        return {"query": self.queries[index]}


class _Share:
    """Advances a progress of samples as texts are done, of which there are more or fewer than samples."""

    def __init__(self, step: Step, samples: int, texts: int) -> None:
        self._step, self._samples, self._texts = step, samples, texts
        self._done = self._said = 0

    def advance(self, amount: int) -> None:
        """Count texts."""
        self._done += amount
        reached = self._done * self._samples // max(1, self._texts)
        self._step.advance(reached - self._said)
        self._said = reached
