"""Conversations to learn from: of the task world and from files, in stated shares of modes, packed into rows.

A mask says of each token whether the model itself would have written it. It is made with the ids, by
`minglm.chat.render_tokens`: looking for marks in finished text is how masks go wrong (NVIDIA-NeMo/Megatron-Bridge#3359).
Rows hold whole conversations, which share nothing but the row: attention, MTP and loss keep to a document.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path

import numpy as np
import torch

from minglm.chat import MODES
from minglm.config import ConfigError
from minglm.data.mixture import Turns
from minglm.data.packing import IGNORED, PADDING, Rows, best_fit, draws
from minglm.data.stream import Batch, RowStream
from minglm.posttrain.lint import FAULTS, LintError, Sample, lint, read_samples
from minglm.posttrain.recipe import Conversations
from minglm.tasks import FAMILIES
from minglm.tasks.task import HELD_OUT, TRAIN, Problem, problems
from minglm.tokenizer import Tokenizer

MODE_OF = {enable_thinking: mode for mode, enable_thinking in MODES.items()}
SHOWN_FAULTS = 10


class DataRefused(ValueError):
    """Samples that must not be learnt from; the message names the first ones and how many there are."""


@dataclass(frozen=True)
class Conversation:
    """ids (tokens,) int64; mask (tokens,) bool, True where the model itself would have written the token."""

    ids: np.ndarray
    mask: np.ndarray
    mode: str
    source: str


Source = Iterator[Conversation | LintError]
Pools = dict[str, list[Conversation | LintError]]  # by mode


def deal(recipe: Conversations, split: str, pools: Pools, tokenizer: Tokenizer, longest: int, seed: int) -> Source:
    """Conversations of a split without end, or what is wrong with a sample in its place.

    Sample n's mode and source are functions of n: after any number of samples each mode has had its share of them within
    less than one, and within a mode each source. `pools`, the samples of files, come round again when all have been dealt.
    Raises `ConfigError` for a mode that nothing fills.
    """
    weights = {mode: weight for mode, weight in recipe.weights.items() if weight}
    by_mode = {mode: _sources(recipe, split, mode, pools.get(mode, []), tokenizer, longest, seed) for mode in weights}
    turns = {mode: Turns({name: weight for name, (weight, _) in sources.items()}) for mode, sources in by_mode.items()}
    modes = Turns(weights)
    names = list(weights)
    for number in count():
        (mode,), (place,) = modes.at(np.array([number]))
        sources = by_mode[names[mode]]
        (source,), _ = turns[names[mode]].at(np.array([place]))
        yield next(list(sources.values())[source][1])


def _sources(
    recipe: Conversations,
    split: str,
    mode: str,
    pool: Sequence[Conversation | LintError],
    tokenizer: Tokenizer,
    longest: int,
    seed: int,
) -> dict[str, tuple[float, Source]]:
    """What fills a mode: weights and samples by name."""
    groups = {
        "thinking": [recipe.families],
        "non-thinking": [(*recipe.families, *recipe.easy_families)],
        "automatic": [recipe.families, recipe.easy_families],  # half of each: both choices are to be learnt
    }
    groups = [group for group in groups[mode] if group]
    sources: dict[str, tuple[float, Source]] = {}
    share = 1 - recipe.file_share if pool else 1.0
    for group in groups if share else ():
        own = {name: recipe.family_weights.get(name, 1.0) for name in group}
        for name in group:
            made = _of_family(recipe, name, split, mode, tokenizer, longest, seed)
            sources[name] = (share / len(groups) * own[name] / sum(own.values()), made)
    if pool and (recipe.file_share or not groups):
        sources["files"] = (recipe.file_share if groups else 1.0, cycle(pool))
    if not sources:
        raise ConfigError(
            f"conversations.{mode.replace('-', '_')} = {recipe.weights[mode]}: no {split} sample is of this mode; wanted 0, or "
            f"families or {'files' if split == TRAIN else 'held_out_files'} that have some"
        )
    return sources


def _of_family(
    recipe: Conversations, name: str, split: str, mode: str, tokenizer: Tokenizer, longest: int, seed: int
) -> Source:
    own = 2 * len(MODES) * seed + 2 * list(MODES).index(mode)  # problems of its own for each mode
    thinks = mode != "non-thinking" and name in recipe.families
    opens = mode == "thinking" and recipe.opens_thinking
    for number, problem in enumerate(problems_of(name, split, own, recipe.levels_of(name)), 1):
        where = f"{name} ({mode}, {split}), sample {number}"
        sample = Sample([*problem.messages, *problem.demonstrate(thinks)], where, problem.tools, MODES[mode], opens)
        yield _read(sample, name, tokenizer, longest)


def problems_of(name: str, split: str, seed: int, levels: int) -> Iterator[Problem]:
    """Problems of the family's `levels` easiest difficulties (0: all). Raises `ConfigError` for an unknown family."""
    if name not in FAMILIES:
        raise ConfigError(f"conversations.families: found {name!r}; wanted some of {', '.join(FAMILIES)}")
    return problems(FAMILIES[name], split, seed, FAMILIES[name].difficulties[: levels or None])


