"""A shuffle by files: every task writes its rows grouped by bucket, and a bucket reads its groups from every file.

A file is a sequence of runs with one record batch per bucket each, empty ones too, so batch ``run * num_buckets + bucket`` is found
without an index. A file appears complete or not at all, and doing a task again replaces its file: a dead worker repeats only its task.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from maple.artifacts import Place
from maple.errors import ArtifactError

RUN_BYTES = 256 << 20


def scatter(place: Place, schema: pa.Schema, tables: Iterable[pa.Table], bucket: str, num_buckets: int, run_rows: int) -> int:
    """Write tables of ``schema``, whose column ``bucket`` says where a row goes; how many rows. Memory: one run of about ``run_rows``."""
    place.fs.create_dir(place.path.rsplit("/", 1)[0], recursive=True)
    draft = f"{place.path}.{uuid.uuid4().hex[:8]}.tmp" if place.local else place.path  # elsewhere a file appears when it is closed
    rows = 0
    packed = pa.ipc.IpcWriteOptions(compression="lz4")
    with place.fs.open_output_stream(draft) as stream, pa.ipc.new_file(stream, schema, options=packed) as writer:
        for run in _runs(tables, run_rows):
            rows += run.num_rows
            to = np.asarray(run[bucket])
            order = np.argsort(to, kind="stable")
            (batch,) = run.take(pa.array(order)).select(schema.names).combine_chunks().to_batches()
            edges = np.searchsorted(to[order], np.arange(num_buckets + 1))
            for start, stop in itertools.pairwise(edges.tolist()):
                writer.write_batch(batch.slice(start, stop - start))
    if draft != place.path:
        place.fs.move(draft, place.path)
    return rows


def gather(places: Sequence[Place], schema: pa.Schema, bucket: int, num_buckets: int) -> pa.Table:
    """All rows of one bucket, file by file in the order they were written. Memory: the bucket."""
    batches = []
    for place in places:
        try:
            with place.fs.open_input_file(place.path) as file:
                reader = pa.ipc.open_file(file)
                batches += [reader.get_batch(number) for number in range(bucket, reader.num_record_batches, num_buckets)]
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError(f"the intermediate file {place.uri} cannot be read ({error}); run the step again") from None
    return pa.Table.from_batches([batch for batch in batches if batch.num_rows], schema)


def _runs(tables: Iterable[pa.Table], run_rows: int) -> Iterator[pa.Table]:
    """Tables joined until they have ``run_rows`` rows or ``RUN_BYTES``, whichever comes first; none is empty."""
    held: list[pa.Table] = []
    for table in tables:
        if table.num_rows:
            held.append(table)
        if sum(part.num_rows for part in held) >= run_rows or sum(part.nbytes for part in held) >= RUN_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)
