"""What lies at an output's place: nothing, an output of batchgen, or other things, which stay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from batchgen.errors import InputError
from batchgen.output.lease import LEASES
from batchgen.output.ledger import DATA, FAILED, JOB, PLAN, RECORDS, REJECTS, SHARDS, Ledger
from batchgen.spec.spec import Spec
from batchgen.storage import TEMPORARY, Store, delete_all, is_within, subfolders

CARD = "README.md"
CARD_MARK = "<!-- Each batchgen run replaces this file; without this line it stays as it is. -->\n"
_FIRST_CARDS = b"\n# Synthetic images made with batchgen "  # of version 0.1, which had no mark
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep", ".keep", "lost+found/", ".nfs"}
_DATA_FILE = re.compile(
    rf"{DATA}/(train-\d{{5,}}-of-\d{{5,}}\.parquet|\d{{5,}}\.tar|[^/]+/\d{{5,}}/[^/]+)"
)
_NAMED = 4


@dataclass(frozen=True)
class Holdings:
    """Files of an output: name -> size in bytes of batchgen's own, and names of others' in data."""

    own: dict[str, int]
    others: tuple[str, ...]


def is_our_card(text: bytes) -> bool:
    return CARD_MARK.strip().encode() in text or _FIRST_CARDS in text


def card_is_ours(store: Store) -> bool:
    """There is no README.md at the output, or one that batchgen wrote."""
    try:
        return is_our_card(store.read(CARD))
    except FileNotFoundError:
        return True


def is_output(ledger: Ledger) -> bool:
    """A run has been there: it has left its plan, its order or a marker."""
    names = ledger.store.list(RECORDS)
    wanted = {PLAN.rpartition("/")[2], JOB.rpartition("/")[2]}
    return bool(wanted & names.keys()) or bool(ledger.store.list(SHARDS))


def anything_made(ledger: Ledger) -> bool:
    """There is a marker, a data file or a file of rejects."""
    store = ledger.store
    return bool(store.list(SHARDS) or store.list(REJECTS) or _names(store, DATA))


def refuse_unless_free(ledger: Ledger) -> None:
    """A new output may begin in an empty folder, or where one has its plan.

    What operating systems leave in folders (``.DS_Store`` and such) does not count.

    Raises:
        InputError: other things lie there, or results without their plan; names them.
    """
    store = ledger.store
    if PLAN.rpartition("/")[2] in store.list(RECORDS):
        return
    markers = [name for name in store.list(SHARDS) if name.endswith(".json")]
    if markers or store.list(REJECTS):
        raise InputError(
            f"output {store.url} holds {len(markers)} committed shards, but no {PLAN} that says "
            "what they were made from; put that file back, name another output, or start anew "
            "with `batchgen run --overwrite`"
        )
    others = sorted(_foreign(store))
    if others:
        more = f" and {len(others) - _NAMED} more" if others[_NAMED:] else ""
        raise InputError(
            f"output {store.url} is not empty and holds no output of batchgen: it has "
            f"{', '.join(others[:_NAMED])}{more}; name a new folder or an empty one"
        )


def holdings_of(ledger: Ledger) -> Holdings:
    """All that `--overwrite` removes, in the order in which it does, and what lies between it.

    A shard loses its marker before its data, and the plan goes last: if it is interrupted, what is
    left is no output that looks whole.
    """
    store = ledger.store
    if not is_output(ledger):
        return Holdings({}, ())
    data = {f"{DATA}/{name}": size for name, size in store.find(DATA).items()}
    own_data = {name for name in data if _DATA_FILE.fullmatch(name)}
    kept = (f"{LEASES}/", f"{TEMPORARY}/")
    records = {f"{RECORDS}/{name}": size for name, size in store.find(RECORDS).items()}
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
    """See before any work that ``remove_output`` will do, and takes nothing that is needed.

    Raises:
        InputError: it would not, or the input or the model lies in the output.
    """
    if not is_output(ledger):
        refuse_unless_free(ledger)
    _refuse_others(ledger, holdings_of(ledger))
    for field, place in (("input", spec.input.path), *spec.model.places()):
        if place and is_within(place, ledger.store.url):
            raise InputError(
                f"{field} {place} lies in output {ledger.store.url}, which `--overwrite` removes; "
                "name another output"
            )


def remove_output(ledger: Ledger) -> None:
    """Remove what batchgen has made there; the caller holds the lease.

    Raises:
        InputError: other things lie in ``data``, where a run's files are to be.
    """
    holdings = holdings_of(ledger)
    _refuse_others(ledger, holdings)
    delete_all(ledger.store, list(holdings.own))


def _refuse_others(ledger: Ledger, holdings: Holdings) -> None:
    if holdings.others:
        raise InputError(
            f"output {ledger.store.url}: {', '.join(holdings.others[:_NAMED])} in {DATA} is not "
            "batchgen's; move it away, or name another output"
        )


def forget_failures(ledger: Ledger) -> None:
    """Remove the failed markers of a plan that is replaced."""
    delete_all(ledger.store, [f"{FAILED}/{name}" for name in ledger.store.list(FAILED)])


def _foreign(store: Store) -> Iterator[str]:
    """What lies at the top or in ``data`` and is not batchgen's."""
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