def pools_of_files(files: Sequence[Path], tokenizer: Tokenizer, longest: int) -> Pools:
    """The samples of all files by mode. What cannot be read is of every mode, so that it is met whatever the shares."""
    pools: Pools = {mode: [] for mode in MODES}
    for path in files:
        for sample in read_samples(path):
            found = _read(sample, path.name, tokenizer, longest)
            for mode in pools if isinstance(sample, LintError) else [MODE_OF[sample.thinking]]:
                pools[mode].append(found)
    return pools


def _read(sample: Sample | LintError, source: str, tokenizer: Tokenizer, longest: int) -> Conversation | LintError:
    if isinstance(sample, LintError):
        return sample
    try:
        rendered = lint(sample, tokenizer, longest)
    except LintError as error:
        return error
    return Conversation(np.array(rendered.ids), np.array(rendered.assistant_mask), MODE_OF[sample.thinking], source)


@dataclass(frozen=True)
class Census:
    """What a list of conversations holds, and the samples that were refused."""

    conversations: list[Conversation]
    faults: list[LintError]

    def refuse_faults(self) -> None:
        """Raises `DataRefused` if there are any."""
        if self.faults:
            shown = "\n  ".join(map(str, self.faults[:SHOWN_FAULTS]))
            raise DataRefused(f"{len(self.faults)} samples are refused, such as\n  {shown}")

    def table(self) -> str:
        """Counts by mode and source, and of faults."""
        lines = [f"{'':24}{'samples':>10}{'share':>9}{'tokens':>12}{'learnt':>12}"]
        for kind in ("mode", "source"):
            groups: dict[str, list[Conversation]] = {}
            for one in self.conversations:
                groups.setdefault(getattr(one, kind), []).append(one)
            for name in sorted(groups):
                own = groups[name]
                tokens, learnt = sum(len(one.ids) for one in own), sum(int(one.mask.sum()) for one in own)
                share = len(own) / len(self.conversations)
                lines.append(f"{name:24}{len(own):>10,}{share:>9.2%}{tokens:>12,}{learnt:>12,}")
            lines.append("")
        refused = Counter(fault.fault for fault in self.faults)
        lines += [f"{'refused':24}{len(self.faults):>10,}"]
        lines += [f"  {fault:22}{refused[fault]:>10,}    {FAULTS[fault]}" for fault in FAULTS if refused[fault]]
        return "\n".join(lines)


def training_census(recipe: Conversations, tokenizer: Tokenizer, longest: int, seed: int) -> Census:
    """The samples to train on, `recipe.samples` of them, refused ones included; and every line of the files once."""
    pools = pools_of_files(recipe.files, tokenizer, longest)
    dealt = list(islice(deal(recipe, TRAIN, pools, tokenizer, longest, seed), recipe.samples))
    faults = {str(one): one for some in (*pools.values(), dealt) for one in some if isinstance(one, LintError)}
    return Census([one for one in dealt if isinstance(one, Conversation)], list(faults.values()))


