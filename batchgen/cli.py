"""The command line: options become a spec, errors become messages and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from batchgen import __version__
from batchgen.errors import BatchgenError, SpecError, StopJob

if TYPE_CHECKING:
    from batchgen.plan import Plan
    from batchgen.runner import Outcome
    from batchgen.spec import Spec
    from batchgen.tasks import Task

EXIT_CODES = """
Exit codes: 0 complete; 1 usage or spec; 2 finished with failed samples, or with more rejected than
the policy allows; 3 interrupted, resumable; 4 verification failed.
"""

# Flag -> (dotted field of the spec, type, help). Flags win over the spec file.
FIELDS: dict[str, tuple[str, Any, str]] = {
    "--input": ("input.path", str, "Parquet file, folder or glob; any fsspec URL."),
    "--count": ("input.count", int, "Instead of --input: so many rows that carry nothing."),
    "--output": ("output.url", str, "Folder or URL for images, metadata and the run's ledger."),
    "--task": ("task", str, "See `batchgen tasks`. [default: text-to-image]"),
    "--model": ("model.path", str, "Shipped model, folder, hub id, URL. [default: digits-shapes]"),
    "--revision": ("model.revision", str, "Hub revision (branch, tag or commit)."),
    "--dtype": ("model.dtype", str, "float32 (default), float16 or bfloat16."),
    "--scheduler": ("model.scheduler", str, "A diffusers scheduler class; default: the model's."),
    "--prompt-column": ("input.columns.prompt", str, "[default: prompt]"),
    "--negative-prompt-column": ("input.columns.negative_prompt", str, ""),
    "--class-column": ("input.columns.class_label", str, "Class numbers or names."),
    "--mask-column": ("input.columns.mask", str, "Masks for inpainting; white is repainted."),
    "--control-column": ("input.columns.control", str, "Control images."),
    "--image-column": ("input.columns.image", str, "Image bytes or Hugging Face image structs."),
    "--key-column": ("input.columns.key", str, "Unique names of the rows; default: file and row."),
    "--label-column": ("input.columns.label", str, "Carried to the output as `label`."),
    "--steps": ("sampling.num_inference_steps", int, "Default: what the model recommends."),
    "--guidance-scale": ("sampling.guidance_scale", float, "Default: what the model recommends."),
    "--strength": ("sampling.strength", float, "Image-to-image: share of noise. [default: 0.6]"),
    "--width": ("sampling.width", int, "Pixels. Default: the model's own size."),
    "--height": ("sampling.height", int, "Pixels. Default: the model's own size."),
    "--variants": ("variants", int, "Images made from each row. [default: 1]"),
    "--seed": ("seed", int, "Run seed; each sample's own is derived from it and its key."),
    "--batch-size": ("resources.batch_size", int, "Fixed micro-batch size. [default: 8]"),
    "--samples-per-shard": ("output.samples_per_shard", int, "[default: 64]"),
    "--image-format": ("output.image_format", str, "png (default), jpeg or webp."),
    "--layout": ("resources.layout", str, "fused (default) or staged."),
    "--limit": ("input.limit", int, "Only the first rows of the dataset."),
}


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make a spec; the command receives it as ``spec``."""

    @wraps(command)
    def with_spec(
        spec_file: str | None, settings: tuple[str, ...], no_key_check: bool, **given: Any
    ) -> Any:
        flags = {flag: given.pop(_parameter(flag)) for flag in FIELDS}
        return command(spec=_spec(spec_file, flags, settings, no_key_check), **given)

    wrapped: Callable[..., Any] = with_spec
    wrapped = click.option(
        "--no-key-check",
        is_flag=True,
        help="Do not read the key column while planning; `verify` then finds duplicates.",
    )(wrapped)
    wrapped = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Any other field, e.g. --set policy.shard_retries=3; the value is YAML.",
    )(wrapped)
    for flag, (field, kind, text) in reversed(FIELDS.items()):
        wrapped = click.option(
            flag, _parameter(flag), type=kind, default=None, help=text or f"Sets {field}."
        )(wrapped)
    return click.argument("spec_file", required=False, metavar="[SPEC.yaml]")(wrapped)


def _parameter(flag: str) -> str:
    return "flag_" + flag.strip("-").replace("-", "_")


