"""Commands for outputs and stores: doctor, clean, export, push."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click

from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import main, open_ledger, spec_options, storage_option

if TYPE_CHECKING:
    from batchgen.cli.machine import Check
    from batchgen.output.ledger import Ledger
    from batchgen.output.restrict import Chosen
    from batchgen.output.sign import ImageSigner
    from batchgen.spec.spec import Spec


@main.command()
@partial(spec_options, required=False, reads="look")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def doctor(spec: Spec | None, as_json: bool) -> int:
    """Check this machine, or test what a job needs before it runs.

    Without a job it checks versions, GPUs, free space, and whether Ray's token, ports and folders
    are open to others. With a job it checks the input, the first rows, the model and the output,
    where it writes, reads, lists and deletes one small object. Exits 1 if a check failed; warnings
    do not count.

    \b
    batchgen doctor
    batchgen doctor --input prompts.parquet --output s3://bucket/images
    """
    checks = []
    for check in _checks(spec):
        checks.append(check)
        if not as_json:
            echo(f"{check.grade:<8} {check.name}: {check.message}")
    if as_json:
        echo_json([asdict(check) for check in checks])
    return 1 if any(check.grade == "failed" for check in checks) else 0


def _checks(spec: Spec | None) -> Iterator[Check]:
    if spec is None:
        from batchgen.cli.machine import look_round

        return look_round()
    from batchgen.cli import doctor as tries
    from batchgen.spec.places import anywhere, reach_stores

    reach_stores(spec)
    return tries.examine(anywhere(spec))


@main.command()
@click.argument("output")
@storage_option
@click.option("--dry-run", is_flag=True, help="Show what would be deleted; delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def clean(output: str, storage_options: tuple[str, ...], dry_run: bool, as_json: bool) -> int:
    """Delete unfinished uploads and temporary files of crashed runs in OUTPUT.

    It only touches OUTPUT/data and OUTPUT/_batchgen, and only while no run is working on OUTPUT.
    """
    from batchgen.output.clean import clean as remove

    cleaned = remove(open_ledger(output, storage_options), dry_run)
    if as_json:
        echo_json(asdict(cleaned))
        return 0
    verb = "would remove" if dry_run else "removed"
    for name in cleaned.uploads:
        echo(f"{verb} the unfinished upload of {name}")
    echo(
        f"{verb} {len(cleaned.uploads)} unfinished uploads and "
        f"{len(cleaned.temporary_files)} temporary files"
    )
    return 0


@main.command()
@click.argument("output")
@click.argument("target")
@click.option("--format", "form", metavar="FORMAT", help="The copy's output.format.")
@click.option("--to", metavar="LAYOUT", help="Write a dataset: coco, yolo, voc or mask-png.")
@click.option(
    "--void",
    metavar="CHOICE",
    help="With --to: what happens to images whose labels are void: skip (leave them out), empty "
    "(images without objects) or refuse. [default: skip]",
)
@click.option("--segments", is_flag=True, help="With --to yolo: polygons instead of boxes.")
@click.option("--selection", help="Only the samples of this selection (`batchgen select`).")
@click.option(
    "--sign",
    metavar="CERT.pem",
    help="With --format: sign each image with C2PA by this certificate and its issuers (PEM).",
)
@click.option("--key", metavar="KEY.pem", help="With --sign: the certificate's private key (PEM).")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def export(
    output: str,
    target: str,
    form: str | None,
    to: str | None,
    void: str | None,
    segments: bool,
    selection: str | None,
    sign: str | None,
    key: str | None,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Copy the finished OUTPUT to TARGET in another format; no image is generated again.

    With --format, TARGET is an output as OUTPUT is one. With --to, it is a dataset of images and
    their labels, for the programs that read COCO, YOLO, Pascal VOC, or label masks. If it is
    interrupted, repeat the command: it continues where it stopped.

    \b
    batchgen export out/images out/tars --format webdataset
    batchgen export out/images out/coco --to coco
    batchgen export out/images out/signed --format parquet --sign chain.pem --key key.pem
    """
    if (form is None) == (to is None):
        raise click.UsageError("one of --format and --to is needed")
    if (sign is None) != (key is None):
        raise click.UsageError("--sign and --key need each other")
    if sign is not None and form is None:
        raise click.UsageError("--sign needs --format")
    source = open_ledger(output, storage_options)
    if to is not None:
        chosen = _chosen(source, selection)
        return _export_labels(source, target, to, void or "skip", segments, chosen, as_json)
    if void is not None or segments:
        raise click.UsageError("--void and --segments need --to")
    chosen = _chosen(source, selection)
    return _export_copy(source, target, str(form), chosen, _signer(source, sign, key), as_json)