def held_out_census(recipe: Conversations, tokenizer: Tokenizer, longest: int, tokens: int) -> Census:
    """Held-out samples until they hold so many tokens, always the same ones."""
    conversations: list[Conversation] = []
    faults: list[LintError] = []
    pools = pools_of_files(recipe.held_out_files, tokenizer, longest)
    for one in deal(recipe, HELD_OUT, pools, tokenizer, longest, seed=0):
        if isinstance(one, LintError):
            faults.append(one)
            if len(faults) == SHOWN_FAULTS:
                break
        else:
            conversations.append(one)
            tokens -= len(one.ids)
            if tokens <= 0:
                break
    return Census(conversations, faults)


# ------------------------------------------------------------------------------------------------------------- packing


class PackedConversations:
    """Whole conversations in rows, by best fit; packed once, and dealt in another order in each epoch.

    labels[t] is the token after input_ids[t] where the model itself would have written that, else -100; document_ids count
    the conversations of a row from 0, -1 at padding.
    """

    def __init__(
        self, conversations: Sequence[Conversation], sequence_length: int, seed: int, padding_id: int, together: int = 1
    ):
        """together: so many neighbours always share a row, side by side, such as the two answers of a pair.

        Raises ValueError for none, or some that are longer than a row.
        """
        lengths = np.array([len(one.ids) for one in conversations], np.int64).reshape(-1, together).sum(1)
        if not len(lengths) or lengths.max() > sequence_length:
            found = f"the longest has {lengths.max()} tokens" if len(lengths) else "there are none"
            raise ValueError(f"conversations: {found}; wanted some, of at most sequence_length = {sequence_length} tokens")
        row_of = best_fit(lengths, sequence_length).repeat(together)
        self.order = np.argsort(row_of, kind="stable")  # numbers of the conversations as they lie, row by row
        shape = (int(row_of.max()) + 1, sequence_length)
        self.rows_per_epoch, self._seed = shape[0], seed
        self.num_tokens = int(lengths.sum())
        self._rows = Rows(np.full(shape, padding_id), np.full(shape, IGNORED), np.full(shape, PADDING, np.int32))
        filled, documents = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int32)
        for one, row in zip(conversations, row_of.tolist(), strict=True):
            place = slice(filled[row], filled[row] + len(one.ids))
            self._rows.input_ids[row, place] = one.ids
            self._rows.labels[row, place] = np.append(np.where(one.mask[1:], one.ids[1:], IGNORED), IGNORED)
            self._rows.document_ids[row, place] = documents[row]
            filled[row] += len(one.ids)
            documents[row] += 1

    @property
    def waste(self) -> float:
        """Share of positions that are padding."""
        return 1 - self.num_tokens / self._rows.input_ids.size

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._rows.input_ids.shape).encode())
        for array in self._rows:
            digest.update(array.tobytes())
        return digest.hexdigest()

    def rows(self, epoch: int, numbers: np.ndarray) -> Rows:
        """Rows `numbers` (int64 (rows,), each below `rows_per_epoch`) of this epoch."""
        order = np.argsort(draws(self._seed, epoch).random_raw(self.rows_per_epoch), kind="stable")
        return Rows(*(array[order[numbers]] for array in self._rows))

    def stream(self) -> RowStream:
        """An endless sequence of the rows."""
        sequence_length = self._rows.input_ids.shape[1]
        identity = {"conversations": self.fingerprint, "sequence_length": sequence_length, "seed": self._seed}
        return RowStream(sequence_length, {"all": self}, {"all": 1}, identity)

    def batches(self, size: int) -> Iterator[Batch]:
        """Every row once, as packed; the last batch is filled up with padding."""
        for first in range(0, self.rows_per_epoch, size):
            rows = Rows(*(array[first : first + size] for array in self._rows))
            missing = size - len(rows.input_ids)
            if missing:
                fills = (rows.input_ids[0, 0], IGNORED, PADDING)
                padded = (
                    np.concatenate([array, np.full((missing, array.shape[1]), fill, array.dtype)])
                    for array, fill in zip(rows, fills, strict=True)
                )
                rows = Rows(*padded)
            yield Batch(*map(torch.from_numpy, rows))
