"""Runs with a store: what is taken from it, what is not, and that the bytes are those of a run without."""

import hashlib
import json

import pytest
from helpers import recipe
from llmopt.core.errors import LlmoptError
from llmopt.core.manifest import RUN
from llmopt.core.plan import Limits
from llmopt.core.progress import Silent
from llmopt.core.recipe import Step
from llmopt.passes.gptq import Gptq
from llmopt.passes.training.loop import Loop
from llmopt.pipeline.cache import keys
from llmopt.pipeline.cache.store import CacheSettings, Store
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan
from llmopt.pipeline.sweep import _Sweep
from msgspec.structs import replace as with_fields

GPTQ = ("gptq", {"group_size": 32})
CORRECTED = ("gptq", {"group_size": 32, "correction": 0.5})
FIVE = (("fold-norms", {}), ("prune-depth", {"layers": [0]}), ("prune-vocab", {}), ("rotate", {}), GPTQ)


class Told(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)

    def taken(self):
        return [note for note in self.notes if "from the cache" in note or "going on after" in note]


@pytest.fixture
def run(cache, tmp_path):
    """Return a function that runs a recipe, and gives the files but the record of times, that record, and the notes."""
    count = iter(range(100))

    def build(made, *, store=True, limits=None, folder=None):
        output = tmp_path / (folder or f"out-{next(count)}")
        plan, told = make_plan(made), Told()
        if limits is not None:
            plan = with_fields(plan, limits=limits)
        run_plan(plan, output, force=False, reporter=told, cache=CacheSettings(cache) if store else None)
        assert not list(tmp_path.glob(".out*"))
        files = {
            path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(output.rglob("*"))
            if path.is_file() and path.name != RUN
        }
        return files, json.loads((output / RUN).read_text()), told

    return build


def steps(record):
    return [(step["name"], step["cached"]) for step in record["steps"] if " onnx" not in step["name"]][: len(FIVE)]


def edited(made, index, **params):
    """Return a recipe with other parameters of one pass."""
    passes = list(made.passes)
    passes[index] = Step(passes[index].name, params)
    return with_fields(made, passes=tuple(passes))


def test_five_passes_edited_at_the_fourth_take_three_from_the_cache(run, family, text):
    made = recipe(family("llama", num_hidden_layers=3), *FIVE, data=text)
    # Neighbouring passes on blocks share a sweep, so no two of these do.
    first, record, told = run(made)
    assert told.taken() == []
    assert {cached for _, cached in steps(record)} == {False}
    again, record, told = run(made)
    assert again == first
    assert len(told.taken()) == 5
    other = edited(made, 3, values=False)
    got, record, told = run(other)
    assert [note.partition(":")[0] for note in told.taken()] == ["fold-norms", "prune-depth", "prune-vocab"]
    assert all(note.endswith(" s saved") for note in told.taken())
    assert [cached for _, cached in steps(record)] == [True, True, True, False, False]
    for step in record["steps"][:3]:
        assert step["seconds_saved"] > step["seconds"]
    assert got == run(other, store=False)[0]
    assert got != first


def test_what_a_pass_does_not_read_leaves_its_key(run, family, text, tmp_path):
    folder = family("llama")
    made = recipe(folder, ("rotate", {}), GPTQ, data=text)
    run(made)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    assert [note.partition(":")[0] for note in run(recipe(folder, *FIVE[3:], data=other))[2].taken()] == ["rotate"]
    assert run(with_fields(made, seed=1))[2].taken() == []
    assert run(with_fields(made, threads=3))[2].taken() == []
    assert run(made, limits=Limits(batch_tokens=24))[2].taken() == []


def test_other_weights_settings_versions_or_code_make_other_keys(run, tmp_path, monkeypatch):
    from families import save_family

    folder = save_family("llama", tmp_path / "model")
    made = recipe(folder, ("rtn", {"group_size": 32}))
    run(made)
    assert len(run(made)[2].taken()) == 1
    (folder / "generation_config.json").write_text("{}")
    assert run(made)[2].taken() == []
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert run(made)[2].taken() == []
    assert len(run(made)[2].taken()) == 1
    known = keys.versions()
    monkeypatch.setattr(keys, "versions", lambda: known | {"torch": "0"})
    assert run(made)[2].taken() == []