def _signer(source: Ledger, certificate: str | None, key: str | None) -> ImageSigner | None:
    """What signs the images of a copy; None without a certificate."""
    if certificate is None or key is None:
        return None
    from batchgen.output.sign import open_signer

    return open_signer(certificate, key, source.require_plan().spec.output.image_format)


def _chosen(source: Ledger, name: str | None) -> Chosen | None:
    """The samples of a selection; None without one."""
    if name is None:
        return None
    from batchgen.curate.selection import selected_keys
    from batchgen.output.restrict import Chosen

    return Chosen(name, selected_keys(source, source.parts(), name))


def _export_copy(
    source: Ledger,
    target: str,
    form: str,
    chosen: Chosen | None,
    signer: ImageSigner | None,
    as_json: bool,
) -> int:
    from batchgen.curate.score_sets import copy_scores
    from batchgen.engine.interrupt import interruptible
    from batchgen.output.export import export as write_again
    from batchgen.output.ledger import Ledger
    from batchgen.progress.display import Tally
    from batchgen.report.finalize import finalize
    from batchgen.storage import open_store

    ledger = Ledger(open_store(target))
    with interruptible():
        shards = write_again(source, ledger.store, form, chosen, signer)
        sets = copy_scores(source, ledger)
    parts = ledger.parts()
    outcome = finalize(parts, ledger, Tally(parts.shards, parts.samples))
    if as_json:
        echo_json({**asdict(outcome), "written_now": shards, "score_sets": sets})
    else:
        scores = f"; score sets: {', '.join(sets)}" if sets else ""
        echo(f"{shards} shards written now; {outcome.message}{scores}")
    return outcome.exit_code


def _export_labels(
    source: Ledger,
    target: str,
    to: str,
    void: str,
    segments: bool,
    chosen: Chosen | None,
    as_json: bool,
) -> int:
    from batchgen.engine.interrupt import interruptible
    from batchgen.output.datasets.choose import export_to
    from batchgen.storage import open_store

    with interruptible():
        totals = export_to(source, open_store(target), to, void, segments, chosen)
    if as_json:
        echo_json(totals.to_json())
    else:
        told = totals.text(with_objects=to != "mask-png")
        echo(f"{totals.written_now} shards written now; {told}")
    return 0


@main.command()
@click.argument("output")
@click.option("--to", required=True, metavar="hf://datasets/USER/NAME", help="The dataset.")
@click.option("--private", is_flag=True, help="Create it as private; refuse a public one.")
@click.option("--revision", default="main", metavar="BRANCH", help="A branch. [default: main]")
@click.option("--message", metavar="TEXT", help="The message of the commits.")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def push(
    output: str,
    to: str,
    private: bool,
    revision: str,
    message: str | None,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Upload the finished OUTPUT to a dataset on the Hugging Face Hub.

    It uploads the data files, the contact sheet, and the dataset card last. The dataset is created
    if there is none. Log in with `hf auth login`, or set HF_TOKEN. If it is interrupted, repeat the
    command: files that are there are not uploaded again.

    \b
    batchgen push out/images --to hf://datasets/USER/NAME --private
    """
    from batchgen.engine.interrupt import interruptible
    from batchgen.output.push import MESSAGE
    from batchgen.output.push import push as upload

    source = open_ledger(output, storage_options)
    with interruptible():
        pushed = upload(source, to, private, revision, message or MESSAGE, partial(echo, err=True))
    if as_json:
        echo_json(asdict(pushed))
    else:
        echo(pushed.text())
    return 0
