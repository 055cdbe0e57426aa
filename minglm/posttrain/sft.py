"""Supervised fine-tuning: a base model learns to answer, to think or not to think as it is asked, and to call tools.

The loop is the trainer's (`minglm.train.trainer`); what is different is the data, what the model starts from, and that only
the assistant's tokens are learnt. MTP and balance losses go on as in mid-training, so that drafting and routing survive.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

from minglm import ops
from minglm.checkpoint import load_model
from minglm.config import ConfigError, GLMConfig
from minglm.data.stream import Batch, RowStream
from minglm.engine.engine import Engine
from minglm.posttrain.lora import LoRALearner
from minglm.posttrain.mode_switch import ModeSwitch, ask, measure
from minglm.posttrain.recipe import RewardRecipe, SFTRecipe, load_sft_recipe, resolve_paths, save_sft_recipe
from minglm.posttrain.sft_data import Census, PackedConversations, held_out_census, training_census
from minglm.posttrain.sft_learner import SFTLearner, ThinkingMarks
from minglm.tokenizer import Tokenizer
from minglm.train.device import Device, choose_device
from minglm.train.learner import Learner
from minglm.train.recipe import Recipe
from minglm.train.run_folder import RunFolder
from minglm.train.stop import StopRequest
from minglm.train.trainer import Outcome, Trainer

MODE_SWITCH = "mode_switch.json"


@dataclass(frozen=True)
class ConversationData:
    """The conversations of a run, checked."""

    training: Census
    held_out: Census

    @classmethod
    def gather(cls, recipe: SFTRecipe, tokenizer: Tokenizer) -> "ConversationData":
        data, length = recipe.conversations, recipe.training.sequence_length
        return cls(
            training_census(data, tokenizer, length, recipe.seed),
            held_out_census(data, tokenizer, length, recipe.evaluation.tokens),
        )

    def refuse_faults(self) -> None:
        """Raises `DataRefused` if a sample is not to be learnt from, or held against the model."""
        self.training.refuse_faults()
        self.held_out.refuse_faults()


class SFTTrainer(Trainer):
    """The trainer on conversations. `dataset` is `ConversationData`."""

    counts_specials = True  # the ends of thinking and of turns are what is to be learnt
    together = 1  # see `PackedConversations`

    def make_streams(self) -> list[RowStream]:
        packed = self._packed(self.dataset.training)
        print(f"conversations: {packed.rows_per_epoch:,} rows of {packed.num_tokens:,} tokens, {packed.waste:.1%} padding")
        return [packed.stream()]

    def held_out_batches(self, tokens: int, domain: str | None = None) -> Iterator[Batch]:
        return self._packed(self.dataset.held_out).batches(self.stage.sequences_per_micro_batch)

    def _packed(self, census: Census) -> PackedConversations:
        length, padding = self.recipe.training.sequence_length, self.tokenizer.end_of_document_id
        return PackedConversations(census.conversations, length, self.recipe.seed, padding, self.together)


def sft(recipe: SFTRecipe, run_folder: str | Path, must_resume: bool = False) -> Outcome:
    """Fine-tune by `recipe` in `run_folder`, going on from its newest checkpoint if it has any. Signals as in `train`.

    Raises `ConfigError` for a recipe that does not fit the base, the machine or the run folder, `DataRefused` for samples
    that must not be learnt from, and what `minglm.checkpoint`, `minglm.tokenizer` and the trainer raise.
    """
    recipe = resolve_paths(recipe)
    base, lora = recipe.base, recipe.lora
    marks = ThinkingMarks.of(Tokenizer.from_pretrained(base))

    def make_learner(recipe: Recipe, config: GLMConfig, device: Device, checkpoint: Path | None) -> Learner:
        if lora.rank:
            return LoRALearner(lora, base, marks, recipe, config, device, checkpoint)
        return SFTLearner(marks, recipe, config, device, checkpoint or base)

    def open_folder(folder: RunFolder) -> Path | None:
        return folder.open(recipe, must_resume, load_sft_recipe, save_sft_recipe)

    return run_trainer(SFTTrainer, make_learner, recipe, run_folder, ConversationData.gather, open_folder)


def run_trainer(
    trainer: type[SFTTrainer],
    make_learner: Callable[..., Learner],
    recipe: SFTRecipe | RewardRecipe,
    run_folder: str | Path,
    gather: Callable[..., ConversationData],
    open_folder: Callable[[RunFolder], Path | None],
) -> Outcome:
    """A run of post-training by a recipe with resolved paths: check the data, open the folder, train.

    gather: reads the data, of recipe and tokenizer; open_folder: as `RunFolder.open`, which decides where to go on.
    """
    folder, device = RunFolder(run_folder), choose_device(recipe.hardware)
    tokenizer = Tokenizer.from_pretrained(recipe.base)
    config = GLMConfig.from_pretrained(recipe.base)
    training = recipe.as_training(config)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{recipe.base}: its tokenizer has {tokenizer.vocab_size} ids and its model {config.vocab_size}; wanted no more ids"
        )
    data = gather(recipe, tokenizer)
    data.refuse_faults()
    checkpoint = open_folder(folder)
    print(f"run folder: {folder.path} (recipe, metrics, plots, checkpoints)\ndevice: {device}\n\n{data.training.table()}\n")
    with ExitStack() as stack:
        stack.enter_context(ops.using(recipe.hardware.gear))
        stop = stack.enter_context(StopRequest())
        made = trainer(training, folder, device, tokenizer, data, checkpoint, make_learner)
        return stack.enter_context(closing(made)).run(stop)


def judge_modes(recipe: SFTRecipe, run_folder: str | Path) -> ModeSwitch | None:
    """How well the run's newest checkpoint keeps to the mode, written to mode_switch.json; None if nothing is to be asked."""
    data = recipe.conversations
    if not data.mode_prompts or not data.families:
        return None
    checkpoint, device = RunFolder(run_folder).newest_checkpoint(), choose_device(recipe.hardware)
    model = load_model(checkpoint, device=device.torch_device).eval()
    responses = ask(Engine(model, Tokenizer.from_pretrained(checkpoint)), data)
    found = measure(responses)
    record = {"checkpoint": checkpoint.name, **asdict(found), "responses": [asdict(one) for one in responses]}
    Path(run_folder, MODE_SWITCH).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found
