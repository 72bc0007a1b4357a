"""The loop: steps, evaluations, the best state kept, and the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.errors import LlmoptError
from .order import Batch, Counts, Order, batch_of
from .states import Keeper, Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...core.progress import Reporter
    from .logit_cache import LogitCache
    from .teacher import Teacher

_POINTS = 100
"""A curve has about so many points, however many steps there are."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how fast to learn.

    Attributes:
        steps: updates of the weights.
        rate: the largest learning rate.
        warmup: share of the steps in which the rate rises to it.
        clip: gradients longer than this are shortened to it.
        evaluate_every: steps between evaluations.
        patience: evaluations without a better one after which learning ends; None goes on to the end.
        checkpoint_every: steps between checkpoints, None writes none.
        weights: of the losses, by name.
        measured: names of the losses that are measured on held-out rows, those of `weights` first.
    """

    steps: int
    rate: float
    warmup: float
    clip: float
    evaluate_every: int
    patience: int | None
    checkpoint_every: int | None
    weights: dict[str, float]
    measured: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Material:
    """What is learnt from and measured with.

    Attributes:
        order: rows, step by step.
        rows: the rows that `order` counts.
        held_out: further rows.
        labels: of `rows` and of `held_out`, each None where rows have none.
        cache: the teacher's answers to `rows`, and to `held_out`; None where they are computed each time.
    """

    order: Order
    rows: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    labels: tuple[Sequence[int] | None, Sequence[int] | None]
    cache: tuple[LogitCache, LogitCache] | None


def rate_at(step: int, settings: Settings) -> float:
    """Return the learning rate of a step, counted from 0: up in a line, down in half a cosine (Loshchilov, 2017)."""
    rising = math.ceil(settings.warmup * settings.steps)
    if step < rising:
        return settings.rate * (step + 1) / rising
    return settings.rate * 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, settings.steps - rising)))


class Loop:
    """Learning, step by step.

    Args:
        accelerator: the processes that learn together.
        pupil: student and losses, as the accelerator prepared them.
        optimizer: of the pupil's parameters, as prepared.
        teacher: answers; None where no loss needs one.
        material: rows.
        settings: how long and how fast.
        keeper: keeps states.
        reporter: shown progress.
        batch_size: rows in an evaluation's batch.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pupil: Any,
        optimizer: Any,
        *,
        teacher: Teacher | None,
        material: Material,
        settings: Settings,
        keeper: Keeper,
        reporter: Reporter,
        batch_size: int,
    ) -> None:
        self._accelerator, self._pupil, self._optimizer, self._teacher = accelerator, pupil, optimizer, teacher
        self._material, self._settings, self._keeper, self._reporter = material, settings, keeper, reporter
        self._batch_size = batch_size
        self._parameters = [one for one in pupil.parameters() if one.requires_grad]
        self._weights = torch.tensor(list(settings.weights.values()), device=accelerator.device)

    def run(self) -> Progress:
        """Learn, and return how it went; the best state lies where the keeper has put it."""
        settings = self._settings
        progress = self._keeper.resume()
        if progress is None:
            progress = Progress()
            self._judge(progress)
        else:
            self._reporter.note(f"distill: going on after step {progress.step} of {settings.steps}")
        begun, tokens = time.monotonic(), 0
        with self._reporter.step("distill", settings.steps) as shown:
            if progress.step:
                shown.advance(progress.step)
            while progress.step < settings.steps and not progress.stopped:
                losses = self._step(progress.step)
                tokens += Counts.of(self._material.rows, self._material.order.chosen(progress.step)).tokens
                progress.step += 1
                self._note(progress, losses)
                if progress.step % settings.evaluate_every == 0 or progress.step == settings.steps:
                    self._judge(progress)
                every = settings.checkpoint_every
                if every is not None and (progress.step % every == 0 or progress.step == settings.steps):
                    self._keeper.save(progress)
                loss = sum(w * x for w, x in zip(settings.weights.values(), losses, strict=True))
                speed = tokens / max(time.monotonic() - begun, 1e-9)
                shown.advance(detail=f"loss {loss:.4g}, {speed:.0f} tokens/s")
        return progress

    def _step(self, step: int) -> list[float]:
        """Update the weights once and return the losses before that."""
        accelerator, order = self._accelerator, self._material.order
        names = tuple(self._settings.weights)
        counts = Counts.of(self._material.rows, order.chosen(step), self._material.labels[0])
        batches = order.batches(step)
        total = torch.zeros(len(names), device=accelerator.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self._pupil):
                losses = self._losses(batch, counts, names, held_out=False)
                # Processes' gradients are averaged; each loss is divided by the units of all of them together.
                accelerator.backward((losses * self._weights).sum() * accelerator.num_processes)
            total += losses.detach()
        total = self._sum(total)
        norm = accelerator.clip_grad_norm_(self._parameters, self._settings.clip)
        if not (bool(torch.isfinite(total).all()) and (norm is None or math.isfinite(float(norm)))):
            raise self._diverged(step + 1, total.tolist(), names)
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(step, self._settings)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total.tolist()

    def _losses(self, batch: Batch, counts: Counts, names: tuple[str, ...], *, held_out: bool) -> Tensor:
        caches = self._material.cache
        cache = None if caches is None else caches[held_out]
        answers = {} if self._teacher is None else self._teacher.answer(batch, cache)
        device = self._accelerator.device
        ids, mask = batch.ids.to(device), batch.mask.to(device)
        labels = None if batch.labels is None else batch.labels.to(device)
        return self._pupil(ids, mask, answers, counts=counts, names=names, full=batch.full, labels=labels)

    def _note(self, progress: Progress, losses: list[float]) -> None:
        """Add a step's losses to the curve, whose points are means over several steps."""
        progress.window = [a + b for a, b in zip(progress.window or [0.0] * len(losses), losses, strict=True)]
        progress.window_steps += 1
        every = max(1, self._settings.steps // _POINTS)
        if progress.step % every and progress.step != self._settings.steps:
            return
        means = [value / progress.window_steps for value in progress.window]
        point = dict(zip(self._settings.weights, means, strict=True))
        progress.curve.append(
            {"step": progress.step, "learning_rate": rate_at(progress.step - 1, self._settings), **point}
        )
        progress.window, progress.window_steps = [], 0

    def _judge(self, progress: Progress) -> None:
        """Measure the losses on held-out rows, and keep the state if it is the best so far."""
        if not len(self._material.held_out):
            self._keeper.keep_best(self._pupil)
            progress.best_step = progress.step
            return
        measured = self._measure()
        weights = self._settings.weights
        loss = sum(weights.get(name, 0.0) * value for name, value in measured.items())
        if not all(map(math.isfinite, measured.values())):
            raise self._diverged(progress.step, list(measured.values()), tuple(measured))
        progress.curve.append(
            {"step": progress.step, **{f"held_out_{name}": value for name, value in measured.items()}}
        )
        if progress.best is None or loss < progress.best:
            progress.best, progress.best_step, progress.waited = loss, progress.step, 0
            self._keeper.keep_best(self._pupil)
            return
        progress.waited += 1
        progress.stopped = self._settings.patience is not None and progress.waited >= self._settings.patience

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        rows, size = self._material.held_out, self._batch_size
        labels = self._material.labels[1]
        counts = Counts.of(rows, range(len(rows)), labels)
        total = torch.zeros(len(self._settings.measured), device=self._accelerator.device)
        starts = range(0, len(rows), size)
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        # Every process computes as many batches, so that none waits for another: a sharded model is put together anew
        # for each. One that has none left computes the first again, and does not count it.
        for turn in range(-(-len(starts) // ranks)):
            place = turn * ranks + rank
            start = starts[place] if place < len(starts) else 0
            batch = batch_of(rows, list(range(start, min(start + size, len(rows)))), labels)
            losses = self._losses(batch, counts, self._settings.measured, held_out=True)
            total += losses * (place < len(starts))
        return dict(zip(self._settings.measured, self._sum(total).tolist(), strict=True))

    def _sum(self, tensor: Tensor) -> Tensor:
        summed: Any = self._accelerator.reduce(tensor, "sum")
        return summed

    def _diverged(self, step: int, values: Sequence[float], names: tuple[str, ...]) -> LlmoptError:
        told = ", ".join(f"{name} {value:g}" for name, value in zip(names, values, strict=True))
        every = self._settings.checkpoint_every
        kept = "the last checkpoint is kept; " if every is not None and step > every else ""
        return LlmoptError(
            f"the loss is NaN or infinite at step {step}",
            where=f"pass `distill`: {told}, learning rate {rate_at(max(0, step - 1), self._settings):.3g}",
            hint=f"{kept}use a smaller --learning-rate, a longer --warmup, or --precision float32",
        )