def _spec(
    spec_file: str | None, flags: dict[str, Any], settings: tuple[str, ...], no_key_check: bool
) -> Spec:
    import yaml

    from batchgen.spec import build, merge, read_yaml

    dotted: dict[str, Any] = {}
    for setting in settings:
        field, mark, value = setting.partition("=")
        if not mark:
            raise SpecError("--set", setting, "FIELD=VALUE")
        try:
            dotted[field.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SpecError(f"--set {field}", value, "a YAML value") from error
    for flag, value in flags.items():
        if value is not None:
            dotted[FIELDS[flag][0]] = value
    if no_key_check:
        dotted["input.check_keys"] = False
    tree = read_yaml(spec_file) if spec_file else {}
    return build(merge(tree, dotted))


class Commands(click.Group):
    """Turns errors into one message on stderr and the exit code that fits."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            return sys.exit(super().main(*args, **kwargs) or 0)
        except click.exceptions.Abort:
            _fail("interrupted", 3)
        except click.ClickException as error:
            error.show()
            sys.exit(1)
        except StopJob as error:
            _fail(str(error), error.exit_code)
        except BatchgenError as error:
            _fail(str(error), 3)


def _fail(message: str, exit_code: int) -> None:
    click.echo(f"batchgen: {message}", err=True)
    sys.exit(exit_code)


@click.group(cls=Commands, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="batchgen")
def main() -> None:
    """Make images by the million with latent diffusion models, exactly once each.

    Rows of Parquet (prompts, conditioning images) go in; images and metadata come out as committed
    shards. A run that was interrupted is resumed; `verify` proves from storage that nothing is lost
    or doubled.
    """


@main.command()
@spec_options
@click.option("--address", help="Ray cluster to join; default: Ray on this machine.")
@click.option("--dry-run", is_flag=True, help="Plan and show, make nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON on stdout.")
def run(spec: Spec, address: str | None, dry_run: bool, as_json: bool) -> int:
    """Plan and make everything that is not yet committed.

    Settings come from SPEC.yaml, from flags, or from both (flags win). Run again on the same
    output, it goes on where it was.

    \b
    batchgen run --input prompts.parquet --output out/images --variants 4
    """
    if dry_run:
        _show_plan(spec, as_json)
        return 0
    from batchgen import runner

    return _finish(lambda: runner.run(spec, address, quiet=as_json), spec.output.url, as_json)


@main.command()
@click.argument("output")
@click.option("--address", help="Ray cluster to join; default: Ray on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON on stdout.")
def resume(output: str, address: str | None, as_json: bool) -> int:
    """Go on with the job whose OUTPUT (folder or URL) this is; failed shards are tried again."""
    from batchgen import runner

    return _finish(lambda: runner.resume(output, address, quiet=as_json), output, as_json)


@main.command()
@spec_options
@click.option("--print-spec", is_flag=True, help="Print the spec with every default filled in.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(spec: Spec, print_spec: bool, as_json: bool) -> int:
    """Show what a run would make, from the inputs' footers; writes nothing."""
    if print_spec:
        from batchgen import runner

        click.echo(runner.plan_job(spec).spec.to_yaml(), nl=False)
    else:
        _show_plan(spec, as_json)
    return 0


@main.command()
@click.argument("name", required=False)
def tasks(name: str | None) -> None:
    """List the tasks and the columns of their rows, or explain the one of that NAME.

    \b
    batchgen tasks
    batchgen tasks inpainting
    """
    from batchgen import explain

    click.echo(explain.task_page(_task(name)) if name else explain.tasks_table())


@main.group()
def models() -> None:
    """Models to try things with."""


@models.command("make-tiny")
@click.argument("task")
@click.argument("folder")
@click.option("--family", help="Which of the task's model families; default: the first.")
def make_tiny(task: str, folder: str, family: str | None) -> None:
    """Write a tiny model with random weights for TASK to FOLDER.

    It makes noise, in a second, by the same code as a real model of its family: to try a spec or a
    cluster with before there are gigabytes to load.

    \b
    batchgen models make-tiny super-resolution models/tiny-upscaler
    """
    from batchgen import explain

    found = _task(task)
    known = [one.name for one in explain.families_of(found)]
    if family not in (None, *known):
        raise SpecError("--family", family, ", ".join(known))
    made = explain.make_tiny(found, family or known[0], folder)
    click.echo(f"a tiny {family or known[0]} model for {task}: {made}")


def _task(name: str) -> Task:
    from batchgen.errors import nearest
    from batchgen.tasks import TASK_NAMES, task_named

    if name not in TASK_NAMES:
        raise SpecError("task", name, f"{', '.join(TASK_NAMES)}{nearest(name, TASK_NAMES)}")
    return task_named(name)


@main.command()
@click.argument("output")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(output: str, as_json: bool) -> int:
    """Show how far the job in OUTPUT (folder or URL) is, from storage alone.

    Exits 0 when the job is complete, 2 when shards or samples failed, 3 while shards are pending.
    """
    from batchgen import runner
    from batchgen.ledger import Ledger
    from batchgen.storage import open_store

    ledger = Ledger(open_store(output))
    frozen = ledger.require_plan()
    states = ledger.states(frozen)
    tally = runner.tally_of(frozen, ledger, states)
    exit_code, message = runner.verdict(frozen, tally)
    pending = frozen.shards - tally.committed - tally.failed_shards
    facts = {
        "output": output,
        "shards": frozen.shards,
        "committed": tally.committed,
        "failed_shards": tally.failed_shards,
        "pending": pending,
        "planned": frozen.samples,
        "accepted": tally.accepted,
        "rejected": tally.rejected,
        "failed": tally.failed,
        "exit_code": exit_code,
        "message": message,
    }
    if as_json:
        click.echo(json.dumps(facts))
    else:
        click.echo(
            f"shards   {tally.committed} of {frozen.shards} committed, "
            f"{tally.failed_shards} failed, {pending} pending\n"
            f"samples  {frozen.samples} planned, {tally.accepted} accepted, "
            f"{tally.rejected} rejected, {tally.failed} failed\n{message}"
        )
        for failure in ledger.failures(sorted(states.failed)[:10]):
            click.echo(f"failed   shard {failure.shard}: {failure.error}: {failure.message}")
    return exit_code


@main.command()
@click.argument("output")
@click.option("--quick", is_flag=True, help="Compare listings and markers; do not read the images.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def verify(output: str, quick: bool, as_json: bool) -> int:
    """Prove from storage that every planned sample of OUTPUT is there once, or has its reason."""
    from batchgen import verify as checks
    from batchgen.ledger import Ledger
    from batchgen.storage import open_store

    findings = checks.verify(Ledger(open_store(output)), quick=quick)
    if as_json:
        click.echo(json.dumps({**asdict(findings), "ok": findings.ok}))
    else:
        for problem in findings.problems:
            click.echo(f"problem: {problem}", err=True)
        if findings.more_problems:
            click.echo(f"problem: and {findings.more_problems} more", err=True)
        click.echo(
            f"{'verified' if findings.ok else 'NOT VERIFIED'}: planned {findings.planned} = "
            f"accepted {findings.accepted} + rejected {findings.rejected} + "
            f"failed {findings.failed}; {findings.committed} of {findings.shards} shards "
            f"committed, {findings.bytes:,} bytes"
        )
    return 0 if findings.ok else 4


def _finish(job: Callable[[], Outcome], url: str, as_json: bool) -> int:
    from batchgen.errors import Interrupted

    try:
        outcome = job()
    except Interrupted as error:
        raise Interrupted(
            f"{error}; what is committed stays, go on with `batchgen resume {url}`"
        ) from error
    if as_json:
        click.echo(json.dumps(asdict(outcome)))
    else:
        click.echo(f"{outcome.message}\nreport: {outcome.output}/_batchgen/report.html")
    return outcome.exit_code


def _source(plan: Plan) -> str:
    given = plan.spec.input
    return f"in {len(plan.files)} files of {given.path}" if given.path else "that carry nothing"


def _show_plan(spec: Spec, as_json: bool) -> None:
    from batchgen import runner

    made: Plan = runner.plan_job(spec)
    if as_json:
        click.echo(made.to_json())
        return
    calls = -(-made.spec.output.samples_per_shard // made.spec.resources.batch_size)
    click.echo(
        f"input    {made.rows} rows {_source(made)}\n"
        f"samples  {made.samples} ({spec.variants} a row) in {made.shards} shards of "
        f"{made.spec.output.samples_per_shard}, at least {calls} micro-batches of "
        f"{made.spec.resources.batch_size} each\n"
        f"model    {made.model.model_id} {made.model.revision}, {made.model.scheduler}, "
        f"{made.spec.sampling.num_inference_steps} steps, "
        f"guidance {made.spec.sampling.guidance_scale}, "
        f"{made.spec.sampling.width}x{made.spec.sampling.height}, {made.spec.model.dtype}\n"
        f"output   {spec.output.url}\n"
        f"plan     spec {made.spec.fingerprint[:12]}, input {made.input_fingerprint[:12]}, "
        f"weights {made.model.manifest_sha256[:12]}"
    )
