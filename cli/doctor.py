"""`llmopt doctor`."""

from __future__ import annotations

from .common import Json, Verbose, open_screen


def command(*, json: Json = False, verbose: Verbose = False) -> None:
    """Show which runtimes and devices this machine has.

    Shows versions, instruction sets and GPUs, and what each exporter can do here.
    """
    from ..pipeline.doctor import doctor
    from .views import report_sections

    screen = open_screen(json=json, quiet=False, verbose=verbose)
    report = doctor()
    screen.show(report_sections(report), report)
