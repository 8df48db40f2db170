"""The first stage: actors without GPUs read spans of the input and yield one block per shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from batchgen.engine.actors import pause
from batchgen.errors import RetryShard, StopJob
from batchgen.input.reader import read_span, span_from_json
from batchgen.shard import frames
from batchgen.spec.spec import Spec
from batchgen.storage import configure


class Read:
    """One reader: a span in, the frames of its pending shards out.

    It is an actor because Ray reports the death of an actor when its node is lost. Ray waits for a
    task on an unreachable node (such as a spot machine taken away) until the connection times out,
    which took more than 6 minutes when measured, and the stream waits with it.
    """

    def __init__(self, spec: Spec, columns: list[str]) -> None:
        self.spec, self.columns = spec, columns
        self.broken: StopJob | None = None
        try:
            configure(spec.storage_options, spec.storage.limits())
        except StopJob as error:  # raised here, it would end the stream without its message
            self.broken = error

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        span = span_from_json(batch.column("span")[0].as_py())
        if self.broken is not None:
            yield frames.stopped(span.slices[0].shard, self.broken).to_block()
            return
        tries = 0
        while span.slices:
            try:
                for rows in read_span(span, self.spec, self.columns):
                    yield frames.from_rows(rows).to_block()
                    span = replace(span, slices=span.slices[1:])
                return
            except RetryShard as error:
                tries += 1
                if tries > self.spec.policy.shard_retries:
                    yield frames.stopped(span.slices[0].shard, error).to_block()
                    return
                pause(tries)
            except Exception as error:  # raised here, it would end the stream without its message
                yield frames.stopped(span.slices[0].shard, error).to_block()
                return
