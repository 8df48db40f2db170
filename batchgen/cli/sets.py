"""Commands about sets of images: find copies and leaks, mix real and synthetic images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import main, open_ledger, storage_option

if TYPE_CHECKING:
    from batchgen.curate.copies import Compared, Copies

FAILS = ("copies", "leaks", "memorised", "source-copies")
_KINDS = {"leaks": "leak", "memorised": "memorised", "source-copies": "source_copy"}
_SAID = {
    "leak": ("leaks", "held-out images"),
    "memorised": ("memorised", "training images"),
    "source_copy": ("sources", "images that the run read"),
}


@main.command()
@click.argument("output")
@click.option(
    "--against",
    multiple=True,
    metavar="SET",
    help="A held-out set that no sample may copy: Parquet, a folder, an output; or `input`, the "
    "images that the run read. May be repeated.",
)
@click.option("--training", metavar="SET", help="The images that the generator was trained on.")
@click.option("--name", default="copies", show_default=True, help="Name of the score set.")
@click.option(
    "--distance", type=int, metavar="BITS", help="Most bits in which hashes differ. [default: 8]"
)
@click.option(
    "--likeness",
    type=float,
    metavar="CORRELATION",
    help="Least correlation of the pixels. [default: 0.992]",
)
@click.option(
    "--similarity",
    type=float,
    metavar="COSINE",
    help="Also compare the embeddings of the output; the least cosine.",
)
@click.option("--approximate", is_flag=True, help="With --similarity: by an index of faiss.")
@click.option("--keep-by", metavar="COLUMN", help="Of copies, the highest stays; default: by key.")
@click.option("--lowest", is_flag=True, help="With --keep-by: the lowest stays.")
@click.option("--mirrored", is_flag=True, help="A mirrored image is a copy as well.")
@click.option(
    "--rejected-limit",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Fraction of the images of a set that may be unreadable.",
)
@click.option(
    "--fail-on",
    type=click.Choice(FAILS),
    multiple=True,
    help="Exit with 2 if there are any of these. May be repeated.",
)
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def copies(
    output: str,
    against: tuple[str, ...],
    training: str | None,
    name: str,
    distance: int | None,
    likeness: float | None,
    similarity: float | None,
    approximate: bool,
    keep_by: str | None,
    lowest: bool,
    mirrored: bool,
    rejected_limit: float,
    fail_on: tuple[str, ...],
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Find copies in OUTPUT, and copies of held-out, training or source images.

    The images are read once and nothing is removed. The result is a score set, so that
    `select --where "not is_copy"` leaves the copies out. Exits 0 whatever was found, or 2 with
    --fail-on.

    \b
    batchgen copies out/images
    batchgen copies out/images --against test.parquet --training train.parquet
    """
    from batchgen.curate.copies import DISTANCE, LIKENESS, Ask, find_copies

    ask = Ask(
        name=name,
        against=against,
        training=training,
        distance=DISTANCE if distance is None else distance,
        likeness=LIKENESS if likeness is None else likeness,
        similarity=similarity,
        keep_by=keep_by,
        lowest=lowest,
        mirrored=mirrored,
        approximate=approximate,
        bad_limit=rejected_limit,
    )
    ledger = open_ledger(output, storage_options)
    found = find_copies(ledger, ask, lambda text: None if as_json else echo(text, err=True))
    if as_json:
        echo_json(found.to_json())
    else:
        echo("\n".join(copies_lines(found, output)))
    failed = [one for one in fail_on if found.count(_KINDS.get(one, "copy"))]
    return 2 if failed else 0


def copies_lines(found: Copies, output: str) -> list[str]:
    """What was found, set by set, and the next command."""
    lines = [
        f"samples    {found.samples:,}",
        f"copies     {found.copies:,}, of {found.groups:,} samples that stay; {found.exact:,} with "
        "equal pixels",
    ]
    for one in found.compared:
        lines += _compared_lines(one)
    if found.calibration:
        told = ", ".join(f"{share}: {bits}" for share, bits in found.calibration.items())
        lines.append(
            "distances  bits from held-out images to their nearest training image, by quantile: "
            f"{told}"
        )
    lines += [f"note       {note}" for note in found.notes]
    where = " and ".join(["not is_copy", *_conditions(found)])
    command = f'batchgen select {output} --name no-copies --where "{where}"'
    return [*lines, f"stored     score set {found.name}", f"next       {command}"]


