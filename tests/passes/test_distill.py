"""Distillation: what is learnt, kept, resumed and refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from families import FAMILIES, LINES, make_tokenizer, save_family, save_sentence_folder
from helpers import build, open_model, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.params import convert
from llmopt.passes.distill import Distill, DistillParams
from llmopt.pipeline.plan import make_plan
from safetensors.torch import load_file, save_file

FAST = {"steps": 12, "batch_size": 4, "length": 16, "learning_rate": 3e-3, "held_out": 8}


@pytest.fixture(scope="module")
def student(family):
    return family("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Return the folders of a sentence encoder of one layer, one of a smaller width, and their teacher."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, changes in {"small": {"num_hidden_layers": 1}, "narrow": {"hidden_size": 32}, "teacher": {}}.items():
        save_sentence_folder(folder / name)
        save_family("bert", folder / f"{name}-weights", **changes)
        config = json.loads((folder / f"{name}-weights" / "config.json").read_text())
        weights = load_file(folder / f"{name}-weights" / "model.safetensors")
        kept = {key.removeprefix("bert."): value for key, value in weights.items() if key.startswith("bert.")}
        save_file(
            {key: value for key, value in kept.items() if "pooler" not in key}, folder / name / "model.safetensors"
        )
        (folder / name / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    return folder


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{number} {LINES[number % 3]}\n" for number in range(90)))
    return path


def taught(folder, output, teacher, text, **params):
    """Return the record of the pass and the artifact's tensors."""
    named = {} if teacher is None else {"teacher": str(teacher)}
    manifest = build(recipe(folder, ("distill", {"data": str(text), **named, **FAST, **params})), output)
    return manifest.passes[0], load_file(output / "model.safetensors")


def held_out(record, name="kl", unit="nats"):
    return record.metrics[f"held_out_{name}_before_{unit}"], record.metrics[f"held_out_{name}_after_{unit}"]


