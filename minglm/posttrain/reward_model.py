"""A reward model: GLM's trunk, and one number in place of the logits, read where a conversation ends."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minglm.checkpoint import load_model
from minglm.config import ConfigError, GLMConfig
from minglm.data.stream import Batch
from minglm.model import GLM, Linear
from minglm.posttrain.sft_data import Conversation, PackedConversations
from minglm.train.prefetch import to_device

ARCHITECTURE = "Glm4MoeForSequenceClassification"  # what its config.json says that it is


class RewardModel(GLM):
    """A GLM whose head has one output, the score of what has been read so far. It has no MTP layer.

    Its folder is Hugging Face's, with a `lm_head.weight` (1, hidden_size).
    """

    def __init__(self, config: GLMConfig):
        unused = {**config.unused, "architectures": [ARCHITECTURE]}
        super().__init__(dataclasses.replace(config, num_nextn_predict_layers=0, tie_word_embeddings=False, unused=unused))
        self.lm_head = Linear(config.hidden_size, 1, bias=False)

    @classmethod
    def upon(cls, base: GLM) -> "RewardModel":
        """With the trunk of a language model, whose memory it takes over, and a head that scores everything 0."""
        with torch.device("meta"):
            model = cls(base.config)
        trunk = {name: value for name, value in base.state_dict().items() if name.startswith("model.")}
        head = trunk["model.embed_tokens.weight"].new_zeros(1, base.config.hidden_size)
        model.load_state_dict({**trunk, "lm_head.weight": head}, assign=True)
        model.expert_load = torch.zeros_like(model.expert_load, device=head.device)
        return model

    def scores(self, batch: Batch) -> Tensor:
        """Of each document, where it ends, row by row: fp32 (documents,)."""
        hidden, _, _ = self.hidden_and_side_losses(batch.input_ids, batch.labels, batch.document_ids)
        return self.scores_of(hidden, batch.document_ids)

    def scores_of(self, hidden: Tensor, document_ids: Tensor) -> Tensor:
        """The same of the states after the final norm (b, t, hidden_size)."""
        return self.lm_head(hidden[ends(document_ids)])[:, 0].float()


def ends(document_ids: Tensor) -> Tensor:
    """Where a document has its last token: (b, t) int, -1 at padding -> (b, t) bool."""
    following = torch.nn.functional.pad(document_ids[:, 1:], (0, 1), value=-1)
    return (document_ids >= 0) & (document_ids != following)


def load_reward_model(folder: Path, device: torch.device) -> RewardModel:
    """Read a checkpoint. Raises `ConfigError` if it is a language model's."""
    if GLMConfig.from_pretrained(folder).unused.get("architectures") != [ARCHITECTURE]:
        raise ConfigError(f"{folder}: no reward model; wanted a checkpoint of the reward command with bradley_terry")
    return load_model(folder, device=device, make=RewardModel)


@torch.no_grad()
def score(model: RewardModel, conversations: Sequence[Conversation], padding_id: int, tokens_at_once: int) -> list[float]:
    """Of each conversation, in order. tokens_at_once: of a batch, padding included; one conversation alone may be longer."""
    if not conversations:
        return []
    longest = max(len(one.ids) for one in conversations)
    packed = PackedConversations(conversations, longest, 0, padding_id)
    device = model.lm_head.weight.device
    found = [model.scores(to_device(batch, device)) for batch in packed.batches(max(1, tokens_at_once // longest))]
    scores = torch.empty(len(conversations))
    scores[torch.from_numpy(packed.order)] = torch.cat(found).cpu()
    return scores.tolist()
