"""What must exist before the first step: a tokenizer, and data and prompts as tokens."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from minglm.config import ConfigError
from minglm.data.shards import Dataset, differences, prepare
from minglm.data.sources import TRAIN, Corpus, DataError, split_documents
from minglm.files import write_folder_atomically
from minglm.tokenizer import Tokenizer, train_tokenizer
from minglm.train.ingredients import corpus_of
from minglm.train.recipe import Recipe

TRAINED_FROM = "trained_from.json"
TOKENIZER_CHARACTERS = 2**28  # a tokenizer learns from so much text at most: more would not change it, but fill the memory


class VocabularyError(ConfigError):
    """A vocabulary that is too small: for the tokenizer's ids, or for any tokenizer."""


def prepare_data(recipe: Recipe, run_folder: Path) -> tuple[Tokenizer, Dataset]:
    """The recipe's tokenizer and dataset; made if they do not exist yet, in `data.folder` or `run_folder`/data.

    Raises `VocabularyError` if the tokenizer does not fit the model, `ConfigError` if the folder holds a tokenizer made
    from something else, and whatever `minglm.data` and `minglm.tokenizer` have to say about unfit files.
    """
    folder = recipe.data.folder or run_folder / "data"
    corpus = corpus_of(recipe.data)
    tokenizer = _get_tokenizer(recipe, corpus, folder / "tokenizer")
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise VocabularyError(
            f"model.vocab_size = {recipe.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids; wanted at "
            f"least as many (--model.vocab-size {tokenizer.vocab_size}), or another tokenizer"
        )
    return tokenizer, prepare(corpus, tokenizer, folder / "tokens")


def _get_tokenizer(recipe: Recipe, corpus: Corpus, folder: Path) -> Tokenizer:
    if recipe.tokenizer not in ("train", "characters"):
        return _read_tokenizer(Path(recipe.tokenizer))
    characters = recipe.tokenizer == "characters"
    identity = {
        "documents": corpus.identity,
        "tokenizer": recipe.tokenizer,
        "vocab_size": None if characters else recipe.model.vocab_size,
        "digits": "each an id",
    }
    if folder.exists():
        _check_trained_from(identity, folder)
        return _read_tokenizer(folder)
    print(f"tokenizer: {'collecting characters' if characters else 'learning byte pairs'} for {folder}")
    try:
        if characters:  # of held-out documents, too: a character without an id could not be read at all
            tokenizer = train_tokenizer((document.text for document in corpus), characters=True, show_progress=False)
        else:
            tokenizer = train_tokenizer(_training_texts(corpus), recipe.model.vocab_size, show_progress=False)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise VocabularyError(f"model.vocab_size = {recipe.model.vocab_size}: {error}") from error
    with write_folder_atomically(folder) as aside:
        tokenizer.save_pretrained(aside)
        (Path(aside) / TRAINED_FROM).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    return tokenizer


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(path)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"tokenizer: {error}") from error


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Ids of each of a recipe's prompts. Raises `ConfigError` for one that the tokenizer has no ids for."""
    ids = {}
    for prompt in prompts:
        try:
            ids[prompt] = tokenizer.encode(prompt)
        except ValueError as error:
            raise ConfigError(f"samples.prompts: {prompt!r}: {error}") from error
    return ids


def _check_trained_from(wanted: dict, folder: Path) -> None:
    path = folder / TRAINED_FROM
    found = json.loads(path.read_bytes()) if path.is_file() else None
    different = differences(found, wanted)
    if different:
        raise ConfigError(
            f"{path}: this tokenizer was made from something else. {different}. Delete its folder, or name another "
            "data.folder or run folder"
        )


def _training_texts(corpus: Corpus) -> Iterator[str]:
    """Held-out documents stay unseen by the tokenizer, too."""
    room = TOKENIZER_CHARACTERS
    for split, document in split_documents(corpus):
        if split == TRAIN:
            yield document.text[:room]
            room -= len(document.text)
            if room <= 0:
                return
