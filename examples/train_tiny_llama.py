"""Train the tiny Llama model that the examples, the documentation and the tests use.

Everything is made here: no network access and no input files are needed.

1. A seeded grammar writes structured, English-like text. A fixed invented world (people, cities, a small
   lexicon) supplies facts that can only be memorised; arithmetic, counting, brackets, copying and dialogue
   have to be learned as rules. A model that has learned all this keeps a lot in few weights, so rounding them
   to few bits visibly hurts, which is what makes the model useful for trying out quantization.
2. A byte-level BPE tokenizer is trained on that text and saved as a complete Hugging Face fast tokenizer.
3. A small ``LlamaForCausalLM`` (grouped-query attention, tied embeddings, float32) is trained on it.
4. The model, the tokenizer, ``calibration.txt`` and ``heldout.txt`` (one document a line, each drawn with a
   seed of its own) are written to the output folder.

The default number of steps took 20 minutes on one core of a busy machine; on a free core about 13 are to be
expected. The result depends on ``--seed`` and ``--steps`` alone on a given machine and PyTorch version: one
thread is used throughout.

Usage:
    python examples/train_tiny_llama.py --output examples/tiny-llama
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORLD_SEED = 1_000_003  # the facts are the same for every --seed; only the choice of documents changes
VOCABULARY = 768
CONTEXT = 512
SHORT, LONG = (8, 256), (4, CONTEXT)  # rows and tokens of a training batch
TRAIN_CHARACTERS = 14_000_000
FILES = (("calibration.txt", 90_000), ("heldout.txt", 56_000))
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first or loop.previtem['role'] == 'assistant' %}{{ bos_token }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"
)


def split(text: str) -> list[str]:
    """Return the comma-separated or space-separated items of ``text``."""
    return text.split(", ") if ", " in text else text.split()


JOBS = split(
    "baker miller tailor sailor weaver potter farmer doctor teacher painter carpenter fisher hunter singer "
    "smith clerk judge porter glazier cooper"
)
ANIMALS = split("heron goat otter raven ferret pony tortoise hound cat goose badger owl mule parrot hare")
FOODS = split("plums barley walnuts honey trout lentils cheese pears mushrooms cabbage figs pickles rye")
COLOURS = split("red blue green yellow white black grey brown violet orange crimson silver")
TOOLS = split("hammer lantern violin ladder kettle compass shovel basket mirror rope clock umbrella needle")
GOODS = split("copper lamps, wool coats, glass beads, clay jars, paper kites, iron gates, silk ropes")
WORDS = split(
    "stone river bread window candle garden winter summer bridge forest silver mountain letter shadow "
    "morning evening island thunder feather harvest ribbon castle meadow pepper saddle barrel timber market"
)
DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split("January February March April May June July August September October November December")
VERBS = split("see follow help praise know greet")
ADJECTIVES = split("old young quiet proud clever tired gentle brave")
HEADS = split("Bra Cor Dal El Fen Gar Hol Is Jor Kel Lum Mar Nor Os Pel Quin Ral Sor Tam Ul Ver Wil Yar Zel")
MIDDLES = ["", *split("a i o ba de li mo ru ve")]
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass(frozen=True)
class World:
    """All the facts the text speaks about; each is an arbitrary choice that can only be memorised."""

    people: list[dict[str, str]]
    cities: list[dict[str, str]]
    lexicon: list[tuple[str, str]]


def invent_names(rng: random.Random, count: int, endings: str) -> list[str]:
    """Return ``count`` different names made of syllables, the last one out of ``endings``."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[rng.choice(HEADS) + rng.choice(MIDDLES) + rng.choice(split(endings))] = None
    return list(names)


