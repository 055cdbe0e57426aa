"""Two families that a tiny model learns in seconds, and the smallest expert iteration that has everything."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minglm.checkpoint import save_model
from minglm.config import GLMConfig
from minglm.model import GLM
from minglm.posttrain.experts.paths import compare
from minglm.posttrain.experts.pipeline import experts
from minglm.posttrain.experts.recipe import Exam, ExpertsRecipe, Harvest
from minglm.posttrain.recipe import Conversations, SFTRecipe
from minglm.rl.objective import named
from minglm.rl.recipe import RLRecipe, Sampling, Tasks
from minglm.tasks import FAMILIES
from minglm.tasks.task import Problem, Verdict, final_content, reply
from minglm.tokenizer import train_tokenizer
from minglm.train.recipe import Checkpoints, Evaluation, Hardware, Optimizer, Schedule, Training

HARDWARE = Hardware(device="cpu", gear="exact")


@dataclass(frozen=True)
class SayYes(Problem):
    """Any number wants one word; the tokens of it are the only thing to learn."""

    number: int
    family = "say_yes"
    word = "yes"
    stands_for = "nothing"
    difficulties = range(1, 3)
    chance = 0.0

    @classmethod
    def sample(cls, rng, difficulty):
        return cls(rng.randrange(1000))

    @property
    def messages(self):
        return [{"role": "user", "content": f"{self.word} {self.number}"}]

    def demonstrate(self, thinking):
        return reply(self.word, "so" if thinking else None)

    def verify(self, response):
        return Verdict(float(final_content(response).strip() == self.word))

    def near_miss(self, rng):
        return reply("maybe")

    def guess(self, rng):
        return reply("maybe")


class SayNo(SayYes):
    family = "say_no"
    word = "no"


def know_families() -> None:
    """In the registry of this process."""
    FAMILIES.update(say_yes=SayYes, say_no=SayNo)


def write_base(folder: Path) -> Path:
    tokenizer = train_tokenizer(["yes 3 no 4 so maybe 0123456789"] * 4, 300, show_progress=False)
    torch.manual_seed(0)
    model = GLM(
        GLMConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            max_position_embeddings=512,
        )
    )
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_recipe(base: Path, **changes: object) -> ExpertsRecipe:
    start = SFTRecipe(
        conversations=Conversations(samples=40, families=("say_yes", "say_no"), mode_prompts=0),
        training=Training(sequence_length=48, sequences_per_step=4, sequences_per_micro_batch=4, steps=40),
        optimizer=Optimizer(learning_rate=2e-2),
        schedule=Schedule(warmup_steps=2),
        evaluation=Evaluation(every=40, tokens=100),
        checkpoints=Checkpoints(every=20),
        hardware=HARDWARE,
    )
    rl = RLRecipe(
        Tasks({"say_yes": (1,)}),
        steps=2,
        sampling=Sampling(group_size=4, groups=4, tokens=6, rounds=1, context=40),
        objective=named("reinforce++"),
        tokens_at_once=700,
        evaluate_every=0,
        evaluation_problems=2,
        hardware=HARDWARE,
    )
    recipe = ExpertsRecipe(
        start=start,
        experts={"reasoning": rl, "agent": replace(rl, tasks=Tasks({"say_no": (1,)}))},
        harvest=Harvest(problems=6, responses=3),
        unified_sft=replace(start, conversations=replace(start.conversations, automatic=0.5, file_share=1.0)),
        unified_rl=replace(rl, tasks=Tasks({"say_yes": (1,), "say_no": (1,)})),
        base=base,
        exam=Exam(problems=4),
        hardware=HARDWARE,
    )
    return replace(recipe, **changes)


def run_experts(recipe: ExpertsRecipe, folder: Path) -> None:
    torch.set_num_threads(1)
    know_families()
    experts(recipe, folder)


def run_compare(recipe: ExpertsRecipe, folder: Path) -> None:
    torch.set_num_threads(1)
    know_families()
    compare(recipe, folder)
