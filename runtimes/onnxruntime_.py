"""ONNX Runtime: opens `model.onnx`, and generates with a graph that has a cache."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.errors import LlmoptError
from ..core.graph import SHARED_CACHE
from ..core.runtime import Arrays, Runtime, Session
from ..core.threads import cores, take_turns
from ..core.untrusted import read_json
from ..graphs.limits import check_graph_file
from .versions import installed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np

GRAPH = "model.onnx"
_PAST, _PRESENT = "past_key_values.", "present."


class OnnxRuntime(Runtime):
    """The CPU engine of ONNX Runtime."""

    name: ClassVar[str] = "onnxruntime"
    parallel: ClassVar[bool] = True

    def version(self) -> str:
        """Return name and version."""
        return installed("onnxruntime")

    def opens(self, directory: Path) -> bool:
        """Return whether there is a graph, and no GenAI configuration beside it."""
        return (directory / GRAPH).is_file() and not (directory / "genai_config.json").is_file()

    def open(self, directory: Path, *, threads: int | None = None, parallel: int = 1) -> OnnxSession:
        """Load the graph.

        Raises:
            LlmoptError: it does not load.
        """
        # A batch computes on the thread that asks for it and on the session's pool, which is empty with one thread.
        alone = parallel > 1 and parallel >= (threads or cores())
        return self.open_graph(directory / GRAPH, threads=1 if alone else threads)

    def open_graph(self, path: Path, *, threads: int | None = None) -> OnnxSession:
        """Load a graph by any name.

        Raises:
            LlmoptError: it does not load.
        """
        import onnxruntime

        check_graph_file(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            if take_turns(threads):
                options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with engine_errors(f"`{path.name}` does not load", path.parent):
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return OnnxSession(session, path.parent)


class OnnxSession(Session):
    """A graph, loaded."""

    def __init__(self, session: Any, directory: Path) -> None:
        self._session: Any = session
        self._directory = directory
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._shares = self._may_share()
        self._last: tuple[dict[str, Any], Any, list[str]] | None = None

    def outputs(self, inputs: Arrays) -> Arrays:
        """Run one forward pass; a mask, positions and an empty cache are supplied where the graph asks for them.

        Raises:
            LlmoptError: the graph asks for an input that is not there, or the run fails.
        """
        results = self._run(inputs)
        ids, logits = inputs.get("input_ids"), results.get("logits")
        cached = any(name.startswith(_PAST) for name in self._inputs)
        if cached and ids is not None and logits is not None and logits.shape[1] < ids.shape[1]:
            return {"logits": self._score(inputs)}
        return {name: value for name, value in results.items() if not name.startswith(_PRESENT)}

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Continue a prompt greedily, with the graph's cache where it has one.

        Raises:
            LlmoptError: the graph is no language model.
        """
        import numpy as np

        if "logits" not in self._outputs or "input_ids" not in self._inputs:
            raise LlmoptError(
                "the artifact does not generate text",
                where=f"inputs {', '.join(self._inputs)}; outputs {', '.join(self._outputs)}",
            )
        if "decoder_input_ids" in self._inputs:
            return self._generate_decoder(prompt, max_new_tokens)
        if not any(name.startswith(_PAST) for name in self._inputs):
            return self._generate_anew(prompt, max_new_tokens)
        tokens = list(prompt)
        past = self._cache(1, len(tokens) + max_new_tokens)
        for _ in range(max_new_tokens):
            fresh = tokens[-1:] if len(tokens) > len(prompt) else tokens
            logits, past = self._step(np.asarray([fresh], np.int64), np.ones((1, len(tokens)), np.int64), past)
            tokens.append(int(logits[0, -1].argmax()))
        self._last = None
        return tokens[len(prompt) :]

    def close(self) -> None:
        """Free the engine's session."""
        self._session = self._last = None

    def _score(self, inputs: Arrays) -> np.ndarray[Any, Any]:
        """Return the logits of every position from a graph that computes them for the last one: token by token."""
        import numpy as np

        ids = np.asarray(inputs["input_ids"])
        mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
        past = self._cache(*mask.shape)
        scores: list[np.ndarray[Any, Any]] = []
        for place in range(ids.shape[1]):
            logits, past = self._step(ids[:, place : place + 1], mask[:, : place + 1], past)
            scores.append(logits)
        return np.concatenate(scores, axis=1)

    def _may_share(self) -> bool:
        """Return whether past and present may be the same memory."""
        return SHARED_CACHE in self._session.get_modelmeta().custom_metadata_map

    def _cache(self, batch: int, length: int) -> dict[str, Any]:
        """Return an empty cache: where past and present may be the same memory, buffers for `length` tokens."""
        import numpy as np

        if not self._shares:
            return {}
        # One made of an array would be that array's memory, and die with it.
        made = import_module("onnxruntime").OrtValue.ortvalue_from_shape_and_type
        cache: dict[str, Any] = {}
        for name, value in self._inputs.items():
            if name.startswith(_PAST):
                empty = np.zeros((batch, value.shape[1], length, value.shape[3]), _dtype(value.type))
                cache[name] = made(empty.shape, empty.dtype)
                cache[name].update_inplace(empty)
        return cache

    def _step(
        self, fresh: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], past: dict[str, Any]
    ) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        """Run `fresh` tokens behind a cache that stays with the engine: no copy of it goes through numpy.

        Args:
            fresh: (batch, tokens).
            mask: (batch, tokens with those of the cache), 0 where there is padding.
            past: the cache as `_cache` or the last step returned it.

        Returns:
            The logits, and the cache with the fresh tokens in it.
        """
        known = {"input_ids": fresh, "attention_mask": mask}
        feed = {name: self._typed(name, value) for name, value in known.items() if name in self._inputs}
        feed |= self._supplied(known, {**feed, **past}, mask.shape[1] - fresh.shape[1])
        self._require({*feed, *past})
        made = self._bound(feed, past)
        if self._shares:
            return made["logits"], past
        present = {name: value for name, value in made.items() if name.startswith(_PRESENT)}
        return made["logits"], {_PAST + name.removeprefix(_PRESENT): each for name, each in present.items()}

    def _bound(self, feed: Mapping[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
        """Run on arrays and on values that stayed with the engine; return logits as an array, the rest as it stays."""
        with engine_errors("the graph does not run", self._directory):
            binding, bound = self._binding(kept)
            for name, value in feed.items():
                binding.bind_cpu_input(name, value)
            fresh = [name for name in self._outputs if name not in bound]
            for name in fresh:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound.
        made = dict(zip([*bound, *fresh], binding.get_outputs(), strict=True))
        return {name: value.numpy() if name == "logits" else value for name, value in made.items()}

    def _binding(self, kept: dict[str, Any]) -> tuple[Any, list[str]]:
        """Return a binding of the cache and the outputs in it; the same one as long as the cache is the same."""
        if self._last is not None and self._last[0] is kept:
            return self._last[1:]
        binding = self._session.io_binding()
        for name, value in kept.items():
            binding.bind_ortvalue_input(name, value)
        present = [name for name in self._outputs if self._shares and name.startswith(_PRESENT)]
        for name in present:
            binding.bind_ortvalue_output(name, kept[_PAST + name.removeprefix(_PRESENT)])
        self._last = (kept, binding, present) if self._shares else None
        return binding, present

    def _generate_anew(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Continue a prompt without a cache."""
        import numpy as np

        tokens = list(prompt)
        for _ in range(max_new_tokens):
            tokens.append(int(self._run({"input_ids": np.asarray([tokens], np.int64)})["logits"][0, -1].argmax()))
        return tokens[len(prompt) :]

    def _generate_decoder(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        import numpy as np

        source = np.asarray([prompt], np.int64)
        tokens = [self._decoder_start()]
        for _ in range(max_new_tokens):
            inputs = {"input_ids": source, "decoder_input_ids": np.asarray([tokens], np.int64)}
            tokens.append(int(self._run(inputs)["logits"][0, -1].argmax()))
        return tokens[1:]

    def _decoder_start(self) -> int:
        config = read_json(self._directory / "config.json")
        start = config.get("decoder_start_token_id")
        if start is None:
            raise LlmoptError("config.json has no decoder_start_token_id", where=str(self._directory))
        return int(start)

    def _run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        feed = {name: self._typed(name, value) for name, value in inputs.items() if name in self._inputs}
        feed |= self._supplied(inputs, feed, 0)
        self._require(set(feed))
        with engine_errors("the graph does not run", self._directory):
            return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))

    def _require(self, names: set[str]) -> None:
        missing = sorted(set(self._inputs) - names)
        if missing:
            raise LlmoptError(f"the graph needs the input(s) {', '.join(missing)}", where=str(self._directory))

    def _typed(self, name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.asarray(value, _dtype(self._inputs[name].type))

    def _supplied(self, inputs: Arrays, feed: Mapping[str, Any], done: int) -> dict[str, Any]:
        """Make the inputs that follow from the tokens: mask, positions, token types and an empty cache.

        Args:
            inputs: what was given.
            feed: the same, as the graph takes it.
            done: how many tokens a cache already holds.
        """
        import numpy as np

        main = next((feed[name] for name in ("input_ids", "input_features", "pixel_values") if name in feed), None)
        batch = 1 if main is None else main.shape[0]
        made: dict[str, Any] = {}
        for name, value in self._inputs.items():
            if name.startswith(_PAST) and name not in feed:
                made[name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), _dtype(value.type))
        if main is None or "input_ids" not in feed:
            return made
        length = main.shape[1]
        mask = np.asarray(inputs.get("attention_mask", np.ones((batch, done + length), np.int64)))
        supplied = {
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -length:],
            "token_type_ids": np.zeros((batch, length), np.int64),
        }
        for name, value in supplied.items():
            if name in self._inputs and name not in feed:
                made[name] = self._typed(name, value)
        return made


@contextmanager
def engine_errors(what: str, directory: Path) -> Iterator[None]:
    """Turn an error of ONNX Runtime or ORT GenAI into ours, with the engine's message in `where`."""
    state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    # ONNX Runtime's exceptions have no common base below Exception; GenAI raises RuntimeError.
    members = [getattr(state, name) for name in dir(state)]
    own = [kind for kind in members if isinstance(kind, type) and issubclass(kind, Exception)]
    try:
        yield
    except (*own, RuntimeError, ValueError, TypeError, OSError) as error:
        raise LlmoptError(what, where=f"{directory}\n{error}") from error


def _dtype(kind: str) -> Any:
    """Return numpy's dtype for ONNX Runtime's `tensor(float)`."""
    import numpy as np

    name = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))
