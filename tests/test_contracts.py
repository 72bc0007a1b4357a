"""What every pass, exporter and runtime promises, whoever wrote it."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.exports import Exporter
from llmopt.core.params import Params, convert
from llmopt.core.passes import BlockPass, GraphPass, ModelPass, Need, Pass
from llmopt.core.quantized import Grid
from llmopt.core.runtime import Runtime
from llmopt.core.target import Target
from llmopt.exporters import EXPORTERS
from llmopt.passes import PASSES
from llmopt.runtimes import RUNTIMES

ROOT = Path(__file__).parent.parent
STEPS = [*(("pass", name) for name in PASSES), *(("export", name) for name in EXPORTERS)]
REQUIRED = {
    "allocate-bits": {"budget": "4.5bpw"},
    "cast": {"dtype": "bfloat16"},
    "convert-opset": {"opset": 20},
    "merge-adapter": {"adapters": ["./adapter"]},
}
"""Parameters without a default."""

HEAVY = ["torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "numpy", "safetensors"]

CHECK = """
import json, sys
import msgspec
from llmopt.core.facts import ModelFacts
from llmopt.core.errors import LlmoptError
from llmopt.core.params import convert
from llmopt.core.quantized import Grid
from llmopt.core.target import Target
from llmopt.exporters import EXPORTERS
from llmopt.passes import PASSES
kind, name, params, facts = sys.argv[1:]
made = (PASSES if kind == "pass" else EXPORTERS).load(name)
one = made(convert(json.loads(params), made.Params, where="test"))
facts = msgspec.json.decode(facts, type=ModelFacts)
try:
    if kind == "pass":
        one.check(facts, Target.CPU)
        one.grid(), one.ignored()
    else:
        one.check(facts, None)
        one.check(facts, Grid(bits=4, group_size=32, symmetric=True))
except LlmoptError as error:
    assert error.hint, str(error)