def interrupted(monkeypatch, blocks):
    """Have the next sweep end as by a signal when so many blocks are finished."""
    work, count = _Sweep._block, iter(range(100))

    def block(self, site, following):
        if next(count) == blocks:
            monkeypatch.setattr(_Sweep, "_block", work)
            raise KeyboardInterrupt
        work(self, site, following)

    monkeypatch.setattr(_Sweep, "_block", block)


SWEEPS = {
    "llama": ("llama", [("smooth", {}), GPTQ]),
    "encoder-decoder": ("t5", [GPTQ]),
    "experts": ("mixtral", [GPTQ]),
    "activations": ("llama", [GPTQ, ("quantize-activations", {"scale": "tensor"}), ("quantize-kv", {})]),
    "zeros": ("llama", [("sparsify", {"sparsity": "50%"}), GPTQ]),
    "adapter": ("llama", [GPTQ, ("extract-adapter", {"rank": 3})]),
    "correction": ("t5", [CORRECTED]),
    "correction, then activations": ("llama", [CORRECTED, ("quantize-activations", {"scale": "tensor"})]),
    "correction, then an adapter": ("llama", [CORRECTED, ("extract-adapter", {"rank": 3})]),
    "rtn": ("bert", [("rtn", {"group_size": 32})]),
    "autoround": ("llama", [("autoround", {"group_size": 32, "iterations": 3})]),
}


@pytest.mark.parametrize(
    ("name", "on_disk"), [*((name, False) for name in SWEEPS), ("llama", True), ("encoder-decoder", True)]
)
def test_a_sweep_goes_on_after_its_finished_blocks(name, on_disk, run, cache, family, text, monkeypatch):
    model, passes = SWEEPS[name]
    limits = Limits(states_bytes=0 if on_disk else None, batch_tokens=48)
    made = recipe(family(model, dtype="float32" if model == "mixtral" else "bfloat16"), *passes, data=text)
    whole = run(made, store=False, limits=limits)[0]
    total = 4 if model == "t5" else 2
    for blocks in range(1, total):
        Store(cache).prune(-1)
        for _ in range(blocks):  # each finishes one block, the first of them none before
            interrupted(monkeypatch, 1)
            with pytest.raises(KeyboardInterrupt):
                run(made, limits=limits)
        got, record, told = run(made, limits=limits)
        assert record["steps"][0]["blocks_resumed"] == blocks
        assert not record["steps"][0]["cached"]
        assert len(told.taken()) == 1
        assert got == whole
    assert run(made, limits=limits)[1]["steps"][0]["cached"]