def _compared_lines(one: Compared) -> list[str]:
    name, what = _SAID[one.kind]
    left = f" ({one.left_out:,} rows of other splits left out)" if one.left_out else ""
    lines = [
        f"{name:<10} {one.found:,} samples are copies of {what}, {one.exact:,} with equal pixels: "
        f"{one.place}, {one.images:,} images{left}"
    ]
    for reason, count in one.unread.items():
        lines.append(f"  {count:,} unreadable: {reason}")
    lines += [f"  such as {key}: {message}" for key, message in one.examples]
    return lines


def _conditions(found: Copies) -> list[str]:
    kinds = dict.fromkeys(one.kind for one in found.compared if one.kind != "source_copy")
    return ["not is_memorised" if kind == "memorised" else f"not is_{kind}" for kind in kinds]


@main.command()
@click.argument("target")
@click.option("--real", required=True, metavar="SET", help="The real images, with classes.")
@click.option(
    "--synthetic",
    multiple=True,
    required=True,
    metavar="OUTPUT[:SELECTION]",
    help="An output, or the samples of one of its selections. May be repeated.",
)
@click.option("--ratio", type=float, help="Synthetic images for each real one, in each class.")
@click.option("--count", type=int, help="Synthetic images of each class. [default: all]")
@click.option("--per", default="label", show_default=True, help="Column that makes groups.")
@click.option(
    "--replace-probability",
    type=float,
    default=0.0,
    help="Replace a real image by a synthetic one with this probability in each epoch.",
)
@click.option("--soft-labels", is_flag=True, help="Give each row the probabilities of all classes.")
@click.option("--gamma", type=float, default=1.0, help="Own class: strength to this power.")
@click.option("--source-label", metavar="COLUMN", help="The class of a sample's source image.")
@click.option("--soft-label-column", metavar="COLUMN", help="A column with the probabilities.")
@click.option(
    "--held-out",
    multiple=True,
    metavar="SET",
    help="Leave out images of this set and near copies of them. May be repeated.",
)
@click.option("--weight", type=float, default=1.0, help="Weight of a synthetic image.")
@click.option("--allow-fewer", is_flag=True, help="Take what there is, if it is less than asked.")
@click.option("--materialise", metavar="FORMAT", help="Also write the images: an output format.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the choice.")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def mix(
    target: str,
    real: str,
    synthetic: tuple[str, ...],
    ratio: float | None,
    count: int | None,
    per: str,
    replace_probability: float,
    soft_labels: bool,
    gamma: float,
    source_label: str | None,
    soft_label_column: str | None,
    held_out: tuple[str, ...],
    weight: float,
    allow_fewer: bool,
    materialise: str | None,
    seed: int,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Write a training set of real and synthetic images to the folder TARGET.

    It has a manifest (Parquet, one row for each image), a record, a card, and with --materialise
    the images. Rows of held-out splits and near copies of held-out images are left out, and listed
    in left-out.parquet.

    \b
    batchgen mix out/mix --real train.parquet --synthetic out/images:bright --ratio 3
    batchgen mix out/mix --real train.parquet --synthetic out/images --held-out test.parquet
    """
    from batchgen.cli.options import parse_storage_options
    from batchgen.curate.mix import plan_mix
    from batchgen.curate.mix_files import check_target, record_of, write_mix
    from batchgen.curate.mix_set import Mix
    from batchgen.storage import absolute, configure, open_store

    configure(parse_storage_options(storage_options))
    asked = Mix(
        real=real,
        synthetic=synthetic,
        ratio=ratio,
        count=count,
        per=per,
        replace_probability=replace_probability,
        soft_labels=soft_labels,
        gamma=gamma,
        soft_column=soft_label_column,
        source_label=source_label,
        held_out=held_out,
        weight=weight,
        allow_fewer=allow_fewer,
        seed=seed,
    )
    store = open_store(target if "://" in target else absolute(target))
    made = plan_mix(
        asked,
        lambda text: None if as_json else echo(text, err=True),
        lambda sources: check_target(sources, store, materialise),
    )
    write_mix(made, store, materialise)
    record = record_of(made, materialise)
    if as_json:
        echo_json(record)
        return 0
    for name, counts in record["counts"].items():
        told = ", ".join(f"{label} {number:,}" for label, number in list(counts.items())[:10])
        echo(f"{name:<12} {sum(counts.values()):,} images: {told}")
    for reason, number in record["left_out"].items():
        echo(f"left out     {number:,} {reason}")
    for name, (has, wanted) in record["short"].items():
        echo(f"fewer        {name}: {has:,} of {wanted:,}")
    for place, number in record["unread_held_out"].items():
        echo(f"unreadable   {number:,} held-out images of {place}")
    for label in record["only_real"]:
        echo(f"only real    {label}: no synthetic image")
    echo(f"written      {store.url}: {record['rows']:,} rows")
    return 0
