"""The command that compares a synthetic set with a real one and measures its benefit: eval."""

from __future__ import annotations

import time

import click

from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import main, parse_storage_options, storage_option

_LINE_EVERY_S = 10.0


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them."""

    name = "numbers"

    def convert(self, value: object, param: object, ctx: object) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = str(value).split(",")
        if not all(word.strip().isdecimal() for word in words):
            self.fail(f"{str(value)!r}; allowed: whole numbers with commas, such as 3,5,10")
        return tuple(int(word) for word in words)


class Names(click.ParamType[tuple[str, ...]]):
    """Names with commas between them."""

    name = "names"

    def convert(self, value: object, param: object, ctx: object) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(word.strip() for word in str(value).split(",")))


@main.command("eval")
@click.argument("real")
@click.argument("synthetic", metavar="SYNTHETIC[:SELECTION]")
@click.option("--held-out", metavar="TEST", help="Real test images: measure the benefit on them.")
@click.option("--validation", metavar="VAL", help="Real images that choose hyper-parameters.")
@click.option("--pool", metavar="POOL", help="All real images there are, for the ceiling.")
@click.option(
    "--features",
    default="efficientnet-lite0",
    show_default=True,
    metavar="MODEL",
    help="Network of features: a transformers folder, an id of the Hub, or a shipped name.",
)
@click.option("--revision", help="Revision of the network, if it is an id of the Hub.")
@click.option(
    "--per-class",
    type=Numbers(),
    default="3,5,10",
    show_default=True,
    help="Numbers of real images of each class.",
)
@click.option("--draws", type=int, default=10, show_default=True, help="Draws of these images.")
@click.option(
    "--classifier",
    "classifiers",
    type=Names(),
    default="cnn",
    show_default=True,
    help="cnn (on pixels), logistic (on features), or both; the first is that of the primary "
    "endpoint.",
)
@click.option("--primary", type=int, help="Of --per-class, that of the primary endpoint.")
@click.option("--side", type=int, default=32, show_default=True, help="Pixels that cnn reads.")
@click.option("--steps", type=int, default=200, show_default=True, help="Steps of cnn's training.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of draws and training.")
@click.option("--generator-saw", default="", metavar="TEXT", help="What the generator learnt from.")
@click.option("--name", default="evaluation", show_default=True, help="Name of the result.")
@click.option("--save", metavar="FOLDER", help="Folder of the result. [default: in SYNTHETIC]")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def eval_(
    real: str,
    synthetic: str,
    held_out: str | None,
    validation: str | None,
    pool: str | None,
    features: str,
    revision: str | None,
    per_class: tuple[int, ...],
    draws: int,
    classifiers: tuple[str, ...],
    primary: int | None,
    side: int,
    steps: int,
    seed: int,
    generator_saw: str,
    name: str,
    save: str | None,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Compare SYNTHETIC with REAL, and measure whether it helps a classifier.

    Each set is an output, Parquet, or what `import` reads, with a label for each image. With
    --held-out, classifiers are trained on real images, on real and synthetic ones, and on real
    ones with geometric augmentation, and tested on images that nothing else has read.

    \b
    batchgen eval real.parquet out/images --held-out test.parquet
    batchgen eval photos/ out/images:bright --features my-model/ --name bright
    """
    from batchgen.curate.evaluate.evaluation import Request, evaluate
    from batchgen.curate.evaluate.protocol import Protocol
    from batchgen.storage import configure

    configure(parse_storage_options(storage_options))
    protocol = Protocol(per_class, draws, classifiers, primary, side, steps, seed, generator_saw)
    request = Request(
        real, synthetic, held_out, validation, pool, features, revision, protocol, name, save
    )
    made = evaluate(request, Lines(), lambda text: echo(text, err=as_json))
    if as_json:
        echo_json(made.facts)
        return 0
    echo(f"\n{made.text}")
    for file in made.files:
        echo(f"saved: {file}")
    return 0


class Lines:
    """Prints a line on stderr every ten seconds."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said >= _LINE_EVERY_S:
            self._said = now
            echo(f"{time.strftime('%H:%M:%S')} {what}: {done:,}/{total:,}", err=True)