@pytest.mark.parametrize(
    "survey",
    [
        ("prune-depth", {"drop": "1"}),
        ("prune-width", {"mlp": "33%", "multiple": 32}),
        ("allocate-bits", {"budget": "4bpw"}),
    ],
    ids=lambda survey: survey[0],
)
def test_a_survey_goes_on_with_what_it_found(survey, run, family, text, monkeypatch):
    made = recipe(family("llama", num_hidden_layers=3), survey, GPTQ, data=text)
    whole = run(made, store=False)[0]
    for _ in range(2):
        interrupted(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(made)
    got, record, _ = run(made)
    assert record["steps"][0]["blocks_resumed"] == 2
    assert got == whole


def test_a_survey_killed_as_it_concludes_concludes_again(run, family, text, monkeypatch):
    from llmopt.models.depth import same

    made = recipe(family("llama", num_hidden_layers=3), ("prune-depth", {"drop": "1"}), data=text)
    whole = run(made, store=False)[0]

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmopt.models.depth.same", kill)  # the proof comes when the new checkpoint is written
    with pytest.raises(KeyboardInterrupt):
        run(made)
    monkeypatch.setattr("llmopt.models.depth.same", same)
    got, record, _ = run(made)
    assert record["steps"][0]["blocks_resumed"] == 3
    assert got == whole


def test_learning_goes_on_after_its_last_checkpoint(run, family, text, monkeypatch):
    params = {"data": str(text), "steps": 6, "batch_size": 2, "length": 16, "held_out": 4, "checkpoint_every": 2}
    made = recipe(family("llama", num_hidden_layers=1), ("distill", params))
    whole = run(made, store=False)[0]
    step = Loop._step

    def until(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Loop, "_step", until)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    monkeypatch.setattr(Loop, "_step", step)
    got, _, told = run(made)
    assert "distill: going on after step 4 of 6" in told.notes
    assert got == whole
    assert run(made)[2].taken()[0].startswith("distill: from the cache")


def test_a_failure_is_not_kept(run, family, text, monkeypatch):
    made = recipe(family("llama"), GPTQ, data=text)
    block, count = Gptq.run_block, iter(range(100))

    def fails(self, *arguments):
        if next(count) == 1:
            raise MemoryError
        return block(self, *arguments)

    monkeypatch.setattr(Gptq, "run_block", fails)
    with pytest.raises(MemoryError):
        run(made)
    monkeypatch.undo()
    got, record, _ = run(made, store=True)
    assert record["steps"][0]["blocks_resumed"] <= 1
    assert not record["steps"][0]["cached"]
    assert got == run(made, store=False)[0]


@pytest.mark.parametrize("kind", ["*.safetensors", "index"])
def test_a_damaged_result_is_made_anew(kind, run, cache, family):
    made = recipe(family("llama"), ("rtn", {"group_size": 32}))
    whole = run(made)[0]
    (path, *_) = sorted((cache / "entries").rglob(kind))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    got, record, told = run(made)
    assert any("made anew" in note for note in told.notes)
    assert not record["steps"][0]["cached"]
    assert got == whole
    assert run(made)[1]["steps"][0]["cached"]


def test_damaged_states_are_not_gone_on_from(run, cache, family, text, monkeypatch):
    made = recipe(family("llama", num_hidden_layers=3), GPTQ, data=text)
    whole = run(made, store=False)[0]
    interrupted(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    for path in (cache / "entries").rglob("states-*"):
        path.write_bytes(b"nonsense")
    got, record, _ = run(made)
    assert record["steps"][0]["blocks_resumed"] == 0
    assert got == whole


def test_a_result_larger_than_the_limit_is_not_kept(family, cache, tmp_path):
    told = Told()
    plan = make_plan(recipe(family("llama"), ("rtn", {"group_size": 32})))
    run_plan(plan, tmp_path / "out", force=False, reporter=told, cache=CacheSettings(cache, 1000))
    assert any("not kept in the cache" in note for note in told.notes)
    assert Store(cache).size() == 0


def test_a_folder_that_cannot_be_written_to_is_said_and_done_without(family, tmp_path):
    (tmp_path / "file").write_text("")
    told = Told()
    plan = make_plan(recipe(family("llama"), ("rtn", {"group_size": 32})))
    run_plan(plan, tmp_path / "out", force=False, reporter=told, cache=CacheSettings(tmp_path / "file" / "cache"))
    assert "going on without the cache" in told.warnings[0]


def test_what_was_not_used_for_the_longest_goes_when_all_takes_too_much(family, cache, tmp_path):
    def build(bits, limit=None):
        made = recipe(family("llama"), ("rtn", {"group_size": 32, "bits": bits}))
        settings = CacheSettings(cache, limit)
        run_plan(make_plan(made), tmp_path / f"{bits}-{limit}", force=False, reporter=Told(), cache=settings)

    build(4)
    one = Store(cache).size()
    build(8)
    build(3, limit=2 * one + one // 2)
    assert len(Store(cache).shown()) == 2
    with pytest.raises(LlmoptError, match="exists already"):
        build(3, limit=2 * one + one // 2)


@pytest.mark.parametrize("found", [[], [("extract-adapter", {"rank": 2, "weighting": "none"})]], ids=["learnt", "both"])
def test_an_adapter_beside_the_weights_is_kept_too(found, run, family, text):
    learn = {"data": str(text), "steps": 4, "batch_size": 4, "length": 16, "learning_rate": 1e-2, "lora_rank": 2}
    made = recipe(family("llama"), ("rtn", {"bits": 2, "group_size": 32}), *found, ("distill", learn))
    cold, _, _ = run(made)
    warm, record, told = run(made)
    assert [step["cached"] for step in record["steps"][:2]] == [True, True], told.notes
    assert warm == cold == run(made, store=False)[0]
    assert "adapter/adapter_model.safetensors" in warm
