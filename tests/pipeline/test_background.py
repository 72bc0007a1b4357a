"""Results and errors of work in a thread."""

import pytest
from llmopt.pipeline.background import in_background


def test_the_result_comes_when_asked_for():
    result = in_background(lambda: 6 * 7)
    assert result() == 42
    assert result() == 42


def test_an_error_is_raised_where_the_result_is_asked_for():
    result = in_background(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result()
