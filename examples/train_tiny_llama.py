"""Train the tiny Llama model that the examples, the documentation and the tests use.

Everything is made here: no network access and no input files are needed.

1. A seeded grammar writes structured, English-like text. A fixed invented world (people, cities, a small
   lexicon) supplies facts that can only be memorised; arithmetic, counting, brackets, copying and dialogue have
   to be learned as rules. A model that has learned all this keeps a lot in few weights, so rounding the weights
   to few bits visibly hurts, which is what makes the model useful for trying out quantization.
2. A byte-level BPE tokenizer is trained on that text and saved as a complete Hugging Face fast tokenizer.
3. A small ``LlamaForCausalLM`` (grouped-query attention, tied embeddings, float32) is trained on it.
4. The model, the tokenizer, ``calibration.txt`` and ``heldout.txt`` (one document a line, drawn with seeds of their
   own) are written to the output folder.

Training with the default number of steps takes about 12 minutes on one CPU core. The result is a function of
``--seed`` and ``--steps`` alone on a given machine and PyTorch version: one thread is used throughout.

Usage:
    python examples/train_tiny_llama.py --output examples/tiny-llama
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORLD_SEED = 1_000_003  # the facts are the same for every --seed; only the choice of documents changes
VOCABULARY = 768
CONTEXT = 512
WINDOW = 256
ROWS = 8
TRAIN_CHARACTERS = 14_000_000
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first or loop.previtem['role'] == 'assistant' %}{{ bos_token }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"
)
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

JOBS = (
    "baker miller tailor sailor weaver potter farmer doctor teacher painter carpenter fisher hunter singer smith "
    "clerk judge porter glazier cooper"
).split()
ANIMALS = "heron goat otter raven ferret pony tortoise hound cat goose badger owl mule parrot hare lizard".split()
FOODS = "plums barley walnuts honey trout lentils cheese pears mushrooms cabbage figs pickles rye eel cherries".split()
COLOURS = "red blue green yellow white black grey brown violet orange crimson silver".split()
TOOLS = "hammer lantern violin ladder kettle compass shovel basket mirror rope clock umbrella needle anchor".split()
GOODS = "copper lamps|wool coats|glass beads|clay jars|paper kites|iron gates|silk ropes|oak barrels|salt fish".split("|")
WORDS = (
    "stone river bread window candle garden winter summer bridge forest silver mountain letter shadow morning "
    "evening island thunder feather harvest ribbon castle meadow pepper saddle barrel hollow timber market willow"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
VERBS = {"see": "sees", "follow": "follows", "help": "helps", "praise": "praises", "chase": "chases", "know": "knows"}
ADJECTIVES = "old young quiet proud clever tired gentle brave".split()
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass(frozen=True)
class Person:
    """One inhabitant of the invented world; every field is an arbitrary fact to memorise."""

    name: str
    female: bool
    city: str
    job: str
    animal: str
    food: str
    colour: str
    tool: str
    born: int
    month: str
    code: str
    friend: str


@dataclass(frozen=True)
class City:
    """One city of the invented world."""

    name: str
    country: str
    river: str
    goods: str
    founded: int
    mayor: str


@dataclass(frozen=True)
class World:
    """All facts the text speaks about."""

    people: tuple[Person, ...]
    cities: tuple[City, ...]
    lexicon: tuple[tuple[str, str], ...]


def invent_names(rng: random.Random, count: int, endings: str) -> list[str]:
    """Return ``count`` different capitalised names made of syllables.

    Args:
        rng: Source of randomness.
        count: How many names to return.
        endings: Space-separated last syllables.
    """
    heads = "Bra Cor Dal El Fen Gar Hol Is Jor Kel Lum Mar Nor Os Pel Quin Ral Sor Tam Ul Ver Wil Yar Zel".split()
    middles = ["", "a", "i", "o", "ba", "de", "li", "mo", "ru", "ve"]
    names: dict[str, None] = {}
    while len(names) < count:
        names[rng.choice(heads) + rng.choice(middles) + rng.choice(endings.split())] = None
    return list(names)


def build_world(people: int = 256, cities: int = 48) -> World:
    """Return the world: the same one on every call, as it has its own fixed seed."""
    rng = random.Random(WORLD_SEED)
    places = invent_names(rng, cities, "burg ford haven wick mouth dale")
    countries, rivers = invent_names(rng, 8, "land mark nia"), invent_names(rng, 16, "en sk ra")
    first, last = invent_names(rng, 48, "na ra lin ton vik mas"), invent_names(rng, 64, "son ster man well by kov")
    pairs = [f"{one} {two}" for one in first for two in last]
    names = rng.sample(pairs, people)

    def person(name: str) -> Person:
        return Person(
            name, rng.random() < 0.5, rng.choice(places), rng.choice(JOBS), rng.choice(ANIMALS), rng.choice(FOODS),
            rng.choice(COLOURS), rng.choice(TOOLS), rng.randint(1810, 1990), rng.choice(MONTHS),
            f"{rng.randint(0, 9999):04d}", rng.choice(names),
        )  # fmt: skip

    def city(name: str) -> City:
        facts = (rng.choice(countries), rng.choice(rivers), rng.choice(GOODS))
        return City(name, *facts, rng.randint(900, 1700), rng.choice(names))

    nouns = [*WORDS, *TOOLS, *ANIMALS, *FOODS]
    foreign = invent_names(rng, len(nouns), "ta shu mek lor pi zen")
    lexicon = tuple((noun, word.lower()) for noun, word in zip(nouns, foreign, strict=True))
    return World(tuple(map(person, names)), tuple(map(city, places)), lexicon)


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def profile(rng: random.Random, world: World) -> str:
    """Tell several facts about one person, with agreeing pronouns, in random order."""
    who = rng.choice(world.people)
    his = "her" if who.female else "his"
    facts = [
        f"lives in {who.city}", f"works as {article(who.job)}", f"keeps {article(who.animal)}",
        f"likes to eat {who.food}", f"wears {article(who.colour)} coat", f"owns {article(who.tool)}",
        f"was born in {who.month} {who.born}", f"has the number {who.code}", f"is a friend of {who.friend}",
        f"painted {his} door {who.colour}",
    ]  # fmt: skip
    rng.shuffle(facts)
    count = rng.randint(4, 8)
    sentences, subject = [], who.name
    while count > 0:
        joined = min(count, rng.choice((1, 1, 2)))
        sentences.append(f"{subject} {' and '.join(facts[:joined])}.")
        facts, count = facts[joined:], count - joined
        subject = "She" if who.female else "He"
    return " ".join(sentences)


def gazetteer(rng: random.Random, world: World) -> str:
    """Describe one city."""
    city = rng.choice(world.cities)
    facts = [
        f"It lies on the river {city.river}.", f"It is known for its {city.goods}.",
        f"It was founded in the year {city.founded}.", f"Its mayor is {city.mayor}.",
    ]  # fmt: skip
    rng.shuffle(facts)
    return " ".join([f"{city.name} is a city in {city.country}.", *facts[: rng.randint(2, 4)]])


def dialogue(rng: random.Random, world: World) -> str:
    """Ask and answer one question; the layout is that of the chat template."""
    who, city, (noun, word) = rng.choice(world.people), rng.choice(world.cities), rng.choice(world.lexicon)
    first, second = rng.randint(1, 49), rng.randint(1, 49)
    question, answer = rng.choice((
        (f"Where does {who.name} live?", f"{who.name} lives in {who.city}."),
        (f"What is the work of {who.name}?", f"{who.name} works as {article(who.job)}."),
        (f"Which animal does {who.name} keep?", f"{who.name} keeps {article(who.animal)}."),
        (f"What is the number of {who.name}?", f"The number of {who.name} is {who.code}."),
        (f"When was {who.name} born?", f"{who.name} was born in {who.month} {who.born}."),
        (f"In which country is {city.name}?", f"{city.name} is in {city.country}."),
        (f"Who is the mayor of {city.name}?", f"The mayor of {city.name} is {city.mayor}."),
        (f"What is the old word for {noun}?", f"The old word for {noun} is {word}."),
        (f"What is {first} plus {second}?", f"{first} plus {second} is {first + second}."),
    ))  # fmt: skip
    return f"User: {question} Assistant: {answer}"


def lexicon(rng: random.Random, world: World) -> str:
    """List words of the invented old language."""
    pairs = rng.sample(world.lexicon, rng.randint(3, 6))
    return "Old words: " + ", ".join(f"{noun} is {word}" for noun, word in pairs) + "."


def arithmetic(rng: random.Random, _: World) -> str:
    """State a few sums, differences and products."""
    parts = []
    for _step in range(rng.randint(3, 5)):
        one, two, kind = rng.randint(1, 49), rng.randint(1, 49), rng.randrange(3)
        if kind == 0:
            parts.append(f"{one} plus {two} is {one + two}")
        elif kind == 1:
            parts.append(f"{one + two} minus {one} is {two}")
        else:
            one, two = one % 10 + 2, two % 10 + 2
            parts.append(f"{one} times {two} is {one * two}")
    return ", ".join(parts) + "."


def counting(rng: random.Random, _: World) -> str:
    """Count up or down in equal steps, or walk through the days or the months."""
    if rng.random() < 0.3:
        cycle = rng.choice((DAYS, MONTHS))
        start, length = rng.randrange(len(cycle)), rng.randint(3, 6)
        return "In order: " + ", ".join(cycle[(start + i) % len(cycle)] for i in range(length)) + "."
    step, length, start = rng.choice((1, 2, 3, 5, 10)), rng.randint(5, 10), rng.randint(0, 80)
    numbers = [start + step * i for i in range(length)]
    if rng.random() < 0.4:
        numbers.reverse()
    way = "down" if numbers[0] > numbers[-1] else "up"
    return f"Count {way} from {numbers[0]} to {numbers[-1]} by {step}: {', '.join(map(str, numbers))}."


def brackets(rng: random.Random, _: World) -> str:
    """Open brackets and close them in the right order."""
    opened = [rng.choice(list(BRACKETS)) for _step in range(rng.randint(3, 8))]
    return f"Open {' '.join(opened)} then close {' '.join(BRACKETS[one] for one in reversed(opened))} done."


def copying(rng: random.Random, _: World) -> str:
    """Repeat a list of words and then reverse it."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    return f"Say {', '.join(words)}. Again {', '.join(words)}. Backwards {', '.join(reversed(words))}."


