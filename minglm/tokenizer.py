"""Text to token ids and back: byte-level BPE, the tokenizer family of GLM-4.5 (Sennrich et al., 2016; on bytes: GPT-2).

Hugging Face's `tokenizers` trains, `tokenizer.json` is the one file format (ours or a published GLM's), and tiktoken,
which is an order of magnitude faster, encodes. The two libraries differ in places where a difference would go
unnoticed; those places are the comments below.
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT = "<|endoftext|>"

# GLM-4.5's special tokens in their published order (ids 151329 to 151360 there).
SPECIAL_TOKENS = (
    END_OF_DOCUMENT, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
)  # fmt: skip

# The same conversation that `minglm.chat.render` writes, for whoever reads the folder (transformers, vLLM, SGLang).
CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"

# The model ends its turn by naming who speaks next.
END_OF_TURN = (END_OF_DOCUMENT, "<|user|>", "<|observation|>")

# These carry content that parsers read, so Hugging Face's `skip_special_tokens=True` must leave them in the text.
CONTENT_TAGS = frozenset(SPECIAL_TOKENS[SPECIAL_TOKENS.index("<think>") : SPECIAL_TOKENS.index("/nothink")])

# Text is first cut into pieces, and no token crosses a cut: contractions; letters with at most one leading non-letter;
# digits in groups of up to three; punctuation; newlines; spaces (the last one goes with the word that follows).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What `train_tokenizer` learns from: digits one by one, so that no merge joins any. A small model then has ten digits to
# learn arithmetic with instead of a thousand numbers, and the vocabulary has its ids for words. Text is cut by PATTERN all
# the same: within a group of three digits there is nothing to merge.
LEARNING_PATTERN = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

# tiktoken's regex engine keeps one backtracking state for each character that `\s+(?!\S)` passes, and panics at a run
# of a million spaces. This matches the same text with one state per hundred characters.
TIKTOKEN_PATTERN = PATTERN.replace(r"\s+(?!\S)", r"(?:\s{100}(?!\S)|\s(?!\S))++")

PRE_TOKENIZER = [
    {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]


def _byte_characters() -> str:
    """GPT-2's printable character for each byte: itself where Latin-1 prints it, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = itertools.count(0x100)
    return "".join(chr(byte if byte in printable else next(stand_in)) for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int | None = None,
    *,
    characters: bool = False,
    specials: Sequence[str] = SPECIAL_TOKENS,
    show_progress: bool = True,
) -> "Tokenizer":
    """Learn a vocabulary from `texts`; the same texts always give the same tokenizer. Each digit is an id of its own.

    Args:
        texts: read once, in order.
        vocab_size: ordinary and special ids together. Text with too few repeated pairs yields a smaller vocabulary.
        characters: instead of `vocab_size`: no merges, one id for each byte that occurs in the texts (for ASCII text,
            for each character). Text with any other byte cannot be encoded then.
        specials: names of the special tokens, `<|endoftext|>` among them. They take the ids after the ordinary ones,
            in this order.
        show_progress: draw a progress bar on stderr.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the specials; neither or both of `vocab_size` and
            `characters` are given; `specials` are unfit; no text to take characters from; a lone surrogate in a text.
        TypeError: `texts` is one string, or holds something else than strings.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string; wanted an iterable of strings, such as [text]")
    if characters == (vocab_size is not None):
        raise ValueError(f"wanted either vocab_size or characters=True; found {vocab_size=}, {characters=}")
    if vocab_size is not None and vocab_size < 256 + len(specials):
        smallest = 256 + len(specials)
        raise ValueError(f"vocab_size is {vocab_size}; wanted at least {smallest}: 256 bytes, {len(specials)} specials")
    _check_specials(specials, "specials")

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = _cut_by(LEARNING_PATTERN)
    library.decoder = decoders.ByteLevel()
    stretches = _between_specials(texts, specials)
    if characters:
        alphabet = sorted(set().union(*(stretch.encode() for stretch in stretches)))
        if not alphabet:
            raise ValueError("texts hold no character; wanted those that the vocabulary is to have")
        library.model = models.BPE(vocab={BYTE_CHARACTERS[byte]: id for id, byte in enumerate(alphabet)}, merges=[])
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials),
            initial_alphabet=list(BYTE_CHARACTERS),
            show_progress=show_progress,
        )
        library.train_from_iterator(stretches, trainer)
    library.pre_tokenizer = _cut_by(PATTERN)
    if ordinary := sorted(library.get_vocab().keys() & set(specials)):
        raise ValueError(f"specials: {ordinary} are ordinary tokens, too; wanted other names")
    library.add_tokens([tokenizers.AddedToken(name, special=name not in CONTENT_TAGS, normalized=False) for name in specials])
    return Tokenizer(library.to_str(pretty=True).encode(), "trained tokenizer")


def _cut_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


class Tokenizer:
    """A `tokenizer.json` made ready to use. Build one with `train_tokenizer` or `Tokenizer.from_pretrained`.

    Attributes:
        vocab_size: number of ids, specials included: the ids are 0 to vocab_size - 1.
        special_ids: id of each special token by its name.
        end_of_document_id: id of `<|endoftext|>`, which ends a document and also pads.
        end_of_turn_ids: ids that end the model's turn.
        fingerprint: SHA-256 (hex) of vocabulary, merges and specials; where it is equal, so are the ids of any text.
    """

    def __init__(self, tokenizer_json: bytes, where: str):
        """Check and index the content of a `tokenizer.json`; errors are ValueErrors that start with `where`."""
        try:
            library = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except ValueError as error:
            raise ValueError(f"{where}: not a readable tokenizer.json: {error}") from error
        document = json.loads(tokenizer_json)
        _check_family(document, library, where)
        self._json = tokenizer_json

        self.special_ids: dict[str, int] = {token["content"]: token["id"] for token in document["added_tokens"]}
        _check_specials(self.special_ids, where)
        # Some writers list the specials in the vocabulary, too.
        vocab = {token: id for token, id in document["model"]["vocab"].items() if self.special_ids.get(token) != id}
        # "a b" in older files, ["a", "b"] in newer ones.
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in document["model"]["merges"]]
        at_once = bool(document["model"].get("ignore_merges"))
        _check_order(vocab, merges, self.special_ids, where)
        identity = json.dumps([vocab, merges, at_once, self.special_ids], sort_keys=True)
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.end_of_document_id = self.special_ids[END_OF_DOCUMENT]
        self.end_of_turn_ids = tuple(self.special_ids[name] for name in END_OF_TURN if name in self.special_ids)

        token_bytes = {token: _to_bytes(token, where) for token in vocab}
        reachable = _reachable_tokens(vocab, library.model, at_once, where)
        # To tiktoken an id is a rank: the lowest merges first.
        ranks = {token_bytes[token]: vocab[token] for token in reachable}
        self._known_bytes = bytes(token[0] for token in ranks if len(token) == 1)
        self._encoding = tiktoken.Encoding(
            where, pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
        )
        self.vocab_size = len(vocab) + len(self.special_ids)
        self._bytes = [b""] * self.vocab_size  # by id
        for token, id in vocab.items():
            self._bytes[id] = token_bytes[token]
        for name, id in self.special_ids.items():
            self._bytes[id] = name.encode()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`, or the one in a folder: ours, or that of a published GLM-4.5.

        Raises FileNotFoundError if there is none, and ValueError, naming the file and what was found in it, if it is
        damaged or of another family.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; wanted a tokenizer.json or a folder that holds one")
        return cls(path.read_bytes(), str(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, the `tokenizer_config.json` by which Hugging Face's AutoTokenizer knows it, and, where all
        special tokens are there, the chat template."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_DOCUMENT,
            "pad_token": END_OF_DOCUMENT,
            "additional_special_tokens": [name for name in self.special_ids if name not in CONTENT_TAGS],
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer.json").write_bytes(self._json)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.special_ids.keys() >= set(SPECIAL_TOKENS):
            shutil.copyfile(CHAT_TEMPLATE, folder / CHAT_TEMPLATE.name)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Nothing is put before or after it.

        The name of a special token becomes that token only if `allow_special`; otherwise it is text like any other, so
        that what a user types can never act as control.

        Raises TypeError if `text` is no string, and ValueError if it holds a lone surrogate, which has no UTF-8 form,
        or a character that a vocabulary of characters lacks.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}: {text!r:.100}; wanted a str")
        text.encode()  # refuses surrogates, which tiktoken would silently replace
        if len(self._known_bytes) < 256:
            self._check_characters(text, allow_special)
        if allow_special:
            return self._encoding.encode(text, allowed_special="all", disallowed_special=())
        return self._encoding.encode_ordinary(text)

    def encode_batch(
        self, texts: Iterable[str], num_threads: int | None = None, allow_special: bool = False
    ) -> list[list[int]]:
        """`encode` for each text, in order, on `num_threads` threads (default: a few more than there are CPUs)."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(lambda text: self.encode(text, allow_special), texts))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Text of `ids`, special tokens by name; `errors` as for `bytes.decode`, where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors=errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of `ids`. A character may span several ids. Raises ValueError at an id out of the vocabulary."""
        pieces = []
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ValueError(f"id {id} is not in the vocabulary; wanted 0 to {self.vocab_size - 1}")
            pieces.append(self._bytes[id])
        return b"".join(pieces)

    def token_byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 (vocab_size,); 0 for specials. For losses in bits per byte."""
        lengths = np.array([len(token) for token in self._bytes], dtype=np.int32)
        lengths[list(self.special_ids.values())] = 0
        return lengths

    def _check_characters(self, text: str, allow_special: bool) -> None:
        """Refuse bytes without an id, which would make tiktoken panic."""
        stretches = _any_of(self.special_ids).split(text) if allow_special else [text]
        ordinary = "".join(stretches)
        if ordinary.encode().translate(None, self._known_bytes):  # what is left once the known bytes are deleted
            unknown = next(c for c in ordinary if c.encode().translate(None, self._known_bytes))
            raise ValueError(f"character {unknown!r} is not in this vocabulary of {len(self._known_bytes)} bytes")


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name) for name in names))


def _between_specials(texts: Iterable[str], specials: Sequence[str]) -> Iterator[str]:
    """The stretches of each text between the names of specials.

    A name must never be learnt as an ordinary token ("/nothink" would be, from chats): Hugging Face then takes the
    ordinary id for the special one.
    """
    names = _any_of(specials)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts holds a {type(text).__name__}: {text!r:.100}; wanted str")
        yield from names.split(text)


def _check_specials(names: Iterable[str], where: str) -> None:
    ordered = sorted(names)
    if END_OF_DOCUMENT not in ordered or "" in ordered:
        raise ValueError(f"{where}: special tokens are {ordered}; wanted {END_OF_DOCUMENT} among them, no empty one")
    for name, following in itertools.pairwise(ordered):
        # tiktoken takes whichever comes first in a hash table, Hugging Face the longest.
        if following.startswith(name):
            raise ValueError(f"{where}: special token {name!r} also begins {following!r}; one of them must go")


def _check_family(document: dict, library: tokenizers.Tokenizer, where: str) -> None:
    """Refuse what tiktoken cannot reproduce, naming it."""

    def check(key: str, found: object, *wanted: object) -> None:
        if found not in wanted:
            raise ValueError(f"{where}: {key} is {found!r}; wanted {wanted[0]!r}")

    model = document["model"]
    check("model.type", type(library.model).__name__, "BPE")
    for key in "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback":
        check(f"model.{key}", model.get(key), None, "", False)
    check("normalizer", document.get("normalizer"), None)
    pre_tokenizer = document.get("pre_tokenizer")
    steps = pre_tokenizer and pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    settings = steps and [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    check("pre_tokenizer", settings, PRE_TOKENIZER)
    check("decoder.type", (document.get("decoder") or {}).get("type"), "ByteLevel")
    for token in document["added_tokens"]:
        check(f"id of added token {token['content']!r}", token["id"], library.token_to_id(token["content"]))
        for key in "single_word", "lstrip", "rstrip":
            check(f"{key} of added token {token['content']!r}", token[key], False)


def _check_order(vocab: dict[str, int], merges: list[list[str]], special_ids: dict[str, int], where: str) -> None:
    """Ids must count up from 0, and merges must be in the order of the ids that they make.

    tiktoken merges the pair that makes the lowest id first, Hugging Face the pair that is listed first. (A token may
    be made by several pairs, listed one after the other: so are vocabularies that were converted from tiktoken.)
    """
    ids = sorted([*vocab.values(), *special_ids.values()])
    for wanted, found in enumerate(ids):
        if found != wanted:
            raise ValueError(f"{where}: found id {found} after id {wanted - 1}; wanted ids that count up from 0")
    highest = -1
    for number, (left, right) in enumerate(merges):
        made = vocab.get(left + right, special_ids.get(left + right))
        if made < highest or left + right in special_ids:
            raise ValueError(
                f"{where}: merge {number} ({left!r}, {right!r}) makes id {made} after one that makes id {highest}; "
                "wanted merges in the order of ids, and none that makes a special token"
            )
        highest = made


def _to_bytes(token: str, where: str) -> bytes:
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError as error:
        raise ValueError(
            f"{where}: {error.args[0]!r} in token {token!r} stands for no byte; wanted a byte-level vocabulary"
        ) from error


def _reachable_tokens(vocab: dict[str, int], model: models.BPE, at_once: bool, where: str) -> Iterator[str]:
    """The tokens that Hugging Face's encoder can produce: the only ones that tiktoken may know.

    tiktoken joins any two neighbours that together are a token, Hugging Face only those listed as a merge. And merges
    may never arrive at a token, because an earlier merge gets in the way: GLM's vocabulary, put together from two, has
    such tokens. With `at_once` (`ignore_merges` in the file) they are used all the same, where they are a whole piece
    of text; tiktoken always does so.

    Why this suffices: the merges inside a stretch of bytes are the same in any context as long as none crosses its
    ends. So if by merges alone a token's bytes end as that token, the last two neighbours are always the same listed
    pair; and if they end as three or more, tiktoken never meets two that it could join.
    """
    model.ignore_merges = False
    for token in vocab:
        parts = [part.value for part in model.tokenize(token)]
        if parts == [token] or (at_once and len(parts) > 2):
            yield token
        elif at_once:
            raise ValueError(f"{where}: merges leave token {token!r} as {parts}; wanted a merge that makes it")
