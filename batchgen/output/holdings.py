"""Finds out what is at the output's location: nothing, a batchgen output, or files of others.

Files of others are never removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from batchgen.errors import InputError
from batchgen.output.formats import FORMATS
from batchgen.output.lease import LEASES
from batchgen.output.ledger import DATA, FAILED, JOB, PARTS, PLAN, RECORDS, REJECTS, SHARDS, Ledger
from batchgen.spec.spec import Spec
from batchgen.storage import TEMPORARY, Store, absolute, delete_all, is_within, subfolders

INPUT = "_batchgen/input"  # imports of sources; importing/direct.py writes them
CARD = "README.md"
CARD_MARK = "<!-- Each batchgen run replaces this file; without this line it stays as it is. -->\n"
_FIRST_CARDS = b"\n# Synthetic images made with batchgen "  # cards of version 0.1 have no mark
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep", ".keep", "lost+found/", ".nfs"}
_NAMED = 4


@dataclass(frozen=True)
class Holdings:
    """Files of an output.

    Attributes:
        own: name -> size in bytes of the files that batchgen wrote.
        others: names of the other files in ``data/``.
    """

    own: dict[str, int]
    others: tuple[str, ...]


def is_our_card(text: bytes) -> bool:
    return CARD_MARK.strip().encode() in text or _FIRST_CARDS in text


def card_is_ours(store: Store) -> bool:
    """Whether the output has no README.md, or one that batchgen wrote."""
    try:
        return is_our_card(store.read(CARD))
    except FileNotFoundError:
        return True


def is_output(ledger: Ledger) -> bool:
    """Whether a run was there: it left its plan, its spec (``job.yaml``) or a marker."""
    names = ledger.store.list(RECORDS)
    wanted = {PLAN.rpartition("/")[2], JOB.rpartition("/")[2]}
    return bool(wanted & names.keys()) or bool(ledger.store.list(SHARDS))


def anything_made(ledger: Ledger) -> bool:
    """Whether there is a marker, a data file, a file of rejects, or a further part."""
    store = ledger.store
    records = (SHARDS, REJECTS, PARTS)
    return any(store.list(folder) for folder in records) or bool(_names(store, DATA))


def refuse_unless_free(ledger: Ledger) -> None:
    """Refuse an output folder that is neither empty nor an output with a plan.

    Files that operating systems leave in folders (such as ``.DS_Store``) do not count.

    Raises:
        InputError: there are other files, or results without their plan; names them.
    """
    store = ledger.store
    if PLAN.rpartition("/")[2] in store.list(RECORDS):
        return
    markers = [name for name in store.list(SHARDS) if name.endswith(".json")]
    if markers or store.list(REJECTS):
        raise InputError(
            f"output {store.url} holds {len(markers)} committed shards, but no {PLAN}, which "
            "records what they were generated from; restore that file, choose another output, or "
            "start over with `batchgen run --overwrite`"
        )
    others = sorted(_foreign(store))
    if others:
        more = f" and {len(others) - _NAMED} more" if others[_NAMED:] else ""
        raise InputError(
            f"output {store.url} is not empty and is not a batchgen output: it contains "
            f"{', '.join(others[:_NAMED])}{more}; choose a new or empty folder"
        )


def holdings_of(ledger: Ledger, read: str = "") -> Holdings:
    """The files that `--overwrite` removes, in that order, and the files of others in ``data/``.

    Markers are removed before data, and the plan last, so that an interrupted removal never leaves
    an output that looks complete. Imports of sources (``_batchgen/input/``) are removed, but not
    the one that the next run reads.

    Args:
        read: the input of the next run.
    """
    store = ledger.store
    if not is_output(ledger):
        return Holdings({}, ())
    data = {f"{DATA}/{name}": size for name, size in store.find(DATA).items()}
    own_data = {name for name in data if any(form.is_ours(name) for form in FORMATS.values())}
    kept: tuple[str, ...] = (f"{LEASES}/", f"{TEMPORARY}/")
    records = {f"{RECORDS}/{name}": size for name, size in store.find(RECORDS).items()}
    if _is_import(ledger, read):
        place = absolute(read).removeprefix(absolute(store.url).rstrip("/") + "/")
        kept = (*kept, f"{place.rpartition('/')[0]}/")
    records = {name: size for name, size in records.items() if not name.startswith(kept)}
    first = {name: size for name, size in records.items() if name.startswith(f"{SHARDS}/")}
    own = first | {name: data[name] for name in sorted(own_data)}
    top = store.list("")
    if CARD in top and card_is_ours(store):
        own[CARD] = top[CARD]
    own |= {name: size for name, size in records.items() if name not in (PLAN, JOB)}
    own |= {name: records[name] for name in (JOB, PLAN) if name in records}
    others = sorted(name for name in data.keys() - own_data if not is_litter(name))
    return Holdings(own, tuple(others))


def refuse_to_remove(ledger: Ledger, spec: Spec) -> None:
    """Check before any work that ``remove_output`` can run and removes no file that is needed.

    Raises:
        InputError: there are files of others, or the input or the model is in the output.
    """
    if not is_output(ledger):
        refuse_unless_free(ledger)
    _refuse_others(ledger, holdings_of(ledger))
    source = "" if _is_import(ledger, spec.input.path) else spec.input.path
    for field, place in (("input", source), *spec.model.places()):
        if place and is_within(place, ledger.store.url):
            raise InputError(
                f"{field} {place} is in output {ledger.store.url}, which `--overwrite` removes; "
                "choose another output"
            )


def _is_import(ledger: Ledger, path: str) -> bool:
    """Whether an input is the import of a source that is kept in this output."""
    return bool(path) and is_within(path, f"{ledger.store.url}/{INPUT}")


def remove_output(ledger: Ledger, read: str = "") -> None:
    """Remove the files that batchgen wrote there; the caller holds the lease.

    Args:
        read: the input of the next run; if it is an import in this output, it stays.

    Raises:
        InputError: ``data/``, where a run writes, contains files of others.
    """
    holdings = holdings_of(ledger, read)
    _refuse_others(ledger, holdings)
    delete_all(ledger.store, list(holdings.own))


def _refuse_others(ledger: Ledger, holdings: Holdings) -> None:
    if holdings.others:
        raise InputError(
            f"output {ledger.store.url}: batchgen did not write "
            f"{', '.join(holdings.others[:_NAMED])}; move it out of {DATA}/, or choose another "
            "output"
        )


def forget_failures(ledger: Ledger) -> None:
    """Remove the failed markers of a replaced plan."""
    delete_all(ledger.store, [f"{FAILED}/{name}" for name in ledger.store.list(FAILED)])


def _foreign(store: Store) -> Iterator[str]:
    """Names of files and folders at the top and in ``data/`` that batchgen did not write."""
    for name in _names(store, ""):
        if name == CARD and card_is_ours(store):
            continue
        if name not in (f"{DATA}/", f"{RECORDS}/"):
            yield name
    for name in _names(store, DATA):
        yield f"{DATA}/{name}"


def _names(store: Store, folder: str) -> list[str]:
    """Of files and, with a slash, of folders."""
    found = [*store.list(folder), *(f"{name}/" for name in subfolders(store, folder))]
    return [name for name in found if not is_litter(name)]


def is_litter(name: str) -> bool:
    """What operating systems leave in folders, and empty files that keep one."""
    return name.rpartition("/")[2] in _LITTER or name in _LITTER