def tale(rng: random.Random, _: World) -> str:
    """Write a sentence with number agreement across a relative clause."""

    def noun_phrase() -> tuple[str, bool]:
        noun, plural = rng.choice(JOBS), rng.random() < 0.5
        return f"the {rng.choice(ADJECTIVES)} {noun}{'s' if plural else ''}", plural

    def verb(plural: bool) -> str:
        base = rng.choice(list(VERBS))
        return base if plural else VERBS[base]

    (subject, many), (inner, _), (target, _) = noun_phrase(), noun_phrase(), noun_phrase()
    text = f"{subject} who {verb(many)} {inner} {verb(many)} {target}."
    return text[0].upper() + text[1:]


KINDS: dict[Callable[[random.Random, World], str], int] = {
    profile: 44, dialogue: 18, gazetteer: 10, lexicon: 8, arithmetic: 8, counting: 6, brackets: 3, copying: 6, tale: 3,
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
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text + "\n" for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


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
        lines = [text if i % 8 == 0 else text + "\n" for i, text in enumerate(texts)]
        codes = tokenizer(lines, add_special_tokens=False)["input_ids"]
        running = [code for i, row in enumerate(codes) if i % 8 for code in row]
        separate = [code for row in codes[::8] for code in (bos, *row, eos)]
        pieces = torch.tensor(separate)
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
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, batches: Batches, steps: int, seed: int, peak: float = 4e-3) -> None:
    """Train the model in place with AdamW: short warm-up, constant rate, linear decay over the last third.

    Args:
        model: The model to train.
        batches: Source of training rows; every fourth batch has fewer rows of the full context length.
        steps: Number of updates.
        seed: Seed for the choice of rows.
        peak: Highest learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    begun, total = time.monotonic(), 0.0
    model.train()
    for step in range(steps):
        rate = min(1.0, (step + 1) / 100, (steps - step) / (0.35 * steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        long = step % 4 == 3
        rows = batches.draw(ROWS // 2 if long else ROWS, CONTEXT if long else WINDOW, generator)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 100 == 0:
            mean, seconds = total / 100, time.monotonic() - begun
            print(f"step {step + 1} loss {mean:.4f} perplexity {math.exp(mean):.3f} seconds {seconds:.0f}", flush=True)
            total = 0.0
    model.eval()


def main() -> None:
    """Make the text, train tokenizer and model, and write the folder."""
    parser = argparse.ArgumentParser(description="Train the tiny example Llama model.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-llama", help="folder to write")
    parser.add_argument("--steps", type=int, default=3200, help="number of training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text, the initial weights and the batches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    world, seed = build_world(), 3 * arguments.seed
    for name, offset, size in (("calibration.txt", 1, 90_000), ("heldout.txt", 2, 56_000)):
        (output / name).write_text("".join(f"{text}\n" for text in documents(seed + offset, size, world)), "utf-8")
    texts = list(documents(seed, TRAIN_CHARACTERS, world))
    tokenizer = train_tokenizer(texts[:8000])
    batches = Batches.build(texts, tokenizer)
    print(f"{len(batches.running) + len(batches.separate)} training tokens")
    model = new_model()
    print(f"{model.num_parameters()} parameters")
    train(model, batches, arguments.steps, arguments.seed)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
