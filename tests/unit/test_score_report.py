"""The report shows score sets with histograms, and selections; a later run keeps them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa

from batchgen.curate.score_sets import store_scores
from batchgen.curate.selection import Query, select
from batchgen.curate.summary import show_scores, show_selections
from batchgen.output.ledger import Ledger
from batchgen.output.tally import Tally
from batchgen.report.finalize import finalize
from batchgen.report.scores import BINS, PAGE, histogram, read_summary
from batchgen.stages.scorers.scorer import ScoreColumn
from tests.unit.test_score_sets import HASH, TWICE, VECTOR, keys, stored
from tests.unit.test_selection import COUNT, output_of


def page_of(ledger: Ledger) -> str:
    return ledger.store.read(PAGE).decode()


def finished(tmp_path: Path) -> Ledger:
    ledger = output_of(tmp_path)
    parts = ledger.parts()
    finalize(parts, ledger, Tally(parts.shards, parts.samples))
    return ledger


def test_the_report_shows_scores_and_selections(tmp_path: Path) -> None:
    ledger = finished(tmp_path)
    assert "<h2>Score sets</h2>" not in page_of(ledger)
    stored(ledger, "numbers", TWICE, HASH, VECTOR)
    agrees = ScoreColumn("agrees", pa.bool_(), "half < of them & more")
    some = pa.table({"key": keys(ledger), "agrees": [True, False, None] * 4})
    store_scores(ledger, "classes", some, [agrees], "f")
    select(ledger, ledger.parts(), "high", Query("twice >= 14"))
    show_scores(ledger)
    page = page_of(ledger)
    assert page.count("<svg") == 2  # no histogram of hashes and vectors
    assert "half &lt; of them &amp; more" in page and "4 without a value" in page
    assert "where twice &gt;= 14" in page and "3 of 3 shards scored" in page
    HTMLParser().feed(page)

    parts = ledger.parts()  # another run writes the page anew
    finalize(parts, ledger, Tally(parts.shards, parts.samples))
    assert page_of(ledger).count("<svg") == 2


def test_a_distribution_adds_up_by_label(tmp_path: Path) -> None:
    ledger = finished(tmp_path)
    stored(ledger, "numbers", TWICE)
    show_scores(ledger)
    ((one,),) = [found.distributions for found in read_summary(ledger).sets]
    assert (one.low, one.high, one.missing, sum(one.counts)) == (0, 22, 0, COUNT)
    assert {label: sum(counts) for label, counts in one.labels.items()} == {"cat": 4, "dog": 4}
    assert len(one.counts) == BINS
    drawn = histogram(one)
    assert len(re.findall("<polyline", drawn)) == 2 and "nan" not in drawn


def test_a_selection_that_is_stale_is_shown_so(tmp_path: Path) -> None:
    ledger = finished(tmp_path)
    select(ledger, ledger.parts(), "high", Query("number >= 7"))
    ledger.withdraw(2)
    show_selections(ledger)
    assert "stale: the output had 3 shards, now it has 2" in page_of(ledger)


def test_scores_that_are_all_equal_or_missing_are_shown(tmp_path: Path) -> None:
    ledger = finished(tmp_path)
    count = len(keys(ledger))
    columns = [ScoreColumn(name, pa.float64(), name) for name in ("same", "none", "odd")]
    odd = [float("nan"), float("inf"), 1.0, 2.0] * (count // 4)
    values = {"same": [1.5] * count, "none": pa.array([None] * count, pa.float64()), "odd": odd}
    store_scores(ledger, "flat", pa.table({"key": keys(ledger), **values}), columns, "f")
    show_scores(ledger)
    ((same, other),) = [found.distributions for found in read_summary(ledger).sets]
    assert (same.counts[0], same.missing) == (count, 0)
    assert (other.column, other.missing, sum(other.counts)) == ("odd", 6, 6)
