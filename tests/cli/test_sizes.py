"""Amounts of memory as people write them."""

import pytest
from llmopt.cli.common import parse_size
from llmopt.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 << 30), ("2G", 2 << 30), ("1.5 GB", 1_500_000_000), ("800MiB", 800 << 20), ("64kib", 64 << 10)],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "2", "GiB", "-1GiB", "2 gigs", "1,5GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="no amount of memory"):
        parse_size(text)
