"""The losses against what their definitions say, and the order of the data."""

import itertools
import math

import pytest
import torch
from llmopt.passes.training.logit_cache import LogitCache
from llmopt.passes.training.loop import Settings, rate_at
from llmopt.passes.training.losses import (
    cosine_distance,
    divergence,
    next_token,
    of_logs,
    relation,
    state_error,
    with_rest,
)
from llmopt.passes.training.order import Counts, Order, batch_of
from llmopt.passes.training.taps import matched
from torch.nn import functional


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences(kind, temperature):
    ours, theirs = 3 * random(2, 5, 7), 3 * random(2, 5, 7, seed=1)
    made = divergence(kind, ours, theirs, temperature)
    for row, place in itertools.product(range(2), range(5)):
        q = torch.softmax(ours[row, place] / temperature, -1).tolist()
        p = torch.softmax(theirs[row, place] / temperature, -1).tolist()
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        expected = {"kl": kl(p, q), "reverse_kl": kl(q, p), "js": (kl(p, middle) + kl(q, middle)) / 2}[kind]
        assert float(made[row, place]) == pytest.approx(expected * temperature**2, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js"])
def test_a_divergence_of_itself_is_zero_and_none_is_negative(kind):
    logits = random(4, 9)
    assert float(divergence(kind, logits, logits).abs().max()) < 1e-6
    assert bool((divergence(kind, logits, random(4, 9, seed=1)) > 0).all())


def test_the_most_likely_classes_and_the_rest():
    """All classes but one named: the rest is that one, so the divergence is the whole one."""
    ours, theirs = torch.log_softmax(random(6, 5), -1), torch.log_softmax(random(6, 5, seed=1), -1)
    values, ids = theirs.topk(4, -1)
    made = of_logs("kl", with_rest(ours.gather(-1, ids)), with_rest(values))
    assert torch.allclose(made, of_logs("kl", ours, theirs), atol=1e-6)
    fewer, ids = theirs.topk(2, -1)
    assert bool((of_logs("kl", with_rest(ours.gather(-1, ids)), with_rest(fewer)) <= made + 1e-9).all())


def test_next_token_counts_real_tokens_only():
    logits, ids = random(2, 6, 11), torch.randint(0, 11, (2, 6))
    mask = torch.ones(2, 6)
    mask[1, 4:] = 0
    expected = functional.cross_entropy(logits[0, :5], ids[0, 1:], reduction="sum")
    expected += functional.cross_entropy(logits[1, :3], ids[1, 1:4], reduction="sum")
    assert float(next_token(logits, ids, mask)) == pytest.approx(float(expected), rel=1e-6)


def naive_relation(ours, theirs, lengths, heads):
    total = 0.0
    for row, length in enumerate(lengths):
        for head in range(heads):
            shares = []
            for vectors in (theirs, ours):
                width = vectors.shape[-1] // heads
                part = vectors[row, :length, head * width : (head + 1) * width]
                shares.append(torch.softmax(part @ part.T / math.sqrt(width), -1))
            p, q = shares
            total += float((p * (p / q).log()).sum()) / heads
    return total


def test_relations_of_models_of_different_width():
    ours, theirs = random(2, 5, 8), random(2, 5, 12, seed=1)
    mask = torch.tensor([[1.0] * 5, [1.0, 1.0, 1.0, 0.0, 0.0]])
    made = float(relation(ours, theirs, mask, 4))
    assert made == pytest.approx(naive_relation(ours, theirs, [5, 3], 4), rel=1e-5)
    ours[1, 3:] = 100.0  # padding
    assert float(relation(ours, theirs, mask, 4)) == pytest.approx(made, rel=1e-6)


def test_relations_have_finite_gradients_where_texts_are_padded():
    ours = random(2, 5, 8).float().requires_grad_()
    mask = torch.tensor([[1.0] * 5, [1.0, 1.0, 0.0, 0.0, 0.0]])
    relation(ours, random(2, 5, 8, seed=1), mask, 2).backward()
    assert bool(torch.isfinite(ours.grad).all())
    assert bool((ours.grad[1, 2:] == 0).all())


def test_errors_of_states_are_relative_to_each_token():
    theirs, mask = random(1, 3, 4), torch.tensor([[1.0, 1.0, 0.0]])
    theirs[0, 1] *= 1000
    assert float(state_error(theirs * 1.1, theirs, mask)) == pytest.approx(2 * 0.01, rel=1e-4)


def test_cosine_distance():
    ours = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert float(cosine_distance(ours, torch.tensor([[0.0, 1.0], [0.0, 5.0]]))) == pytest.approx(1.0)


@pytest.mark.parametrize(("student", "teacher", "pairs"), [(3, 6, [1, 3, 5]), (4, 6, [1, 2, 3, 5]), (2, 2, [0, 1])])
def test_blocks_are_compared_evenly(student, teacher, pairs):
    assert matched(student, teacher) == list(enumerate(pairs))


ROWS = [[row] * (3 + row % 4) for row in range(10)]


def order(processes=1, process=0, at_once=2, parts=2, seed=0):
    return Order(ROWS, at_once=at_once, parts=parts, processes=processes, process=process, seed=seed)


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order():
    numbers = [number for step in range(5) for number in order().chosen(step)]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]
    assert order(seed=1).chosen(0) != order().chosen(0)


