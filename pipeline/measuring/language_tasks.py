"""Tasks of language models: perplexity, multiple choice by likelihood, and generation with exact match."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ...calibration.fields import Role, Row
from ...calibration.windows import load_windows
from ...core.errors import LlmoptError, UsageError
from ...core.progress import Step
from ...core.runtime import Session
from ...evaluation.figures import tidy, word_errors
from ...evaluation.perplexity import Scores
from ...models.locate import context_length
from ...models.speech import is_speech
from ..jobs import Generation
from ..texts import Encoded
from .likelihoods import continuation, log_likelihoods, token_ids
from .subjects import Subject
from .tasks import LOGITS_PER_BATCH, MARGIN, Found, Task, is_causal, output, text_in, unknown_answer

WINDOW = 512
"""Tokens of a window of running text, unless told otherwise or the context is shorter."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Perplexity(Task):
    """How well a causal language model predicts running text, in windows that do not overlap."""

    name = "perplexity"
    settings = frozenset({"length"})
    title = "perplexity"
    roles = (Role("text", ("text", "messages")),)
    together = True

    @classmethod
    def measures(cls, config: Mapping[str, Any], *, sentence: bool) -> bool:  # noqa: ARG003
        """Return whether it is a causal language model."""
        return is_causal(config)

    def prepare(self, subject: Subject) -> None:
        """Cut the text into windows."""
        source = self.fields.source
        column = None if source.is_text else "".join(self.fields.columns.get("text", ())) or None
        options = self.options
        room = (context_length(subject.config) or WINDOW + 1) - 1  # a BOS may stand before it
        length = options.length or min(WINDOW, room)
        made = load_windows(source.spec, column, subject.tokenizer(), length=length, limit=options.limit)
        self.windows = made.rows
        self.tokens = made.tokens
        check_context(subject, max(map(len, self.windows)))

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def given(self) -> Found:
        """Return how many tokens of each window are predicted."""
        return {"tokens": [len(row) - 1 for row in self.windows]}

    def find(self, subject: Subject, session: Session, step: Step) -> Found:
        """Score every window."""
        scores = self.scores([(subject, session)], step)
        return {"loss": list(scores.losses)}

    def find_both(self, opened: Sequence[tuple[Subject, Session]], step: Step) -> Found:
        """Score every window with the model and the source, and how far they are apart."""
        scores = self.scores(opened, step)
        return {
            "loss": list(scores.losses),
            "source_loss": list(scores.reference_losses),
            "kl": list(scores.divergences),
            "agreement": list(scores.agreements),
        }

    def scores(self, opened: Sequence[tuple[Subject, Session]], step: Step) -> Scores:
        """Score every window with one model, or with two of which the second is the reference."""
        import numpy as np

        scores = Scores()
        vocabulary = int(opened[0][0].config.get("vocab_size", 1 << 16))
        for batch in _alike(self.windows, vocabulary):
            ids = np.array(batch, dtype=np.int64)
            logits = [output(session, {"input_ids": ids}, "logits", subject) for subject, session in opened]
            scores.add(ids, logits[0], logits[1] if len(logits) > 1 else None)
            step.advance(len(batch), detail=f"{sum(scores.tokens)} tokens")
        return scores

    def shown(self, index: int) -> dict[str, Any]:
        """Return nothing: a window is a piece of the running text."""
        return {"window": index}


def _alike(rows: Sequence[list[int]], vocabulary: int) -> list[list[list[int]]]:
    """Return rows of one length together, as many as keep the logits small."""
    batches: list[list[list[int]]] = []
    for row in rows:
        last = batches[-1] if batches else None
        if last and len(last[0]) == len(row) and (len(last) + 1) * len(row) * vocabulary <= LOGITS_PER_BATCH:
            last.append(row)
        else:
            batches.append([row])
    return batches


def check_context(subject: Subject, longest: int) -> None:
    """Refuse windows that are longer than the model's context.

    Raises:
        UsageError: they are.
    """
    context = context_length(subject.config)
    if context is not None and longest > context:
        raise UsageError(
            f"a window of {longest} tokens is longer than the context of `{subject.name}`",
            where=f"config.json says {context}",
            hint=f"use --length {context - 1} or less",
        )