class TestLearning:
    @pytest.mark.parametrize("loss", ["kl", "reverse_kl", "js", "lm", "hidden"])
    def test_every_loss_falls_on_held_out_rows(self, student, family, text, tmp_path, loss):
        teacher = None if loss == "lm" else family("llama")
        record, tensors = taught(student, tmp_path / "out", teacher, text, **{loss: 1})
        before, after = held_out(record, loss, "ratio" if loss == "hidden" else "nats")
        assert after < 0.9 * before
        source = load_file(student / "model.safetensors")
        assert record.changed == [name for name in tensors if not torch.equal(tensors[name], source[name])]
        assert len(record.changed) > 5
        assert record.metrics["learnt_rows_count"] == 12 * 4

    def test_the_curve_is_recorded(self, student, family, text, tmp_path):
        record, _ = taught(student, tmp_path / "out", family("llama"), text, kl=1, hidden=0.5, evaluate_every=5)
        steps = [point["step"] for point in record.curve if "learning_rate" in point]
        assert steps == list(range(1, 13))
        assert [point["step"] for point in record.curve if "held_out_kl" in point] == [0, 5, 10, 12]
        assert {"kl", "hidden"} < set(record.curve[1])
        assert {"held_out_kl", "held_out_hidden", "held_out_lm"} < set(record.curve[0])
        document = json.loads((tmp_path / "out" / "llmopt.json").read_text())
        assert document["passes"][0]["curve"] == record.curve

    def test_a_run_repeats(self, student, family, text, tmp_path):
        _, one = taught(student, tmp_path / "one", family("llama"), text)
        _, other = taught(student, tmp_path / "other", family("llama"), text)
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_the_teacher_is_the_model_before_the_passes(self, student, text, tmp_path):
        """A model learns nothing from itself; rounded to bfloat16 it differs from what it was."""
        record, _ = taught(student, tmp_path / "out", None, text)
        assert held_out(record) == pytest.approx((0.0, 0.0), abs=1e-6)
        made = recipe(student, ("cast", {"dtype": "bfloat16"}), ("distill", {"data": str(text), **FAST}))
        assert build(made, tmp_path / "cast").passes[1].metrics["held_out_kl_before_nats"] > 1e-6

    def test_the_data_of_the_calibration_is_taken_where_none_is_named(self, student, family, text, tmp_path):
        steps = ("distill", {"teacher": str(family("llama")), **FAST})
        record = build(recipe(student, steps, data=text), tmp_path / "out").passes[0]
        assert held_out(record)[1] < held_out(record)[0]

    def test_weights_keep_the_dtype_in_which_they_are_stored(self, family, text, tmp_path):
        folder = family("llama", dtype="bfloat16", num_hidden_layers=1)
        record, tensors = taught(folder, tmp_path / "out", family("llama"), text, precision="bfloat16")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert held_out(record)[1] < held_out(record)[0]

    def test_gradient_checkpointing_and_accumulation_change_nothing(self, student, family, text, tmp_path):
        _, plain = taught(student, tmp_path / "plain", family("llama"), text)
        _, again = taught(student, tmp_path / "again", family("llama"), text, gradient_checkpointing=True)
        _, parts = taught(student, tmp_path / "parts", family("llama"), text, batch_size=2, accumulation=2)
        for name, expected in plain.items():
            assert torch.allclose(again[name], expected, atol=1e-5), name
            assert torch.allclose(parts[name], expected, atol=1e-4), name

    def test_the_untrained_student_stays_where_learning_does_harm(self, student, family, text, tmp_path):
        record, tensors = taught(student, tmp_path / "out", family("llama"), text, learning_rate=3.0, patience=1)
        source = load_file(student / "model.safetensors")
        assert all(torch.equal(tensors[name], source[name]) for name in source)
        assert record.changed == []
        assert record.metrics["best_step_count"] == 0
        assert record.metrics["steps_count"] == 1
        assert any("stays as it was" in note for note in record.notes)
        assert any("stopped after 1 of 12" in note for note in record.notes)

    @pytest.mark.parametrize("name", ["qwen2", "gpt2", "phi3", "gemma3", "opt"])
    def test_families_with_tied_fused_and_transposed_weights(self, family, text, tmp_path, name):
        fewer = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
        fewer |= {"layer_types": ["full_attention"]} if name == "gemma3" else {}
        record, tensors = taught(family(name, **fewer), tmp_path / "out", family(name), text, steps=6)
        assert held_out(record)[1] < held_out(record)[0]
        source = load_file(family(name, **fewer) / "model.safetensors")
        assert {key: one.shape for key, one in tensors.items()} == {key: one.shape for key, one in source.items()}

    def test_what_learnt_can_be_quantized(self, student, family, text, tmp_path):
        learn = ("distill", {"teacher": str(family("llama")), **FAST})
        manifest = build(recipe(student, learn, ("gptq", {"bits": 4, "group_size": 32}), data=text), tmp_path / "out")
        assert manifest.exports[0].verification.weights_equal
        assert [one.name for one in manifest.passes] == ["distill", "gptq"]
        assert len(manifest.passes[1].changed) == 7

    def test_a_classifier_learns_from_its_teachers_answers(self, family, lines, tmp_path):
        one = family("bert", num_hidden_layers=1)
        record, _ = taught(one, tmp_path / "out", family("bert"), lines)
        assert held_out(record)[1] < held_out(record)[0]


class TestEncoders:
    @pytest.mark.parametrize(
        ("name", "losses"),
        [
            ("small", {}),
            ("small", {"relation": 1, "relation_heads": 4}),
            ("narrow", {"hidden": 1}),
            ("narrow", {"relation": 1, "relation_heads": 4}),
        ],
    )
    def test_losses_fall(self, encoders, lines, tmp_path, name, losses):
        record, tensors = taught(encoders / name, tmp_path / "out", encoders / "teacher", lines, **losses)
        measured = [key for key in record.metrics if "_before_" in key]
        assert measured
        for key in measured:
            assert record.metrics[key.replace("before", "after")] < record.metrics[key], key
        assert set(tensors) == set(load_file(encoders / name / "model.safetensors"))  # no projection is left

    def test_embeddings_of_another_width_cannot_be_compared(self, encoders, lines, tmp_path):
        with pytest.raises(UsageError, match="embeddings of 32"):
            taught(encoders / "narrow", tmp_path / "out", encoders / "teacher", lines, cosine=1)