print(*sorted({module.partition(".")[0] for module in sys.modules}))
"""


def load(kind, name):
    return (PASSES if kind == "pass" else EXPORTERS).load(name)


@pytest.fixture(scope="module")
def facts(family, tmp_path_factory):
    from helpers import open_model

    return open_model(family("llama"), tmp_path_factory.mktemp("work")).facts


@pytest.mark.parametrize(("kind", "name"), STEPS)
class TestSteps:
    def test_it_is_called_as_it_is_registered(self, kind, name):
        made = load(kind, name)
        assert made.name == name
        assert issubclass(made, Pass if kind == "pass" else Exporter)
        assert inspect.getmodule(made).__name__.rpartition(".")[2] == name.replace("-", "_")

    def test_its_parameters_are_declared_with_a_description_each(self, kind, name):
        params = load(kind, name).Params
        assert issubclass(params, Params)
        assert params.__struct_config__.frozen
        assert params.__struct_config__.forbid_unknown_fields
        schema = msgspec.json.schema(params)
        properties = schema["$defs"][params.__name__].get("properties", {})
        for field in params.__struct_fields__:
            text = described(properties[field])
            assert text, f"{field} has no description"
            assert text.endswith("."), f"{field}: {text}"
            assert text[0].isupper() or text[0] == "`", f"{field}: {text}"

    def test_parameters_have_defaults_that_pass_their_own_check(self, kind, name):
        params = load(kind, name).Params
        made = convert(REQUIRED.get(name, {}), params, where="test")
        assert convert(msgspec.to_builtins(made), params, where="test") == made

    def test_an_unknown_parameter_is_refused(self, kind, name):
        with pytest.raises(UsageError) as caught:
            convert({"nonsense": 1}, load(kind, name).Params, where="here")
        assert caught.value.what == "unknown parameter `nonsense`"
        assert caught.value.where == "here"

    def test_it_is_documented(self, kind, name):
        made = load(kind, name)
        documented = [made, made.Params, sys.modules[made.__module__]]
        documented += [
            value for key, value in vars(made).items() if inspect.isfunction(value) and not key.startswith("_")
        ]
        for one in documented:
            assert one.__doc__, one
            first = one.__doc__.strip().splitlines()[0]
            assert first.endswith((".", ":")), f"{one}: {first}"
            assert len(first) <= 120

    def test_checking_imports_nothing_heavy(self, kind, name, facts):
        import json

        arguments = [kind, name, json.dumps(REQUIRED.get(name, {})), msgspec.json.encode(facts).decode()]
        done = subprocess.run([sys.executable, "-c", CHECK, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not set(done.stdout.split()) & set(HEAVY)

    def test_a_refusal_says_what_where_and_what_to_do(self, kind, name, facts):
        """Of a model without layers, and of one that no format is for."""
        foreign = msgspec.structs.replace(
            facts, linears=(), architecture="NoSuchModel", model_type="none", has_tokenizer=False, config={}
        )
        one = load(kind, name)(convert(REQUIRED.get(name, {}), load(kind, name).Params, where="test"))
        for grid in (
            None,
            Grid(bits=3, group_size=7, symmetric=False),
            Grid(bits=5, group_size="tensor", symmetric=True),
        ):
            for outline in (facts, foreign):
                try:
                    one.check(outline, Target.CPU if kind == "pass" else grid)
                except LlmoptError as error:
                    assert isinstance(error, UsageError), error  # noqa: PT017
                    assert error.where or error.hint, str(error)  # noqa: PT017


def described(schema):
    """Return the description in a schema, whether it stands on the type or inside a union."""
    if "description" in schema:
        return schema["description"]
    return next((text for part in schema.get("anyOf", []) if (text := described(part))), None)


@pytest.mark.parametrize("name", PASSES)
class TestPasses:
    def test_it_works_on_blocks_or_models_or_graphs(self, name):
        made = PASSES.load(name)
        (kind,) = [kind for kind in (BlockPass, ModelPass, GraphPass) if issubclass(made, kind)]
        method = "run_block" if kind is BlockPass else "run"
        assert getattr(made, method) is not getattr(kind, method)

    def test_it_knows_what_it_needs_and_what_may_not_come_before(self, name):
        made = PASSES.load(name)
        assert made.accepts in {"torch", "onnx"}
        assert all(isinstance(need, Need) for need in made.needs)
        assert made.not_after <= set(PASSES)


@pytest.mark.parametrize("name", EXPORTERS)
class TestExporters:
    def test_a_runtime_opens_what_it_writes(self, name):
        assert EXPORTERS.load(name).runtime in RUNTIMES

    def test_it_writes_and_reads_back(self, name):
        made = EXPORTERS.load(name)
        assert made.export is not Exporter.export
        assert made.weights_equal is not Exporter.weights_equal


@pytest.mark.parametrize("name", RUNTIMES)
class TestRuntimes:
    def test_it_is_called_as_it_is_registered(self, name):
        made = RUNTIMES.load(name)
        assert made.name == name
        assert issubclass(made, Runtime)
        assert made.__doc__

    def test_it_tells_its_version_without_being_imported(self, name):
        program = f"""
import sys
from llmopt.runtimes import RUNTIMES
print(RUNTIMES.load({name!r})().version())
print(*sorted({{module.partition(".")[0] for module in sys.modules}}))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        version, loaded = done.stdout.splitlines()
        assert any(part[0].isdigit() for part in version.split())
        assert not set(loaded.split()) & set(HEAVY)

    def test_an_empty_folder_is_not_its_own(self, name, tmp_path):
        assert RUNTIMES.load(name)().opens(tmp_path) is False


LAZY = {"onnx_attention.py"}  # registers operators with torch; imported while tracing


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for folder in ("passes", "exporters", "runtimes", "core")
        for path in (ROOT / folder).glob("*.py")
        if path.name not in LAZY
    ),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_a_module_imports_nothing_heavy_at_its_top(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    assert not names & set(HEAVY)


def test_the_contracts_themselves_have_type_hints():
    for method in (Pass.check, Pass.grid, Exporter.check, Runtime.version, Runtime.opens):
        assert "return" in get_type_hints(method)