class MultipleChoice(Task):
    """Which of several continuations of a question a causal language model finds the likeliest.

    As in Gao et al., "A framework for few-shot language model evaluation" (lm-evaluation-harness): the question, a
    space and the choice are tokenized together, and the log-likelihoods of the choice's tokens are added up; normalized
    they are divided by the choice's length in bytes.
    """

    name = "multiple-choice"
    title = "multiple choice"
    roles = (
        Role(
            "question", ("question", "query", "prompt", "context", "ctx", "stem", "goal", "sentence", "input", "text")
        ),
        Role(
            "choices",
            ("choices", "options", "endings", "candidates"),
            several=re.compile(r"[A-H]|(choice|option|ending|sol|answer)_?[0-9A-H]"),
        ),
        Role("answer", ("answer", "answerkey", "answer_key", "answer_idx", "correct", "gold", "label", "target")),
    )

    @classmethod
    def measures(cls, config: Mapping[str, Any], *, sentence: bool) -> bool:  # noqa: ARG003
        """Return whether it is a causal language model."""
        return is_causal(config)

    def prepare(self, subject: Subject) -> None:  # noqa: ARG002
        """Read questions, choices and which of them is right."""
        rows = self.rows()
        self.questions = [text_in(row, "question") for row in rows]
        read = [_choices(row) for row in rows]
        self.choices = [choices for choices, _ in read]
        base = _base(rows, self.choices)
        self.answers = [_answer(row, *one, base) for row, one in zip(rows, read, strict=True)]

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.questions)

    def given(self) -> Found:
        """Return which choice is right."""
        return {"answer": list(self.answers)}

    def find(self, subject: Subject, session: Session, step: Step) -> Found:
        """Choose for every question."""
        texts: list[tuple[int, Encoded, int]] = []
        for place, (question, choices) in enumerate(zip(self.questions, self.choices, strict=True)):
            texts += [(place, *_continued(subject, question, choice)) for choice in choices]
        likelihoods = log_likelihoods(subject, session, [(text, start) for _, text, start in texts])
        scores: list[list[float]] = [[] for _ in self.questions]
        left = [len(choices) for choices in self.choices]
        for (place, _, _), (score, _) in zip(texts, likelihoods, strict=True):
            scores[place].append(score)
            left[place] -= 1
            step.advance(int(left[place] == 0))
        return self._found(scores)

    def _found(self, scores: Sequence[Sequence[float]]) -> Found:
        found: Found = {"predicted": [], "correct": [], "correct_normalized": [], "likelihoods": []}
        for made, choices, answer in zip(scores, self.choices, self.answers, strict=True):
            normalized = [score / max(1, len(choice.encode())) for score, choice in zip(made, choices, strict=True)]
            best = _largest(made)
            found["predicted"].append(best)
            found["correct"].append(float(best == answer))
            found["correct_normalized"].append(float(_largest(normalized) == answer))
            found["likelihoods"].append([round(score, 6) for score in made])
        return found

    def shown(self, index: int) -> dict[str, Any]:
        """Return question and choices."""
        return {"question": self.questions[index], "choices": self.choices[index]}


def _largest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda at: scores[at])


def _choices(row: Row) -> tuple[list[str], list[str]]:
    """Return the choices of a row, and their labels where it has any."""
    value: Any = row.values["choices"]
    labels: list[str] = []
    if isinstance(value, dict):  # as in ARC: {"text": […], "label": […]}
        pairs = cast("dict[str, Any]", value)
        labels, value = [str(label) for label in pairs.get("label", ())], pairs.get("text")
    texts = cast("list[Any]", value) if isinstance(value, list) else []
    if len(texts) > 1 and all(isinstance(one, str) for one in texts):
        return [str(one) for one in texts], labels
    raise LlmoptError(
        f"the choices in {row.place} are no list of texts",
        where=f"it holds {row.values['choices']!r:.80}",
        hint="give a list in one column, or name several: --column choices=A+B+C+D",
    )