class TestAdapters:
    def test_only_the_named_layers_change(self, student, family, text, tmp_path):
        record, _ = taught(
            student, tmp_path / "out", family("llama"), text, lora_rank=4, lora_targets=["q_proj", "down_proj"]
        )
        assert record.changed == ["model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
        assert held_out(record)[1] < held_out(record)[0]

    def test_the_difference_has_the_rank(self, student, family, text, tmp_path):
        _, tensors = taught(student, tmp_path / "out", family("llama"), text, lora_rank=2)
        source, name = load_file(student / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
        values = torch.linalg.svdvals(tensors[name] - source[name])
        assert float(values[1]) > 1e-5
        assert float(values[2:].max()) < 1e-3 * float(values[1])

    def test_a_layer_that_is_not_there_is_refused(self, student, family, text, tmp_path):
        with pytest.raises(UsageError, match="no layer takes an adapter"):
            taught(student, tmp_path / "out", family("llama"), text, lora_rank=2, lora_targets=["nonsense"])


class TestCachedAnswers:
    def test_all_tokens_are_as_good_as_the_teacher(self, student, family, text, tmp_path):
        _, plain = taught(student, tmp_path / "plain", family("llama"), text)
        cache = {"cache": str(tmp_path / "cache"), "top_k": 271}
        _, cached = taught(student, tmp_path / "cached", family("llama"), text, **cache)
        name = "model.layers.0.mlp.up_proj.weight"
        moved = (plain[name] - load_file(student / "model.safetensors")[name]).abs().mean()
        assert float((plain[name] - cached[name]).abs().mean()) < 0.05 * float(moved)

    def test_a_second_run_does_not_ask_the_teacher(self, student, family, text, tmp_path, monkeypatch):
        cache = {"cache": str(tmp_path / "cache"), "top_k": 8}
        _, first = taught(student, tmp_path / "first", family("llama"), text, **cache)
        monkeypatch.setattr("llmopt.passes.training.teacher.Teacher._compute", None)
        _, second = taught(student, tmp_path / "second", family("llama"), text, **cache)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_another_teacher_is_refused(self, student, family, text, tmp_path):
        cache = {"cache": str(tmp_path / "cache"), "top_k": 8}
        taught(student, tmp_path / "first", family("llama"), text, **cache)
        with pytest.raises(UsageError, match="different: teacher_weights"):
            taught(student, tmp_path / "second", family("llama", num_hidden_layers=3), text, **cache)


class TestCheckpoints:
    def test_a_run_goes_on_where_it_was(self, student, family, text, tmp_path, monkeypatch):
        from llmopt.passes.training.loop import Loop

        _, whole = taught(student, tmp_path / "whole", family("llama"), text)
        kept = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every": 3}
        step, done = Loop._step, []

        def failing(self, number):
            if number == 8 and 8 not in done:
                done.append(8)
                raise RuntimeError("power cut")
            done.append(number)
            return step(self, number)

        monkeypatch.setattr(Loop, "_step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            taught(student, tmp_path / "out", family("llama"), text, **kept)
        record, resumed = taught(student, tmp_path / "out", family("llama"), text, **kept)
        assert done == [*range(9), *range(6, 12)]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert [point["step"] for point in record.curve if "learning_rate" in point] == list(range(1, 13))
        assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["best.safetensors", "step-00000012"]

    def test_a_killed_process_goes_on(self, student, family, text, tmp_path):
        """By a real signal that nothing can catch, at whatever moment it comes."""
        _, whole = taught(student, tmp_path / "whole", family("llama"), text, steps=40)
        made = recipe(student, ("distill", self.params(family, text, tmp_path)))
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(made.to_dict()))
        command = [sys.executable, "-m", "llmopt", "run", str(file), "-o", str(tmp_path / "out")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        kept = tmp_path / "kept"
        while process.poll() is None and not list(kept.glob("step-000000[1-4]?")):
            time.sleep(0.01)  # the processor is the run's
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "out").exists()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "going on after step" in done.stderr
        resumed = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def params(self, family, text, tmp_path):
        kept = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every": 5}
        return {"data": str(text), "teacher": str(family("llama")), **FAST, **kept, "steps": 40}

    def test_another_run_is_refused(self, student, family, text, tmp_path):
        kept = {"checkpoint": str(tmp_path / "kept")}
        taught(student, tmp_path / "one", family("llama"), text, **kept)
        with pytest.raises(UsageError, match="belongs to another run") as caught:
            taught(student, tmp_path / "other", family("llama"), text, **kept, temperature=2.0)
        assert caught.value.where == "different: temperature"

    def test_a_damaged_one_is_named(self, student, family, text, tmp_path):
        kept = {"checkpoint": str(tmp_path / "kept")}
        taught(student, tmp_path / "one", family("llama"), text, **kept)
        (tmp_path / "kept" / "step-00000012" / "state.json").write_text("{")
        with pytest.raises(LlmoptError, match="is damaged"):
            taught(student, tmp_path / "other", family("llama"), text, **kept)

    def test_a_folder_of_other_things_is_refused(self, student, family, text, tmp_path):
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "dear.txt").write_text("dear")
        with pytest.raises(UsageError, match="no folder of checkpoints"):
            taught(student, tmp_path / "out", family("llama"), text, checkpoint=str(tmp_path / "letters"))

    def test_nan_ends_at_its_step_and_keeps_the_last(self, student, family, text, tmp_path, monkeypatch):
        from llmopt.passes.training.pupil import Pupil

        forward, calls = Pupil.forward, []

        def poisoned(self, *arguments, **named):
            calls.append(torch.is_grad_enabled())
            made = forward(self, *arguments, **named)
            return made * float("nan") if calls.count(True) == 8 else made

        monkeypatch.setattr(Pupil, "forward", poisoned)
        kept = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every": 3}
        with pytest.raises(LlmoptError, match="NaN or infinite at step 8") as caught:
            taught(student, tmp_path / "out", family("llama"), text, **kept)
        assert caught.value.exit_code == 1
        assert "last checkpoint is kept" in caught.value.hint
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "kept" / "step-00000006").is_dir()
        monkeypatch.undo()
        record, _ = taught(student, tmp_path / "out", family("llama"), text, **kept)
        assert record.metrics["steps_count"] == 12


