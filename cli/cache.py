"""`llmopt cache`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import LlmoptError, UsageError, nearest
from .common import CacheDir, Json, Quiet, Verbose, cache_settings, open_screen, parse_size

if TYPE_CHECKING:
    from ..pipeline.cache.store import Store
    from .render import Section

_ACTIONS = ("list", "size", "prune", "clear")
_KEY = 12
"""So many characters of an entry's name tell it from others, for people."""


def command(
    action: Annotated[str, typer.Argument(metavar="|".join(_ACTIONS), help="What to do.")],
    *,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size",
            metavar="SIZE",
            help="prune: what may stay, such as 5GiB. [default: LLMOPT_CACHE_SIZE, or 20 GiB, or half of what the "
            "entries and the free space of the disk are together]",
        ),
    ] = None,
    cache_dir: CacheDir = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show or remove the results of passes that are kept for later runs.

    A pass that was run before with the same model, parameters, calibration data, seed and versions is taken from there,
    and a run that was killed goes on where it was. Each run removes what was not used for the longest when all takes
    more than it may. `prune` does that now, `clear` removes everything; what a run uses just now stays.

        llmopt cache list
        llmopt cache prune --max-size 5GiB
    """
    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    if action not in _ACTIONS:
        raise UsageError(
            f"unknown action `{action}`", where=f"expected {', '.join(_ACTIONS)}", hint=nearest(action, _ACTIONS)
        )
    if max_size is not None and action != "prune":
        raise UsageError(f"--max-size does not apply to {action}", hint="use it with prune")
    limit = None if max_size is None else parse_size(max_size, where="--max-size")
    from ..pipeline.cache.store import Store

    settings = cache_settings(cache_dir)
    try:
        store = Store(settings.folder, settings.limit)
    except OSError as error:
        raise LlmoptError(
            f"cannot use the cache at `{settings.folder}`",
            where=error.strerror or str(error),
            hint="name another folder with --cache-dir",
        ) from None
    if action == "list":
        screen.show(*_list(store))
    elif action == "size":
        screen.show(*_size(store))
    else:
        count, freed = store.prune(-1 if action == "clear" else store.limit() if limit is None else limit)
        screen.show(*_removed(store, count, freed), summary=True)


def _list(store: Store) -> tuple[list[Section], Any]:
    from ..core.numbers import seconds, size
    from .render import Lines, Table

    found = store.shown()
    rows = [
        (
            one.key[:_KEY],
            one.title or "(not finished)",
            one.model,
            size(one.bytes),
            seconds(one.seconds) if one.title else "",
            "in use" if one.used else "",
        )
        for one in found
    ]
    title = f"Cache at {store.folder}, used last first"
    header = ("key", "passes", "model", "size", "took", "")
    data = {"directory": str(store.folder), "entries": [asdict(one) for one in found]}
    return [Table(title, header, rows, frozenset({3, 4})) if rows else Lines(title, ["empty"])], data


def _size(store: Store) -> tuple[list[Section], Any]:
    from ..core.numbers import size
    from .render import Pairs

    data = {"directory": str(store.folder), "bytes": store.size(), "limit_bytes": store.limit()}
    shown = [
        ("folder", str(store.folder)),
        ("takes", size(store.size())),
        ("may take", size(store.limit())),
    ]
    return [Pairs("Cache", shown)], data


def _removed(store: Store, count: int, freed: int) -> tuple[list[Section], Any]:
    from ..core.numbers import size
    from .render import Pairs

    left = store.size()
    shown = [("removed", f"{count} entries, {size(freed)}"), ("left", size(left))]
    data = {"directory": str(store.folder), "removed": count, "removed_bytes": freed, "bytes": left}
    return [Pairs("Cache", shown)], data
