"""Options become a spec, errors become messages and exit codes; the group of all commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from batchgen import __version__
from batchgen.cli.echo import echo
from batchgen.errors import BatchgenError, SpecError, StopJob
from batchgen.plain_text import plain

if TYPE_CHECKING:
    from batchgen.ledger import Ledger
    from batchgen.spec import Spec

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
            vars(error)["message"] = plain(error.message)
            error.show()
            sys.exit(1)
        except StopJob as error:
            _fail(str(error), error.exit_code)
        except BatchgenError as error:
            _fail(str(error), 3)


def _fail(message: str, exit_code: int) -> None:
    echo(f"batchgen: {message}", err=True)
    sys.exit(exit_code)


def storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option ``--storage-option`` of commands that are given no spec."""
    return click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="PROTOCOL.OPTION=VALUE",
        help="How the store is reached, e.g. s3.profile=work; as in the spec's storage_options.",
    )(command)


def shards_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--shards",
        metavar="A:B",
        help="Make only these shards of the plan, from A up to but not with B; other runs may make "
        "the others at the same time.",
    )(command)


def parse_storage_options(given: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Protocol -> options, checked as those of a spec are.

    Raises:
        SpecError: not of the form, or a secret that is written down.
    """
    import yaml

    from batchgen.spec import check_options, merge

    dotted: dict[str, Any] = {}
    for one in given:
        field, mark, value = one.partition("=")
        if not mark or "." not in field:
            raise SpecError("--storage-option", field, "PROTOCOL.OPTION=VALUE")
        dotted[field.strip()] = yaml.safe_load(value)
    options: dict[str, dict[str, Any]] = merge({}, dotted)
    check_options(options)
    return options


def open_ledger(output: str, storage_options: tuple[str, ...]) -> Ledger:
    """The ledger of an output that is reached by these options."""
    from batchgen.ledger import Ledger
    from batchgen.storage import configure, open_store

    configure(parse_storage_options(storage_options))
    return Ledger(open_store(output))


@click.group(cls=Commands, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="batchgen")
def main() -> None:
    """Make images by the million with latent diffusion models, exactly once each.

    Rows of Parquet (prompts, conditioning images) go in; images and metadata come out as committed
    shards. A run that was interrupted is resumed; `verify` proves from storage that nothing is lost
    or doubled.
    """
