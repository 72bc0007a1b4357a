"""Hidden states between blocks: narrow in memory or on disk, float32 when they are asked for."""

import pytest
import torch
from llmopt.models.states import States, first_rows


def output():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 4, generator=generator), None, (torch.arange(6).view(2, 3),))


@pytest.mark.parametrize("limit", [None, 0, 150], ids=["memory", "disk", "one of two on disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_kept_comes_back_rounded_to_the_dtype(limit, dtype, tmp_path):
    states = States(dtype) if limit is None else States(dtype, tmp_path, limit)
    made = output()
    for batch in range(2):
        states[0, batch] = (made[0] + batch, *made[1:])
    for batch in range(2):
        hidden, nothing, (numbers,) = states[0, batch]
        assert hidden.dtype == torch.float32
        assert hidden.equal((made[0] + batch).to(dtype).float())
        assert nothing is None
        assert numbers.equal(made[2][0])
    assert bool(list(tmp_path.iterdir())) == (limit is not None)


def test_the_last_output_counts(tmp_path):
    states = States(torch.float32, tmp_path, 0)
    for value in (1.0, 2.0):
        states[1, 0] = torch.full((2, 2), value)
    assert states[1, 0].equal(torch.full((2, 2), 2.0))


def test_what_float16_cannot_hold_stays_wide():
    states = States(torch.float16)
    states[0, 0] = torch.tensor([1.0, 1e6])
    assert states[0, 0].equal(torch.tensor([1.0, 1e6]))


def test_first_rows_leaves_what_has_no_rows():
    made = output()
    hidden, nothing, (numbers,) = first_rows(made, 1, 2)
    assert hidden.equal(made[0][:1])
    assert nothing is None
    assert numbers.equal(made[2][0][:1])
    assert first_rows(torch.zeros(5), 1, 2).shape == (5,)
