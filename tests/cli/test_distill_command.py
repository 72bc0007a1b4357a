"""`llmopt distill`: the recipe it builds, and what it refuses."""


def test_the_recipe(llmopt, pipeline):
    ended = llmopt(
        *("distill", "tiny", "-o", "out", "--teacher", "large", "--data", "a.txt", "--steps", "20", "--kl", "1"),
        *("--lora-rank", "8", "--lora-targets", "q_proj", "--packing", "false", "--seed", "3"),
    )
    assert ended.code == 0, ended.err
    recipe = pipeline["recipe"]
    assert recipe.model.id == "tiny"
    assert recipe.seed == 3
    (step,) = recipe.passes
    given = {"teacher": "large", "data": "a.txt", "steps": 20, "kl": 1.0, "packing": False}
    assert (step.name, step.params) == ("distill", given | {"lora_rank": 8, "lora_targets": ["q_proj"]})
    assert [one.name for one in recipe.exports] == ["safetensors"]


def test_the_text_alone_needs_no_teacher(llmopt, pipeline):
    assert llmopt("distill", "tiny", "-o", "out", "--data", "a.txt", "--lm", "1").code == 0
    assert pipeline["recipe"].passes[0].params == {"data": "a.txt", "lm": 1.0}


def test_refusals(llmopt, pipeline):
    ended = llmopt("distill", "tiny", "-o", "out", "--teacher", "large")
    assert (ended.code, "distill needs text" in ended.err) == (2, True)
    ended = llmopt("distill", "tiny", "-o", "out", "--data", "a.txt")
    assert (ended.code, "needs a teacher" in ended.err) == (2, True)
    ended = llmopt("distill", "tiny", "-o", "out", "--data", "a.txt", "--teacher", "large", "--steps", "0")
    assert (ended.code, "bad value for --steps" in ended.err) == (2, True)
    assert "run" not in pipeline


def test_a_student_of_its_own(llmopt, pipeline):
    """MODEL teaches then: the same recipe as with --teacher."""
    assert llmopt("distill", "large", "-o", "out", "--student", "tiny", "--data", "a.txt").code == 0
    named = pipeline["recipe"]
    assert llmopt("distill", "tiny", "-o", "out", "--teacher", "large", "--data", "a.txt").code == 0
    assert named == pipeline["recipe"]
    assert named.model.id == "tiny"
    ended = llmopt("distill", "a", "-o", "out", "--student", "b", "--teacher", "c", "--data", "a.txt")
    assert (ended.code, "two teachers are named" in ended.err) == (2, True)
