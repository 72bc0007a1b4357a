"""What a student is measured by, each as a sum, so that shares of a batch add up.

Hinton, Vinyals and Dean (2015), "Distilling the Knowledge in a Neural Network": soft targets with a temperature T,
the gradient multiplied by T². Gu, Dong, Wei and Huang (2023), "MiniLLM": the reverse divergence. Agarwal et al. (2023),
"On-Policy Distillation of Language Models": the Jensen-Shannon divergence. Wang et al. (2020), "MiniLM", and (2021),
"MiniLMv2": relations between the tokens of a text.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Divergence = Literal["kl", "reverse_kl", "js"]

_SMALL = 1e-9


def divergence(kind: Divergence, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return how far the student's distribution is from the teacher's, at each position.

    Args:
        kind: `kl` is KL(teacher || student), `reverse_kl` the other way round, `js` Jensen-Shannon.
        student: logits, (…, classes).
        teacher: logits or log probabilities, the same shape.
        temperature: both are divided by it; the result is multiplied by its square.

    Returns:
        (…), nats.
    """
    ours = functional.log_softmax(student.float() / temperature, -1)
    theirs = functional.log_softmax(teacher.float() / temperature, -1)
    return of_logs(kind, ours, theirs) * temperature**2


def of_logs(kind: Divergence, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the divergence of two sets of log probabilities, (…, classes)."""
    if kind == "kl":
        return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    if kind == "reverse_kl":
        return functional.kl_div(theirs, ours, reduction="none", log_target=True).sum(-1)
    middle = torch.logaddexp(ours, theirs) - torch.log(torch.tensor(2.0, device=ours.device))
    return 0.5 * (of_logs("kl", middle, theirs) + of_logs("kl", middle, ours))


def with_rest(logs: Tensor) -> Tensor:
    """Append the log probability of everything else to those of the most likely classes, (…, k) to (…, k + 1)."""
    rest = 1.0 - logs.exp().sum(-1, keepdim=True)
    return torch.cat([logs, rest.clamp_min(_SMALL).log()], -1)


def next_token(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the summed cross-entropy of every real token after the first, nats.

    Args:
        logits: (batch, sequence, vocabulary).
        ids: (batch, sequence).
        mask: (batch, sequence), 1 where a token is real.
    """
    losses = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * mask[:, 1:].flatten()).sum()


def answer_tokens(logits: Tensor, ids: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
    """Return the summed cross-entropy of the tokens of every row's answer, nats; see `next_token`.

    Args:
        logits: (batch, sequence, vocabulary).
        ids: (batch, sequence).
        mask: (batch, sequence), 1 where a token is real.
        starts: (batch,), the place of each answer's first token.
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    return next_token(logits, ids, mask * (places >= starts.unsqueeze(-1)))


def state_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the summed squared error of the tokens' states, each over its teacher's mean square.

    Args:
        student: (batch, sequence, hidden), projected to the teacher's width where that differs.
        teacher: (batch, sequence, hidden).
        mask: (batch, sequence), 1 where a token is real.
    """
    student, teacher = student.float(), teacher.float()
    error = (student - teacher).square().mean(-1) / teacher.square().mean(-1).clamp_min(_SMALL)
    return (error * mask).sum()


def relation(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Return the summed KL divergence of how each token relates to the others, MiniLMv2's equations 4 and 5.

    Args:
        student: queries, keys or values, (batch, sequence, its width).
        teacher: the same of the teacher, (batch, sequence, its width).
        mask: (batch, sequence), 1 where a token is real.
        heads: relation heads; both widths are multiples of it, and need not be equal.

    Returns:
        Summed over tokens, the mean over heads.
    """
    ours, theirs = _relations(student, mask, heads), _relations(teacher, mask, heads)
    # What is hidden has probability zero in both: minus infinity must not meet minus infinity.
    terms = theirs.exp() * (theirs - ours).masked_fill(mask[:, None, None, :] == 0, 0.0)
    return (terms.sum(-1).mean(1) * mask).sum()


def _relations(vectors: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Return log probabilities, (batch, heads, sequence, sequence)."""
    split = vectors.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    return functional.log_softmax(scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf), -1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the summed 1 - cosine of the texts' embeddings, (batch, width) each."""
    return (1.0 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)).sum()