def test_a_step_follows_from_its_number_alone():
    one = order()
    forward = [one.chosen(step) for step in range(6)]
    assert [order().chosen(step) for step in reversed(range(6))] == forward[::-1]


def test_two_processes_do_what_one_of_twice_the_batch_does():
    whole = order(at_once=4)
    shares = [order(processes=2, process=process) for process in range(2)]
    for step in range(3):
        for part, batch in enumerate(whole.batches(step)):
            assert batch.rows == [row for share in shares for row in share.batches(step)[part].rows]


def test_shorter_rows_are_padded_and_not_counted():
    batch = batch_of(ROWS, [0, 3])
    assert batch.ids.tolist() == [[0, 0, 0, 0, 0, 0], [3] * 6]
    assert batch.mask.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert not batch.full
    assert Counts.of(ROWS, [0, 3]) == Counts(tokens=9, predicted=7, texts=2, answers=0)


def test_the_learning_rate_rises_and_falls():
    settings = Settings(
        steps=100,
        rate=2.0,
        warmup=0.1,
        clip=1.0,
        evaluate_every=10,
        patience=None,
        checkpoint_every=None,
        weights={},
        measured=(),
    )
    rates = [rate_at(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.01


class TestCache:
    def cache(self, folder, **changes):
        settings = {"top": 3, "temperature": 2.0} | changes
        return LogitCache(folder, {"teacher": "a"}, ROWS, **settings)

    def test_what_is_read_is_what_was_likeliest_in_half_precision(self, tmp_path):
        batch = batch_of(ROWS, [5, 2])
        logits = random(2, 5, 9)
        cache = self.cache(tmp_path / "cache")
        assert not cache.holds([5])
        cache.put(batch, logits)
        again = self.cache(tmp_path / "cache")
        assert again.holds([5, 2])
        assert not again.holds([5, 1])
        got = again.get(batch)
        values, ids = torch.log_softmax(logits.float() / 2, -1).topk(3, -1)
        assert torch.equal(got["top_ids"][0, :4], ids[0, :4])
        assert torch.equal(got["top_logs"][1, :5], values[1, :5].half().float())
        swapped = again.get(batch_of(ROWS, [2, 5]))
        assert torch.equal(swapped["top_logs"][1, :4], got["top_logs"][0, :4])

    @pytest.mark.parametrize("changes", [{"top": 4}, {"temperature": 1.0}])
    def test_answers_to_something_else_are_refused(self, tmp_path, changes):
        from llmopt.core.errors import UsageError

        self.cache(tmp_path / "cache")
        with pytest.raises(UsageError, match="answers to something else"):
            self.cache(tmp_path / "cache", **changes)

    def test_a_foreign_folder_is_refused(self, tmp_path):
        from llmopt.core.errors import UsageError

        (tmp_path / "letter.txt").write_text("dear")
        with pytest.raises(UsageError, match="no cache"):
            self.cache(tmp_path)
