"""What some ranks saved, any other number of ranks reads; and a Hugging Face folder comes out of it."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from small_run import MODEL
from spread import nano_recipe, on_ranks, spread_learner, take_steps

from minglm.checkpoint import CheckpointError
from minglm.model import GLM
from scale.checkpoint import CHECKSUMS, FOLDER, check
from scale.export import main as export
from scale.mesh import Layout

SMALL = replace(MODEL, n_routed_experts=6)  # four ranks cut them by rows, two and three whole
RECIPE = replace(nano_recipe(), model=SMALL)


def whole(learner) -> dict[str, torch.Tensor]:
    """All that a checkpoint keeps, gathered from all ranks."""
    tensors = {part.name: part.whole(part.local).full_tensor() for part in learner.parts}
    for name, key, tensor, part in learner.optimizer.state_parts():
        tensors[f"{name}/{key}"] = tensor.clone() if part is None else part.whole(tensor).full_tensor()
    for number, router in enumerate(learner.model.routers()):
        tensors[f"router {number}"] = router.e_score_correction_bias.clone()
    return tensors


def train_and_save(layout: Layout, folder: Path, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    learner = spread_learner(layout, RECIPE)
    take_steps(learner, range(3))
    with learner.writing(folder / "step-3") as aside:
        assert learner.save(aside) == {}
    tensors, numbers = whole(learner), take_steps(learner, range(3, 6))
    if dist.get_rank() == 0:
        torch.save((tensors, numbers), folder / "wanted.pt")
        torch.save(dict(learner.model.state_dict()) if layout.world_size == 1 else {}, folder / "state.pt")


def load_and_go_on(layout: Layout, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    learner = spread_learner(layout, RECIPE, folder / "step-3")
    learner.load(folder / "step-3", {})
    wanted, (numbers, biases) = torch.load(folder / "wanted.pt")
    found = whole(learner)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    found_numbers, found_biases = take_steps(learner, range(3, 6))
    torch.testing.assert_close(found_numbers, numbers, rtol=1e-6, atol=1e-6)
    assert torch.equal(found_biases, biases)


def test_saved_on_four_ranks_it_goes_on_on_two_and_on_one(tmp_path):
    """Every weight, momentum and bias comes back to the bit, in any layout, and the following losses are the same."""
    on_ranks(4, train_and_save, Layout(1, 4, 1), tmp_path, torch.float64)
    for layout in (Layout(1, 1, 2), Layout(1, 2, 1), Layout(2, 1, 1), Layout(1, 1, 1)):
        on_ranks(layout.world_size, load_and_go_on, layout, tmp_path)


def test_saved_with_copies_and_experts_apart_it_goes_on_on_three_ranks(tmp_path):
    recipe_sequences = RECIPE.training.sequences_per_step
    assert recipe_sequences % 4 == 0
    on_ranks(4, train_and_save, Layout(2, 1, 2), tmp_path, torch.float64)
    on_ranks(4, load_and_go_on, Layout(1, 2, 2), tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a checkpoint of two ranks, in float32."""
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(2, train_and_save, Layout(1, 1, 2), folder, torch.float32)
    return folder


def test_the_exported_folder_has_the_same_logits_in_transformers(saved, tmp_path):
    assert export([str(saved / "step-3"), str(tmp_path / "model")]) == 0
    tensors, _ = torch.load(saved / "wanted.pt")
    ours = GLM.from_pretrained(tmp_path / "model")
    assert ours.mtp is not None
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    for number, router in enumerate(ours.routers()):
        assert torch.equal(router.e_score_correction_bias, tensors[f"router {number}"])
        assert router.e_score_correction_bias.count_nonzero()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.randint(0, SMALL.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_an_export_in_bf16_keeps_the_biases_in_fp32(saved, tmp_path):
    assert export([str(saved / "step-3"), str(tmp_path / "model"), "--dtype", "bf16"]) == 0
    state = GLM.from_pretrained(tmp_path / "model").state_dict()
    dtypes = {tensor.dtype for name, tensor in state.items() if not name.endswith("correction_bias")}
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("correction_bias")} == {torch.float32}


def lose_a_file(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)


def cut_a_file(folder: Path) -> None:
    data = (folder / "__1_0.distcp").read_bytes()
    (folder / "__1_0.distcp").write_bytes(data[: len(data) // 2])


def lose_the_contents(folder: Path) -> None:
    (folder / ".metadata").unlink()


def spoil_the_contents(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"\x80\x04nonsense")


def lose_the_checksums(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_file, r"1 of its 3 files are missing: __1_0.distcp; copy .* or delete .*step-3 to go on"),
        (flip_a_bit, r"__0_0.distcp: damaged, its sha256"),
        (cut_a_file, r"__1_0.distcp: damaged, its sha256"),
        (lose_the_contents, r"\.metadata: missing; wanted a checkpoint of `scale.train`"),
        (spoil_the_contents, r"\.metadata: damaged"),
        (lose_the_checksums, rf"{CHECKSUMS}: missing or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(saved, tmp_path, capsys, spoil, message):
    shutil.copytree(saved / "step-3", tmp_path / "step-3")
    check(tmp_path / "step-3", SMALL)
    spoil(tmp_path / "step-3" / FOLDER)
    with pytest.raises(CheckpointError, match=message):
        check(tmp_path / "step-3", SMALL)
    assert export([str(tmp_path / "step-3"), str(tmp_path / "model")]) == 2
    assert "scale.export: " in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_the_ranks_together_look_at_every_file(saved, tmp_path):
    shutil.copytree(saved / "step-3", tmp_path / "step-3")
    flip_a_bit(tmp_path / "step-3" / FOLDER)
    refused = 0
    for rank in range(3):
        try:
            check(tmp_path / "step-3", SMALL, rank, 3)
        except CheckpointError:
            refused += 1
    assert refused == 1


def test_a_checkpoint_of_another_model_is_refused_by_name(saved):
    with pytest.raises(CheckpointError, match=r"model.lm_head.weight is \(300, 16\), wanted \(301, 16\)"):
        check(saved / "step-3", replace(SMALL, vocab_size=301))


def test_the_checksums_are_those_of_all_files(saved):
    folder = saved / "step-3" / FOLDER
    names = {path.name for path in folder.iterdir()} - {CHECKSUMS}
    assert json.loads((folder / CHECKSUMS).read_text()).keys() == names
    assert pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
