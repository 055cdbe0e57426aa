"""Batches of packed documents, as the tests of the model and of its balance want them."""

import torch
from torch import Tensor

from minglm.data.stream import IGNORED, PADDING


def pack(rows: list[list[list[int]]], length: int, left: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of documents -> input_ids, labels, document_ids (rows, left + length), padded on both sides."""
    input_ids = torch.zeros(len(rows), left + length, dtype=torch.long)
    labels, document_ids = torch.full_like(input_ids, IGNORED), torch.full_like(input_ids, PADDING)
    for row, documents in enumerate(rows):
        start = left
        for index, document in enumerate(documents):
            end = start + len(document)
            input_ids[row, start:end] = torch.tensor(document)
            labels[row, start : end - 1] = torch.tensor(document[1:])
            document_ids[row, start:end] = index
            start = end
    return input_ids, labels, document_ids
