"""A tiny tokenizer, and a reporter that remembers what it was told."""

from __future__ import annotations

import pytest
from llmopt.core.progress import Silent

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "A man is feeding a mouse to a snake, and a child is riding a horse.",
    "Numbers such as 1234 and 5.75 are in here too.",
]
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'nobody' %}{{ raise_exception('nobody may not speak') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)


class Remembering(Silent):
    """Keeps the notes."""

    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture
def reporter():
    return Remembering()


@pytest.fixture(scope="session")
def make_tokenizer():
    """Build a byte-level BPE tokenizer; `bos` says whether it knows a BOS and puts it first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def make(*, bos=True, chat=True):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(LINES, trainer)
        if bos:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        names = {"bos_token": "<s>"} if bos else {}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="</s>", model_max_length=64, clean_up_tokenization_spaces=False, **names
        )
        tokenizer.chat_template = CHAT if chat else None
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="session")
def bare(make_tokenizer):
    """A tokenizer with neither BOS nor chat template."""
    return make_tokenizer(bos=False, chat=False)


@pytest.fixture
def book(tmp_path):
    """A text of numbered lines, so that every place in it is unlike the others."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{number} {LINES[number % 3]}\n" for number in range(300)), encoding="utf-8")
    return path