def _base(rows: Sequence[Row], choices: Sequence[Sequence[str]]) -> int:
    """Return 1 where answers are counted from one: none is 0, and one is as large as the number of choices."""
    numbers = [(str(row.values["answer"]).strip(), len(own)) for row, own in zip(rows, choices, strict=True)]
    whole = [(int(text), count) for text, count in numbers if text.isdecimal()]
    return int(all(number > 0 for number, _ in whole) and any(number == count for number, count in whole))


def _answer(row: Row, choices: Sequence[str], labels: Sequence[str], base: int) -> int:
    """Return the place of the right choice; it may be written as a text, a label, a number or a letter.

    Raises:
        UsageError: it is no choice.
    """
    value = row.values["answer"]
    text = str(value).strip()
    for known in (choices, labels):
        if isinstance(value, str) and text in known:
            return list(known).index(text)
    if text.isdecimal() and 0 <= int(text) - base < len(choices):
        return int(text) - base
    if len(text) == 1 and 0 <= _LETTERS.find(text.upper()) < len(choices):
        return _LETTERS.find(text.upper())
    raise unknown_answer(row, "answer", value, labels or choices)


def _continued(subject: Subject, question: str, choice: str) -> tuple[Encoded, int]:
    """Return question and choice as tokens, and where those of the choice begin."""
    tail = len(question) - len(question.rstrip())
    spaces = question[len(question) - tail :] if tail else " "
    return continuation(subject, question.rstrip(), spaces + choice)


class Generate(Task):
    """Whether what a model generates is one of the expected answers, but for white space."""

    name = "generate"
    settings = frozenset({"max_new_tokens"})
    title = "generated answers"
    roles = (
        Role("prompt", ("prompt", "question", "input", "instruction", "query", "source")),
        Role("answer", ("answer", "answers", "target", "targets", "expected", "reference", "output")),
    )

    @classmethod
    def measures(cls, config: Mapping[str, Any], *, sentence: bool) -> bool:  # noqa: ARG003
        """Return whether the model generates text from text."""
        named = str((config.get("architectures") or ["?"])[0])
        return is_causal(config) or (named.endswith("ForConditionalGeneration") and not is_speech(config))

    def prepare(self, subject: Subject) -> None:
        """Read prompts and answers."""
        rows = self.rows()
        self.prompts = [text_in(row, "prompt") for row in rows]
        self.answers = [_answers(row) for row in rows]
        tokenizer = subject.tokenizer()
        lengths = [len(tokenizer(answer)["input_ids"]) for answers in self.answers for answer in answers]
        self.new_tokens = self.options.max_new_tokens or max(lengths) + MARGIN
        check_context(subject, self.new_tokens + 1)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    def given(self) -> Found:
        """Return the answers."""
        return {"answers": list(self.answers)}

    def find(self, subject: Subject, session: Session, step: Step) -> Found:
        """Continue every prompt."""
        job = Generation(subject.directory, subject.config, subject.tokenizer())
        job.new_tokens = self.new_tokens
        context = None if subject.config.get("is_encoder_decoder") else context_length(subject.config)
        found: Found = {"generated": [], "exact": [], "word_edits": [], "words": []}
        for prompt, answers in zip(self.prompts, self.answers, strict=True):
            ids = (
                token_ids(subject, prompt)
                if is_causal(subject.config)
                else list(subject.tokenizer()(prompt)["input_ids"])
            )
            kept = ids if context is None else ids[-(context - self.new_tokens) :]
            text = str(job.run(session, [Encoded(kept)])[0]["text"])
            if not any("\n" in answer for answer in answers):
                text = text.lstrip("\n").partition("\n")[0]
            found["generated"].append(text)
            found["exact"].append(float(tidy(text) in {tidy(answer) for answer in answers}))
            edits, words = word_errors(answers, text)
            found["word_edits"].append(edits)
            found["words"].append(words)
            step.advance()
        return found

    def shown(self, index: int) -> dict[str, Any]:
        """Return the prompt."""
        return {"prompt": self.prompts[index]}


def _answers(row: Row) -> list[str]:
    value: Any = row.values["answer"]
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    if values and all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        return [str(one) for one in values]
    raise LlmoptError(
        f"the answer in {row.place} is no text",
        where=f"it holds {value!r:.80}",
        hint="give a text, or a list of texts of which each is right",
    )
