"""The data of each stage: its stream of sequences, and what the run says about it before the first step."""

from collections.abc import Sequence

from minglm.config import ConfigError
from minglm.data.shards import Dataset
from minglm.data.sources import TRAIN
from minglm.data.stream import MixtureStream, RowStream, StreamError, TokenStream
from minglm.model import GLM
from minglm.params import count
from minglm.tokenizer import Tokenizer
from minglm.train.recipe import Recipe
from minglm.train.stages import Plan, PlannedStage


def make_stream(recipe: Recipe, stage: PlannedStage, dataset: Dataset) -> TokenStream:
    """The stage's sequences from its first one. Raises `ConfigError` that names the stage and the fix for data that it lacks.

    Stages draw by seeds of their own: a domain that two stages read comes in another order the second time.
    """
    seed = (recipe.seed + (stage.number << 56)) % 2**64
    if not recipe.stages:
        return TokenStream(dataset, TRAIN, stage.sequence_length, seed)
    for domain in stage.mixture:
        if domain not in dataset.domains:
            raise ConfigError(
                f"stages.{stage.name}.mixture: the data has no domain {domain!r}; wanted some of {', '.join(dataset.domains)}, "
                "or an ingredient in data.ingredients that makes it"
            )
    try:
        if not stage.mixture:
            return TokenStream(dataset, TRAIN, stage.sequence_length, seed)
        return MixtureStream(dataset, TRAIN, stage.sequence_length, seed, stage.mixture, stage.packing)
    except StreamError as error:
        raise ConfigError(
            f"stages.{stage.name}: {error}. Or leave the domain out of the mixture, or make the stage's sequence_length shorter"
        ) from error


def describe(plan: Plan, streams: Sequence[RowStream], recipe: Recipe, model: GLM, tokenizer: Tokenizer) -> None:
    """Say what will be done."""
    config, training = recipe.model, recipe.training
    print(
        f"model: {count(config).total:,} parameters, {config.num_hidden_layers} layers, "
        f"{config.n_routed_experts} experts of which a token uses {config.num_experts_per_tok}, "
        f"{'an' if model.mtp else 'no'} MTP layer, {tokenizer.vocab_size:,} token ids"
    )
    rows = [_sequences(plan, stage) for stage in plan.stages]
    tokens = sum(sequences * stage.sequence_length for sequences, stage in zip(rows, plan.stages, strict=True))
    if not recipe.stages:
        print(
            f"training: {plan.steps:,} steps of {training.sequences_per_step} sequences of {training.sequence_length} tokens, "
            f"{tokens:,} tokens in all ({rows[0] / streams[0].sequences_per_epoch:.2f} times the data), {recipe.optimizer.kind}"
        )
        return
    print(f"training: {plan.steps:,} steps in {len(plan.stages)} stages, {tokens:,} tokens in all, {recipe.optimizer.kind}")
    for stage, sequences, stream in zip(plan.stages, rows, streams, strict=True):
        peak = recipe.optimizer.learning_rate
        rates = [peak * plan.learning_rate_factor(step) for step in (stage.first_step, stage.last_step)]
        print(
            f"  {stage.name}: to step {stage.last_step:,}, {sequences:,} sequences of {stage.sequence_length:,} tokens "
            f"({sequences * stage.sequence_length:,}), {stage.packing}, learning rate {rates[0]:.2g} to {rates[1]:.2g}, "
            f"RoPE {stage.rope_theta:g}, MTP {stage.mtp_weight:g}, bias rate {stage.router_bias_rate:g}"
        )
        print(f"    {_shares(stage, sequences, stream)}")


def _shares(stage: PlannedStage, sequences: int, stream: RowStream) -> str:
    if not stage.mixture:
        return f"all the data, {sequences / stream.sequences_per_epoch:.2f} times"
    total, epochs = sum(stage.mixture.values()), stream.epochs(sequences)
    return ", ".join(f"{domain} {weight / total:.0%} ({epochs[domain]:.2f}x)" for domain, weight in stage.mixture.items())


def _sequences(plan: Plan, stage: PlannedStage) -> int:
    """That the stage deals in all."""
    warming = range(stage.first_step, min(stage.last_step, plan.batch_warmup_steps) + 1)
    grown = stage.sequences_per_micro_batch * sum(map(plan.micro_batches, warming))
    return grown + (stage.steps - len(warming)) * stage.sequences_per_step
