"""What a session in transformers holds, and for how long."""

import gc
import weakref

from helpers import build, recipe
from llmopt.runtimes.transformers_ import Transformers


def test_closing_frees_the_model(family, tmp_path):
    """At once: whoever compares two artifacts opens them in turns, and memory is for one."""
    build(recipe(family("llama"), ("rtn", {"group_size": 32})), tmp_path / "out")
    session = Transformers().open(tmp_path / "out")
    layer = weakref.ref(session.model.model.layers[0].mlp.up_proj)
    gc.disable()
    try:
        session.close()
        assert layer() is None
    finally:
        gc.enable()
