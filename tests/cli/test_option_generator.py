"""Parameter structs become options: names, help, values, refusals."""

from typing import Annotated, Literal

import pytest
import typer
from llmopt.cli.app import _single
from llmopt.cli.help import command_help
from llmopt.cli.options import Source, parse_pairs, refuse_foreign, with_options
from llmopt.cli.parameters import parameters
from llmopt.core.errors import UsageError
from llmopt.core.params import GroupSizeParam, Ignore, Params, Symmetric
from msgspec import Meta


class One(Params):
    group_size: GroupSizeParam = 128
    symmetric: Symmetric = True
    ignore: Ignore = ()
    mode: Annotated[Literal["fast", "good"], Meta(description="How.")] = "fast"
    share: Annotated[float, Meta(gt=0, le=1, description="How much.")] = 0.5
    deep: Annotated[bool, Meta(description="Deeply.")] = False
    careful: Annotated[bool, Meta(description="Carefully.")] = True
    note: Annotated[str | None, Meta(description="A word.")] = None


class Two(Params):
    mode: Annotated[Literal["fast", "good"], Meta(description="How.")] = "good"
    level: Annotated[int, Meta(ge=1, le=9, description="How far.")] = 3


@pytest.fixture
def call():
    """Return a function that parses a command line and returns the options that reached the command."""
    reached = []

    @with_options(Source("one", One, always=False), Source("two", Two, always=False))
    def command(name: str, *, options) -> None:
        """Do it."""
        reached.append(options)

    built = typer.main.get_command(_single("it", command))

    def run(*arguments):
        with built.make_context("it", ["x", *arguments]) as context:
            built.invoke(context)
        return reached[-1]

    run.help = command_help(built, typer.Context(built, info_name="it"), 100)
    return run


def test_nothing_given_is_nothing_set(call):
    assert call() == {"one": {}, "two": {}}


def test_values_have_the_type_of_their_field(call):
    given = call("--group-size", "64", "--asymmetric", "--share", "0.25", "--deep", "--no-careful", "--note", "7")
    assert given["one"] == {
        "group_size": 64,
        "symmetric": False,
        "share": 0.25,
        "deep": True,
        "careful": False,
        "note": "7",
    }


def test_a_choice_beside_a_number(call):
    assert call("--group-size", "channel")["one"] == {"group_size": "channel"}


def test_a_list_is_repeated(call):
    assert call("--ignore", "lm_head", "--ignore", "*.0.*")["one"] == {"ignore": ["lm_head", "*.0.*"]}


def test_a_shared_parameter_reaches_both(call):
    assert call("--mode", "good") == {"one": {"mode": "good"}, "two": {"mode": "good"}}


@pytest.mark.parametrize(
    ("arguments", "message", "expected"),
    [
        (["--share", "0"], "bad value for --share: 0", "number, above 0, at most 1"),
        (["--share", "much"], "bad value for --share: much", "number, above 0, at most 1"),
        (["--level", "10"], "bad value for --level: 10", "integer, at least 1, at most 9"),
        (["--level", "1.5"], "bad value for --level: 1.5", "integer, at least 1, at most 9"),
        (
            ["--group-size", "tensr"],
            "bad value for --group-size: tensr",
            "integer, at least 1 or block or channel or tensor",
        ),
        (["--mode", "god"], "bad value for --mode: god", "fast or good"),
    ],
)
def test_bad_values_are_refused_in_words(call, arguments, message, expected):
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    assert caught.value.what == message
    assert caught.value.where == f"expected {expected}"


def test_a_misspelt_choice_gets_the_nearest(call):
    with pytest.raises(UsageError) as caught:
        call("--mode", "god")
    assert caught.value.hint == "did you mean `good`?"


def test_help_shows_range_default_and_who_knows_it(call):
    text = " ".join(call.help.split())
    assert "--group-size N|block|channel|tensor Only for one. Weights along" in text
    assert "[at least 1; default: 128]" in text
    assert "--symmetric / --asymmetric" in text
    assert "[default: symmetric]" in text
    assert "--mode fast|good How. [default: fast (one), good (two)]" in text
    assert "--deep Only for one. Deeply." in text
    assert "--no-deep" not in text
    assert "--careful / --no-careful Only for one. Carefully. [default: yes]" in text
    assert "--ignore PATTERN ..." in text


def test_an_option_of_the_other_alternative_is_refused(call):
    refuse_foreign(call("--mode", "good"), "one", ("one", "two"), kind="--way")
    with pytest.raises(UsageError, match="--level does not apply to --way one") as caught:
        refuse_foreign(call("--level", "2"), "one", ("one", "two"), kind="--way")
    assert caught.value.hint == "it belongs to --way two"


def test_pairs():
    read = parse_pairs("group-size=32,symmetric=false,ignore=a,ignore=b,share=1", One, where="--export x")
    assert read == {"group_size": 32, "symmetric": False, "ignore": ["a", "b"], "share": 1.0}


@pytest.mark.parametrize("text", ["", "mode", "mode=", "mode=slow", "unknown=1", "symmetric=perhaps"])
def test_bad_pairs(text):
    with pytest.raises(UsageError) as caught:
        parse_pairs(text, One, where="--export x")
    assert "--export x" in caught.value.where


def test_parameters_in_words():
    known = {item.name: item for item in parameters(One)}
    assert known["group_size"].words == "integer, at least 1 or `block` or `channel` or `tensor`"
    assert known["note"].words == "text"
    assert known["ignore"].default_text == ""
    assert known["symmetric"].default_text == "true"