def build_world(people: int = 320, cities: int = 48) -> World:
    """Return the world: the same one on every call, as it has its own fixed seed."""
    rng = random.Random(WORLD_SEED)
    places = invent_names(rng, cities, "burg ford haven wick mouth dale")
    countries, rivers = invent_names(rng, 8, "land mark nia"), invent_names(rng, 16, "en sk ra")
    first, last = invent_names(rng, 48, "na ra lin ton vik mas"), invent_names(rng, 64, "son man well by kov")
    names = rng.sample([f"{one} {two}" for one in first for two in last], people)
    choices = {
        "sex": ["female", "male"], "city": places, "job": JOBS, "animal": ANIMALS, "food": FOODS,
        "colour": COLOURS, "door": COLOURS, "tool": TOOLS, "friend": names, "month": MONTHS,
        "year": [str(year) for year in range(1810, 1990)],
        "code": [f"{code:06d}" for code in range(1_000_000)],
    }  # fmt: skip
    city_choices = {
        "country": countries, "river": rivers, "goods": GOODS, "mayor": names,
        "founded": [str(year) for year in range(900, 1700)],
    }  # fmt: skip
    nouns = [*WORDS, *TOOLS, *ANIMALS, *FOODS]
    foreign = [word.lower() for word in invent_names(rng, len(nouns), "ta shu mek lor pi zen")]

    def settle(name: str, options: dict[str, list[str]]) -> dict[str, str]:
        return {"name": name} | {key: rng.choice(values) for key, values in options.items()}

    return World(
        [settle(name, choices) for name in names],
        [settle(name, city_choices) for name in places],
        list(zip(nouns, foreign, strict=True)),
    )


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def profile(rng: random.Random, world: World) -> str:
    """Tell several facts about one person, with agreeing pronouns, in random order."""
    who = rng.choice(world.people)
    female = who["sex"] == "female"
    facts = [
        f"lives in {who['city']}", f"works as {article(who['job'])}", f"keeps {article(who['animal'])}",
        f"likes to eat {who['food']}", f"wears {article(who['colour'])} coat", f"owns {article(who['tool'])}",
        f"was born in {who['month']} {who['year']}", f"has the number {who['code']}",
        f"is a friend of {who['friend']}", f"painted {'her' if female else 'his'} door {who['door']}",
    ]  # fmt: skip
    rng.shuffle(facts)
    facts = facts[: rng.randint(4, 8)]
    sentences, subject = [], who["name"]
    while facts:
        joined = rng.choice((1, 1, 2))
        sentences.append(f"{subject} {' and '.join(facts[:joined])}.")
        facts, subject = facts[joined:], "She" if female else "He"
    return " ".join(sentences)


def gazetteer(rng: random.Random, world: World) -> str:
    """Describe one city."""
    city = rng.choice(world.cities)
    facts = [
        f"It lies on the river {city['river']}.", f"It is known for its {city['goods']}.",
        f"It was founded in the year {city['founded']}.", f"Its mayor is {city['mayor']}.",
    ]  # fmt: skip
    rng.shuffle(facts)
    return " ".join([f"{city['name']} is a city in {city['country']}.", *facts[: rng.randint(2, 4)]])


def dialogue(rng: random.Random, world: World) -> str:
    """Ask and answer one question; the layout is that of the chat template."""
    who, city, (noun, word) = rng.choice(world.people), rng.choice(world.cities), rng.choice(world.lexicon)
    one, two = rng.randint(1, 49), rng.randint(1, 49)
    name, place = who["name"], city["name"]
    question, answer = rng.choice((
        (f"Where does {name} live?", f"{name} lives in {who['city']}."),
        (f"What is the work of {name}?", f"{name} works as {article(who['job'])}."),
        (f"Which animal does {name} keep?", f"{name} keeps {article(who['animal'])}."),
        (f"What is the number of {name}?", f"The number of {name} is {who['code']}."),
        (f"When was {name} born?", f"{name} was born in {who['month']} {who['year']}."),
        (f"In which country is {place}?", f"{place} is in {city['country']}."),
        (f"Who is the mayor of {place}?", f"The mayor of {place} is {city['mayor']}."),
        (f"What is the old word for {noun}?", f"The old word for {noun} is {word}."),
        (f"What is {one} plus {two}?", f"{one} plus {two} is {one + two}."),
    ))  # fmt: skip
    return f"User: {question} Assistant: {answer}"


def old_words(rng: random.Random, world: World) -> str:
    """List words of the invented old language."""
    pairs = rng.sample(world.lexicon, rng.randint(3, 6))
    return "Old words: " + ", ".join(f"{noun} is {word}" for noun, word in pairs) + "."


def arithmetic(rng: random.Random, _: World) -> str:
    """State a few products, or keep a running total of sums and differences."""
    if rng.random() < 0.3:
        pairs = [(rng.randint(2, 12), rng.randint(2, 12)) for _step in range(rng.randint(3, 6))]
        return ", ".join(f"{one} times {two} is {one * two}" for one, two in pairs) + "."
    total = rng.randint(10, 99)
    parts = [f"Start with {total}"]
    for _step in range(rng.randint(4, 9)):
        change = rng.randint(1, 29) if total < 30 or rng.random() < 0.5 else -rng.randint(1, 29)
        total += change
        parts.append(f"{'plus' if change > 0 else 'minus'} {abs(change)} is {total}")
    return ", ".join(parts) + "."


def counting(rng: random.Random, _: World) -> str:
    """Count up or down in equal steps, or walk through the days or the months."""
    if rng.random() < 0.3:
        cycle = rng.choice((DAYS, MONTHS))
        start, length = rng.randrange(len(cycle)), rng.randint(3, 6)
        return "In order: " + ", ".join(cycle[(start + i) % len(cycle)] for i in range(length)) + "."
    step, start = rng.randint(1, 15), rng.randint(0, 99)
    numbers = [start + step * i for i in range(rng.randint(6, 14))]
    if rng.random() < 0.4:
        numbers.reverse()
    way = "down" if numbers[0] > numbers[-1] else "up"
    return f"Count {way} from {numbers[0]} to {numbers[-1]} by {step}: {', '.join(map(str, numbers))}."


