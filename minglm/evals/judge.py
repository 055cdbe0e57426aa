"""A suite as one judge of many models: what `ablate --stages` asks in processes of their own."""

from dataclasses import dataclass
from pathlib import Path

from minglm.checkpoint import load_model
from minglm.data.shards import open_dataset
from minglm.evals.suite import evaluate
from minglm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Judge:
    """suite, limit, window, families: as in `evaluate`."""

    suite: str
    limit: int
    window: int
    families: tuple[str, ...]

    def __call__(self, checkpoint: Path, data: Path) -> dict[str, float]:
        """A model's folder and a folder of prepared data -> value by measure; an arrow says which way is better."""
        tokenizer = Tokenizer.from_pretrained(checkpoint)
        dataset, model = open_dataset(data / "tokens", tokenizer), load_model(checkpoint).eval()
        found = evaluate(
            model, tokenizer, dataset, self.suite, self.limit, window=self.window, families_asked=self.families or None
        )
        arrows = {True: "↓", False: "↑"}
        return {f"{'/'.join(m.key[:2])}: {m.quantity} {arrows[m.lower_is_better]}": m.estimate.value for m in found.measures}
