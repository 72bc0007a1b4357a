"""Errors, parameters, patterns and the registry."""

import pytest
from llmopt.core.errors import ExitCode, LlmoptError, UnmetError, UsageError, nearest
from llmopt.core.params import Params, convert
from llmopt.core.passes import PassResult, Skip
from llmopt.core.patterns import check_patterns, matches
from llmopt.core.registry import Registry
from llmopt.passes.rtn import RtnParams

NAMES = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in ("self_attn.q_proj", "mlp.down_proj")]


class TestErrors:
    def test_an_error_says_what_where_and_what_to_do(self):
        error = LlmoptError("it broke", where="line 1\nline 2", hint="mend it")
        assert str(error) == "error: it broke\n  line 1\n  line 2\nhint: mend it"
        assert error.to_dict() == {"error": "it broke", "where": "line 1\nline 2", "hint": "mend it", "exit_code": 1}

    def test_one_line_when_there_is_no_more(self):
        assert str(LlmoptError("it broke")) == "error: it broke"

    @pytest.mark.parametrize(("kind", "code"), [(LlmoptError, 1), (UsageError, 2), (UnmetError, 3)])
    def test_exit_codes(self, kind, code):
        assert kind("x").exit_code == code
        assert isinstance(kind("x").exit_code, ExitCode)

    def test_the_nearest_name(self):
        assert nearest("gtpq", ["gptq", "rtn"]) == "did you mean `gptq`?"
        assert nearest("xyz", ["gptq", "rtn"]) == "known: gptq, rtn"


class TestParameters:
    @pytest.mark.parametrize(
        ("raw", "where"),
        [
            ({"bits": 7}, "at bits: Invalid enum value 7"),
            ({"bits": "4"}, "at bits"),
            ({"group_size": 0}, "at group_size"),
            ({"group_size": -128}, "at group_size"),
            ({"group_size": "row"}, "at group_size"),
            ({"group_size": 12.5}, "at group_size"),
            ({"symmetric": 1}, "at symmetric"),
            ({"ignore": "lm_head"}, "at ignore"),
            ({"clip": "max"}, "at clip"),
        ],
    )
    def test_a_bad_value_is_named(self, raw, where):
        with pytest.raises(UsageError) as caught:
            convert(raw, RtnParams, where="pass 1 of 1, `rtn`")
        assert where in (caught.value.where or "")
        assert "pass 1 of 1, `rtn`" in (caught.value.where or "")

    def test_a_misspelt_name_is_named_with_the_nearest(self):
        with pytest.raises(UsageError) as caught:
            convert({"groupsize": 32}, RtnParams, where="here")
        assert caught.value.what == "unknown parameter `groupsize`"
        assert caught.value.hint == "did you mean `group_size`?"

    def test_a_struct_without_fields_takes_none(self):
        class Nothing(Params, frozen=True, kw_only=True, forbid_unknown_fields=True):
            pass

        with pytest.raises(UsageError):
            convert({"x": 1}, Nothing, where="here")


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "count"),
        [
            ("*.down_proj", 12),
            ("model.layers.1", 2),
            ("model.layers.1.mlp.down_proj", 1),
            ("model.layers.[01].*", 4),
            ("re:.*layers\\.1\\..*", 2),
            ("re:.*q_proj", 12),
            ("re:q_proj", 0),
            ("down_proj", 0),
            ("*", 24),
        ],
    )
    def test_what_a_pattern_matches(self, pattern, count):
        assert sum(matches(name, pattern) for name in NAMES) == count

    def test_a_pattern_that_matches_nothing_is_refused(self):
        with pytest.raises(UsageError) as caught:
            check_patterns(["*.down_prj"], NAMES, where="here")
        assert caught.value.what == "pattern `*.down_prj` matches no layer"
        assert caught.value.hint == "did you mean `down_proj`?"

    def test_a_broken_expression_is_refused(self):
        with pytest.raises(UsageError, match=r"is not a regular expression"):
            check_patterns(["re:("], NAMES, where="here")


def test_an_unknown_name_in_a_registry():
    registry = Registry("pass", "llmopt.passes", {"rtn": "rtn:Rtn"})
    assert list(registry) == ["rtn"]
    assert "rtn" in registry
    assert registry.load("rtn").__name__ == "Rtn"
    with pytest.raises(UsageError) as caught:
        registry.load("rnt", where="here")
    assert (caught.value.what, caught.value.where) == ("unknown pass `rnt`", "here")
    assert caught.value.hint == "did you mean `rtn`?"


def test_results_of_blocks_add_up():
    result = PassResult(changed=["a"], metrics={"layers_count": 1, "damping_max_ratio": 0.1})
    result.absorb(
        PassResult(
            changed=["b"], skipped=[Skip("c", "why")], metrics={"layers_count": 2, "damping_max_ratio": 0.01, "x_ms": 3}
        )
    )
    assert result.changed == ["a", "b"]
    assert result.skipped == [("c", "why")]
    assert result.metrics == {"layers_count": 3, "damping_max_ratio": 0.1, "x_ms": 3}
