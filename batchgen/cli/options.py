"""The command group: turns options into a spec, and errors into messages and exit codes."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from batchgen import __version__
from batchgen.cli.direct import Reads, prepared
from batchgen.cli.echo import echo
from batchgen.errors import BatchgenError, SpecError, StopJob
from batchgen.spec.tasks import TASK_NAMES

if TYPE_CHECKING:
    from batchgen.output.ledger import Ledger
    from batchgen.spec.spec import Spec

EXIT_CODES = """
Exit codes: 0 complete; 1 usage error or invalid spec; 2 finished with failed samples, or with more
rejected samples than the policy allows; 3 interrupted, can be resumed; 4 verification failed.
"""

DEMO = "no --model: using the 32 x 32 demo model digits-shapes, which can draw digits and shapes"
DTYPES = ("auto", "float32", "float16", "bfloat16")
IMAGE_FORMATS = ("png", "jpeg", "webp")
LAYOUTS = ("fused", "staged")


class Offered(click.Choice[str]):
    """A choice for shell completion only: other values pass, and the spec refuses them."""

    def convert(self, value: Any, param: object, ctx: object) -> str:
        return str(value)


# Flag -> (dotted field of the spec, type, help). Flags win over the spec file.
FIELDS: dict[str, tuple[str, Any, str]] = {
    "--input": ("input.path", str, "Parquet, CSV, images, ... (see `import`); any fsspec URL."),
    "--count": ("input.count", int, "Number of rows to generate without an input dataset."),
    "--output": ("output.url", str, "Folder or URL for images, metadata and records of the run."),
    "--task": ("task", Offered(TASK_NAMES), "See `batchgen tasks`. [default: text-to-image]"),
    "--model": ("model.path", str, "Shipped model, folder, hub id, URL. [default: digits-shapes]"),
    "--revision": ("model.revision", str, "Hub revision (branch, tag or commit)."),
    "--dtype": ("model.dtype", Offered(DTYPES), "Precision of the model. [default: auto]"),
    "--scheduler": ("model.scheduler", str, "A diffusers scheduler class; default: the model's."),
    "--prompt-column": ("input.columns.prompt", str, "Column of prompts. [default: prompt]"),
    "--negative-prompt-column": ("input.columns.negative_prompt", str, "Negative prompts."),
    "--class-column": ("input.columns.class_label", str, "Class numbers or names."),
    "--mask-column": ("input.columns.mask", str, "Masks for inpainting; white is repainted."),
    "--control-column": ("input.columns.control", str, "Control images."),
    "--image-column": ("input.columns.image", str, "Image bytes, URIs or Hugging Face structs."),
    "--key-column": ("input.columns.key", str, "Unique names of the rows; default: file and row."),
    "--label-column": ("input.columns.label", str, "Copied to the output as `label`."),
    "--steps": ("sampling.num_inference_steps", int, "Denoising steps; default: the model's."),
    "--guidance-scale": ("sampling.guidance_scale", float, "Default: the model's."),
    "--strength": ("sampling.strength", float, "How much of the image is replaced. [default: 0.6]"),
    "--width": ("sampling.width", int, "Pixels; default: the model's own size."),
    "--height": ("sampling.height", int, "Pixels; default: the model's own size."),
    "--variants": ("variants", int, "Number of images for each row. [default: 1]"),
    "--seed": ("seed", int, "Run seed; the seed of each sample is derived from it and its key."),
    "--batch-size": ("resources.batch_size", str, "Images in a call, or auto. [default: auto]"),
    "--samples-per-shard": ("output.samples_per_shard", int, "Images in a shard. [default: 64]"),
    "--image-format": ("output.image_format", Offered(IMAGE_FORMATS), "[default: png]"),
    "--layout": ("resources.layout", Offered(LAYOUTS), "Pools of actors. [default: fused]"),
    "--limit": ("input.limit", int, "Use only the first rows of the dataset."),
    "--preset": ("preset", str, "A recipe with settings by name, see `batchgen presets`."),
}


def spec_options(
    command: Callable[..., Any], required: bool = True, reads: Reads = "keep"
) -> Callable[..., Any]:
    """Add the options that make a spec; the command receives it as ``spec``.

    If it is not ``required`` and no option is given, ``spec`` is None. An input that is not Parquet
    is imported: ``reads`` says where the import is kept (``direct.Reads``).
    """

    @wraps(command)
    def with_spec(
        spec_file: str | None, settings: tuple[str, ...], no_key_check: bool, **given: Any
    ) -> Any:
        flags = {flag: given.pop(_parameter(flag)) for flag in FIELDS}
        if not required and not any([spec_file, settings, no_key_check, *flags.values()]):
            return command(spec=None, **given)
        with ExitStack() as held:
            tree = _tree(spec_file, flags, settings, no_key_check)
            spec = _spec(prepared(tree, reads, given, held))
            return command(spec=spec, **given)

    wrapped: Callable[..., Any] = with_spec
    wrapped = click.option(
        "--no-key-check",
        is_flag=True,
        help="Do not read the key column while planning; only `verify` then finds duplicate keys.",
    )(wrapped)
    wrapped = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Set any other field, such as --set policy.shard_retries=3; the value is YAML.",
    )(wrapped)
    for flag, (field, kind, text) in reversed(FIELDS.items()):
        wrapped = click.option(
            flag, _parameter(flag), type=kind, default=None, help=text or f"Sets {field}."
        )(wrapped)
    return click.argument("spec_file", required=False, metavar="[SPEC.yaml]")(wrapped)


def _parameter(flag: str) -> str:
    return "flag_" + flag.strip("-").replace("-", "_")


def _tree(
    spec_file: str | None, flags: dict[str, Any], settings: tuple[str, ...], no_key_check: bool
) -> dict[str, Any]:
    """The spec file with the flags, not checked yet."""
    from batchgen.spec.tree import merge, read_yaml

    dotted = _parsed("--set", settings, "FIELD=VALUE")
    for flag, value in flags.items():
        if value is not None:
            dotted[FIELDS[flag][0]] = value
    if no_key_check:
        dotted["input.check_keys"] = False
    return merge(read_yaml(spec_file) if spec_file else {}, dotted)


def _spec(tree: dict[str, Any]) -> Spec:
    from batchgen.spec.build import build

    try:
        spec = build(tree)
    except SpecError as error:
        raise error.beside([], _columns_there(error, tree)) from None
    if "path" not in (tree.get("model") or {}):
        echo(DEMO, err=True)
    return spec


def _columns_there(error: SpecError, tree: dict[str, Any]) -> str:
    """If a column is missing in the spec, list those of the input, if that is a local file."""
    path = str((tree.get("input") or {}).get("path"))
    if not re.search(r"input\.columns\.\w+: got nothing", str(error)):
        return ""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return f"the columns of {path}: {', '.join(pq.read_schema(path).names)}"
    except (pa.ArrowException, OSError, ValueError):
        return ""


class Commands(click.Group):
    """Turns errors into one message on stderr and the exit code that fits."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            return sys.exit(super().main(*args, **kwargs) or 0)
        except click.exceptions.Abort:
            _fail("interrupted", 3)
        except click.ClickException as error:
            shown = io.StringIO()
            error.show(shown)
            echo(shown.getvalue(), err=True, nl=False)
            sys.exit(1)
        except StopJob as error:
            _fail(str(error), error.exit_code)
        except BatchgenError as error:
            _fail(str(error), 3)