def brackets(rng: random.Random, _: World) -> str:
    """Open brackets and close them in the right order."""
    opened = rng.choices(list(BRACKETS), k=rng.randint(3, 8))
    closed = [BRACKETS[one] for one in reversed(opened)]
    return f"Open {' '.join(opened)} then close {' '.join(closed)} done."


def copying(rng: random.Random, _: World) -> str:
    """Say a list of words, repeat it and then reverse it."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    return f"Say {', '.join(words)}. Again {', '.join(words)}. Backwards {', '.join(reversed(words))}."


def tale(rng: random.Random, _: World) -> str:
    """Write a sentence with number agreement across a relative clause."""
    ending = rng.choice(("", "s"))  # of the subject; its verbs take the other one
    subject, inner, target = (f"{rng.choice(ADJECTIVES)} {rng.choice(JOBS)}" for _part in range(3))
    first, second = (rng.choice(VERBS) + ("" if ending else "s") for _part in range(2))
    return f"The {subject}{ending} who {first} the {inner} {second} the {target}."


KINDS: dict[Callable[[random.Random, World], str], int] = {
    profile: 40, dialogue: 16, gazetteer: 8, old_words: 6, arithmetic: 12, counting: 14, copying: 5,
    brackets: 3, tale: 3,
}  # fmt: skip


def documents(seed: int, characters: int, world: World) -> Iterator[str]:
    """Yield documents, one line each, until about ``characters`` characters have been written."""
    rng = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    written = 0
    while written < characters:
        text = rng.choices(kinds, weights)[0](rng, world)
        written += len(text) + 1
        yield text


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts ``<s>`` in front and keeps digits apart."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special_tokens = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text + "\n" for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    settings = {"model_max_length": CONTEXT, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **settings)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under the class name that older releases of transformers know as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Batches:
    """Training rows: running text behind a ``<s>``, and some rows of separate ``<s>document</s>`` pieces."""

    running: torch.Tensor
    separate: torch.Tensor
    starts: torch.Tensor
    bos: int

    @classmethod
    def build(cls, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Batches:
        """Tokenize the texts; one document in eight goes to the separate pieces."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        lines = [text + "\n" if i % 8 else text for i, text in enumerate(texts)]
        codes = tokenizer(lines, add_special_tokens=False)["input_ids"]
        running = [code for i, row in enumerate(codes) if i % 8 for code in row]
        pieces = torch.tensor([code for row in codes[::8] for code in (bos, *row, eos)])
        starts = torch.nonzero(pieces[: -CONTEXT - 1] == bos).flatten()
        return cls(torch.tensor(running), pieces, starts, bos)

    def draw(self, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Return ``rows`` random rows of ``length`` tokens; the last row holds separate pieces."""
        offsets = torch.randint(len(self.running) - length, (rows,), generator=generator)
        batch = torch.stack([self.running[at : at + length] for at in offsets.tolist()]).roll(1, dims=1)
        batch[:, 0] = self.bos
        at = int(self.starts[torch.randint(len(self.starts), (1,), generator=generator)])
        batch[-1] = self.separate[at : at + length]
        return batch


def new_model() -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
        tie_word_embeddings=True, initializer_range=0.04, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return model


def train(model: LlamaForCausalLM, batches: Batches, steps: int, seed: int, peak: float = 5e-3) -> None:
    """Train the model in place with AdamW: short warm-up, constant rate, linear decay over the last third.

    Args:
        model: The model to train.
        batches: Source of training rows; every fourth batch has fewer rows of the full context length.
        steps: Number of updates.
        seed: Seed for the choice of rows.
        peak: Highest learning rate.

    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    begun, total = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, step / 100, (steps - step + 1) / (0.35 * steps))
        rows = batches.draw(*(SHORT if step % 4 else LONG), generator)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 100 == 0:
            spent = time.monotonic() - begun
            print(f"step {step}: perplexity {math.exp(total / 100):.3f}, {spent:.0f} s", flush=True)
            total = 0.0
    model.eval()


def main() -> None:
    """Make the text, train tokenizer and model, and write the folder."""
    parser = argparse.ArgumentParser(description="Train the tiny example Llama model.")
    folder = Path(__file__).parent / "tiny-llama"
    parser.add_argument("--output", type=Path, default=folder, help="folder to write")
    parser.add_argument("--steps", type=int, default=3300, help="number of training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of text, initial weights and batches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    world, seed = build_world(), 3 * arguments.seed
    for offset, (name, size) in enumerate(FILES, start=1):
        text = "".join(f"{line}\n" for line in documents(seed + offset, size, world))
        (arguments.output / name).write_text(text, encoding="utf-8")
    texts = list(documents(seed, TRAIN_CHARACTERS, world))
    tokenizer = train_tokenizer(texts[:8000])
    save_tokenizer(tokenizer, arguments.output)
    model = new_model()
    print(f"{model.num_parameters()} parameters", flush=True)
    train(model, Batches.build(texts, tokenizer), arguments.steps, arguments.seed)
    model.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
