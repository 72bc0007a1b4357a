"""What `--scheme` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import UsageError, nearest


@dataclass(frozen=True, slots=True)
class Scheme:
    """What `--scheme` stands for.

    Attributes:
        weights: parameters of the pass that quantizes weights.
        inputs: parameters of `quantize-activations`; None when activations stay in floating point.
    """

    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None


def schemes() -> dict[str, Scheme]:
    """Return all schemes by name."""
    from ..core.quantized import BITS

    integers = {f"w{bits}a16": Scheme({"bits": bits}) for bits in BITS}
    return integers | {
        "w8a8-int8": Scheme({"bits": 8, "group_size": "channel"}, {"number": "int8"}),
        "w8a8-fp8": Scheme({"number": "fp8"}, {"number": "fp8"}),
        "w4a8": Scheme({"bits": 4}, {"number": "int8"}),
        "w4a8-fp8": Scheme({"bits": 4}, {"number": "fp8"}),
        "fp8": Scheme({"number": "fp8"}),
        "nvfp4": Scheme({"number": "nvfp4"}),
        "mxfp4": Scheme({"number": "mxfp4"}),
    }


def parse_scheme(scheme: str) -> Scheme:
    """Return what a scheme such as `w4a16` stands for.

    Raises:
        UsageError: an unknown scheme; the hint names the known.
    """
    known = schemes()
    if scheme not in known:
        hint = nearest(scheme, known)
        raise UsageError(
            f"unknown scheme `{scheme}`",
            where="a scheme is w<bits of a weight>a<bits of an activation>, 16 being floating point, or a format",
            hint=hint if hint.startswith("did you mean") else f"known: {', '.join(known)}",
        )
    return known[scheme]