def _fail(message: str, exit_code: int) -> None:
    echo(f"batchgen: {message}", err=True)
    sys.exit(exit_code)


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """``("steps=3",)`` -> ``{"steps": 3}``: the values of an option ``--set``, read as YAML."""
    return _parsed("--set", settings, "SETTING=VALUE")


def storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option ``--storage-option``, for commands without a spec."""
    return click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="PROTOCOL.OPTION=VALUE",
        help="How to reach the store, such as s3.profile=work; see storage_options in the spec.",
    )(command)


def shards_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--shards",
        metavar="A:B",
        help="Generate only the shards from A to B - 1 of the plan; other runs may generate other "
        "shards at the same time.",
    )(command)


def parse_storage_options(given: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Parse the values of ``--storage-option`` into protocol -> options; checked as in a spec.

    Raises:
        SpecError: a value has a wrong form, or is a secret in plain text.
    """
    from batchgen.spec.storage_section import check_options
    from batchgen.spec.tree import merge

    dotted = _parsed("--storage-option", given, "PROTOCOL.OPTION=VALUE")
    options: dict[str, dict[str, Any]] = merge({}, dotted)
    check_options(options)
    return options


def _parsed(flag: str, given: tuple[str, ...], form: str) -> dict[str, Any]:
    """Parse options of the form NAME=VALUE, with a value in YAML, into dotted name -> value."""
    from batchgen.spec.yaml_text import parse_yaml

    dotted: dict[str, Any] = {}
    for one in given:
        name, mark, value = one.partition("=")
        if not mark:  # the text is not shown, since it may be a secret
            raise SpecError(flag, one, form, said="got text without '='")
        name = name.strip()[:100]
        dotted[name] = parse_yaml(value, f"{flag} {name}")
    return dotted


def open_ledger(output: str, storage_options: tuple[str, ...]) -> Ledger:
    """Open the ledger of an output, reached with these storage options."""
    from batchgen.output.ledger import Ledger
    from batchgen.storage import configure, open_store

    configure(parse_storage_options(storage_options))
    return Ledger(open_store(output))


@click.group(cls=Commands, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="batchgen")
def main() -> None:
    """Generate millions of images with latent diffusion models on Ray, each exactly once.

    batchgen reads prompts or conditioning images from Parquet and writes images and metadata in
    shards. `resume` continues an interrupted run; `verify` proves from storage that no image is
    missing or duplicated.
    """