class TestVocabularies:
    @pytest.fixture
    def shuffled(self, family, tmp_path):
        """Return the teacher with its tokens in another order, and one that the student lacks in place of another."""
        folder = tmp_path / "shuffled"
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(folder)
        document = json.loads((folder / "tokenizer.json").read_text())
        words, special = document["model"]["vocab"], 3
        count = len(words)
        move = lambda index: index if index < special else special + (index - special + 7) % (count - special)  # noqa: E731
        document["model"]["vocab"] = {token: move(index) for token, index in words.items()}
        (folder / "tokenizer.json").write_text(json.dumps(document))
        source = family("llama")
        tensors = load_file(source / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            moved = tensors[name].clone()
            moved[[move(index) for index in range(count)]] = tensors[name][:count]
            tensors[name] = moved
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text((source / "config.json").read_text())
        return folder

    def test_others_are_refused(self, student, shuffled, text, tmp_path):
        with pytest.raises(UsageError, match="different vocabularies") as caught:
            taught(student, tmp_path / "out", shuffled, text)
        assert "--align-vocab" in caught.value.hint

    def test_tokens_are_matched_by_their_strings(self, student, shuffled, family, text, tmp_path):
        _, plain = taught(student, tmp_path / "plain", family("llama"), text)
        record, aligned = taught(student, tmp_path / "aligned", shuffled, text, align_vocab=True)
        for name, expected in plain.items():
            assert torch.allclose(aligned[name], expected, atol=1e-4), name
        assert any("matched by their strings" in note for note in record.notes)


class TestRefusals:
    def refused(self, folder, text, **params):
        with pytest.raises(UsageError) as caught:
            make_plan(recipe(folder, ("distill", {"data": str(text), **params})))
        assert caught.value.hint
        return str(caught.value)

    def test_models_that_cannot_be_taught(self, family, text):
        assert "encoder-decoders" in self.refused(family("t5"), text)
        assert "mixtures of experts" in self.refused(family("mixtral"), text)
        assert "no tokenizer" in self.refused(family("vit"), text)

    def test_losses_that_do_not_suit(self, family, text, encoders):
        assert "does not predict the next token" in self.refused(family("bert"), text, lm=1)
        assert "it has no head" in self.refused(encoders / "small", text, kl=1)
        assert "for encoders" in self.refused(family("llama"), text, relation=1)
        assert "no embeddings" in self.refused(family("llama"), text, cosine=1)
        assert "weight 0" in self.refused(family("llama"), text, kl=0)
        assert "more than there are" in self.refused(family("llama"), text, cache="cache", top_k=273)
        assert "only answers are cached" in self.refused(family("llama"), text, hidden=1, cache="cache")

    @pytest.mark.parametrize(
        ("params", "needs"),
        [
            ({"lora_alpha": 8}, "lora_rank"),
            ({"lora_targets": ["q_proj"]}, "lora_rank"),
            ({"top_k": 8}, "cache"),
            ({"relation_heads": 2}, "relation"),
            ({"hidden": 1, "temperature": 2.0}, "kl"),
            ({"lm": 1, "align_vocab": True}, "teacher"),
            ({"lm": 1, "teacher": "elsewhere"}, "teacher"),
        ],
    )
    def test_parameters_that_do_nothing(self, family, text, params, needs):
        assert f"`{next(reversed(params))}` does nothing without" in (
            said := self.refused(family("llama"), text, **params)
        )
        assert needs in said.splitlines()[0]

    def test_teachers_of_another_kind(self, family, text, encoders):
        assert "cannot teach" in self.refused(family("llama"), text, teacher=str(family("bert")))
        assert "no logits" in self.refused(family("bert"), text, teacher=str(encoders / "teacher"))
        assert "no model at" in self.refused(family("llama"), text, teacher="./no-such-teacher")
        assert "do not divide" in self.refused(
            encoders / "small", text, teacher=str(encoders / "teacher"), relation=1, relation_heads=7
        )

    def test_text_that_is_not_there(self, family, tmp_path):
        assert "no file" in self.refused(family("llama"), tmp_path / "missing.txt")
        with pytest.raises(UsageError, match="needs text"):
            make_plan(recipe(family("llama"), ("distill", {})))

    def test_rows_longer_than_the_context(self, family, text):
        assert "longer than the context" in self.refused(family("llama"), text, length=129)

    def test_rounded_activations_are_not_learnt_with(self, family, text):
        rounding = ("rtn", {"bits": 8, "group_size": "channel"}), ("quantize-activations", {"number": "int8"})
        with pytest.raises(UsageError, match="cannot come after `quantize-activations`"):
            make_plan(recipe(family("llama"), *rounding, ("distill", {"data": str(text)})))

    def test_less_than_a_batch(self, student, family, tmp_path):
        path = tmp_path / "short.txt"
        path.write_text(" ".join(LINES))
        with pytest.raises(LlmoptError, match="less than one batch") as caught:
            taught(student, tmp_path / "out", family("llama"), path, batch_size=64)
        assert "a step takes 64" in caught.value.where
        assert not (tmp_path / "out").exists()

    def test_a_student_larger_than_its_teacher_is_told(self, student, family, text, tmp_path):
        record, _ = taught(family("llama"), tmp_path / "out", student, text)
        assert any("more than its teacher's" in note for note in record.notes)


def test_losses_that_suit_the_model(family, tmp_path):
    facts = open_model(family("llama"), tmp_path / "llama").facts
    assert DistillParams().losses(facts) == {"kl": 1.0}
    assert DistillParams(kl=0.5, hidden=2, lm=0).losses(facts) == {"kl": 0.5, "hidden": 2.0}
    encoder = open_model(family("distilbert"), tmp_path / "distilbert").facts
    assert DistillParams().losses(encoder) == {"hidden": 1.0, "cosine": 1.0}


def test_text_alone_needs_no_teacher():
    assert {need.value for need in Distill(DistillParams(lm=1)).requires()} == {"gradients"}
    assert {need.value for need in Distill(DistillParams(lm=1, kl=1)).requires()} == {"gradients", "teacher"}


def test_a_longer_training_needs_no_more_memory_and_adapters_less(family, tmp_path):
    facts = open_model(family("llama"), tmp_path).facts

    def needed(**params):
        return Distill(convert(params, DistillParams, where="test")).whole_bytes(facts)

    assert needed(steps=10) == needed(steps=10_000)
    assert needed(lora_rank=2) < needed()
    assert facts.parameters * 20 < needed()


@pytest.mark.parametrize("name", [name for name, made in FAMILIES.items() if made.text])
def test_parameters_go_back_to_the_tensors_they_came_from(family, tmp_path, name):
    model = open_model(family(name), tmp_path / "work")
    parameters = dict(model.materialize().named_parameters())
    again = model.with_parameters(parameters.get)
    assert list(again.tensor_specs()) == list(model.tensor_specs())
    for key in model.tensor_specs():
        assert torch.equal(again.read(key), model.read(key)), key
    model = open_model(family(name), tmp_path / "other")
    doubled = model.with_parameters(lambda key: None if key not in parameters else 2 * parameters[key])
    changed = [key for key in model.tensor_specs() if not torch.equal(doubled.read(key), model.read(key))]
    assert len(changed) >= len(parameters) - 2
    for key in changed:
        assert torch.equal(doubled.read(key), 2 * model.read(key)), key
