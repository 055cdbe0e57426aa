"""How fast this machine makes data: text into shards before training, shards into batches during it.

Both are beside the training step of `bench`: a trainer that waits for its data has measured the wrong thing.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from minglm.bench import Workload
from minglm.data.shards import Dataset, prepare
from minglm.data.sources import TRAIN, Corpus, Document, embedded_documents
from minglm.data.stream import MixtureStream
from minglm.tokenizer import Tokenizer, train_tokenizer

TEXT_BYTES = 5_000_000
SOURCES = ("python_topics", "code/standard_library")
MIXTURE = {"prose": 0.15, "code": 0.85}  # the manual has 0.76 MB
VOCAB_SIZE = 2048
BATCHES = 200
MOST_SHARE = 0.03  # of a training step that dealing may take


def run(workload: Workload, step_seconds: float, repeats: int = 3, text_bytes: int = TEXT_BYTES) -> dict:
    """Tokenise and write about `text_bytes` of embedded text, then deal batches of the workload's size from it.

    step_seconds: of the training step that the dealing is compared with. -> medians, ready for `report`.
    """
    documents = Corpus.from_documents(_embedded(text_bytes))
    tokenizer = train_tokenizer((document.text for document in documents), VOCAB_SIZE, show_progress=False)
    size = sum(len(document.text.encode()) for document in documents)
    with tempfile.TemporaryDirectory() as folder:
        runs = [_prepare(documents, tokenizer, Path(folder, str(number))) for number in range(repeats)]
        dealing = _dealing_seconds(runs[0][1], workload)
    seconds = statistics.median(seconds for seconds, _ in runs)
    return {
        "preparation_bytes": size,
        "preparation_threads": os.cpu_count() or 1,  # those of `prepare`
        "preparation_bytes_per_second": size / seconds,
        "dealing_batch": [workload.sequences, workload.length],
        "dealing_seconds": dealing,
        "dealing_share": dealing / step_seconds,
    }


def _embedded(text_bytes: int) -> Iterator[Document]:
    """So much of both domains, in the shares of the mixture; less where a source is smaller."""
    for source, share in zip(SOURCES, MIXTURE.values(), strict=True):
        so_far = 0
        for document in embedded_documents(source):
            so_far += len(document.text.encode())
            yield document
            if so_far >= text_bytes * share:
                break


def _prepare(documents: Corpus, tokenizer: Tokenizer, folder: Path) -> tuple[float, Dataset]:
    start = time.perf_counter()
    dataset = prepare(documents, tokenizer, folder, progress=False)
    return time.perf_counter() - start, dataset


def _dealing_seconds(dataset: Dataset, workload: Workload) -> float:
    """The median of a batch's time; the first one also packs, and is not counted."""
    stream = MixtureStream(dataset, TRAIN, workload.length, 1, MIXTURE)
    stream.next(workload.sequences)
    seconds = []
    for _ in range(BATCHES):
        start = time.perf_counter()
        stream.next(workload.sequences)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def report(result: dict) -> str:
    """Two lines of text."""
    sequences, length = result["dealing_batch"]
    megabytes, speed = result["preparation_bytes"] / 1e6, result["preparation_bytes_per_second"] / 1e6
    threads = result["preparation_threads"]
    return (
        f"data preparation: {speed:.1f} MB/s, {megabytes:.1f} MB of text into shards, {threads} threads\n"
        f"dealing: {result['dealing_seconds'] * 1e3:.2f} ms a batch of {sequences} x {length} tokens from {len(MIXTURE)} "
        f"domains, {result['dealing_share']:.1%} of a training step (wanted below {MOST_SHARE:.0%})"
    )
