"""The launcher's step at full size without memory: it holds what the layout says, and moves nothing."""

from dataclasses import replace

import pytest
from small_run import MODEL

from minglm.config import GLMConfig
from minglm.params import count
from scale.dry_run import dry_run, report
from scale.footprint import parameters_of_rank
from scale.mesh import Layout, LayoutError

GLM_45 = GLMConfig.from_toml("configs/model/glm-4.5.toml")


def test_every_rank_of_a_small_mesh_holds_its_part_and_all_parts_are_the_model():
    config = replace(MODEL, n_routed_experts=6)
    layout = Layout(1, 4, 1)
    runs = dry_run(config, layout, 16, 2, activation_checkpointing=False, ranks=range(4))
    parameters = count(config)
    assert sum(run.main for run in runs) == parameters.main and sum(run.mtp for run in runs) == parameters.mtp
    assert [run.rank for run in runs] == [0, 1, 2, 3] and len({run.main for run in runs}) > 1  # 300 rows on 4, 6 on 4, ...
    assert all(run.state_bytes < run.peak_bytes for run in runs)
    text = report(runs, config, layout)
    assert f"{parameters.total:,}" in text and "4 ranks" in text


def test_tokens_travel_only_with_expert_parallelism():
    together, apart = (dry_run(MODEL, layout, 16, ranks=[0])[0] for layout in (Layout(1, 2, 1), Layout(1, 1, 2)))
    muon = 2  # one round, there and back
    assert together.collectives["alltoall_base"][0] == muon
    # Counts, rows, weights and results of each of two MoE layers (one is the MTP's), and again, without counts, going back;
    # with activation checkpointing, which is the default, the forward exchanges once more.
    assert apart.collectives["alltoall_base"][0] == muon + 2 * (4 + 3 + 4)


def test_what_the_layout_cannot_hold_is_refused_before_a_process_starts():
    with pytest.raises(LayoutError, match="ep = 7: 160 routed experts do not divide by it"):
        dry_run(GLM_45, Layout(1, 1, 7), 4096)


@pytest.mark.slow
def test_glm_45_on_512_ranks(capsys):
    """First, middle and last rank of 512; the plan's sum over all of them is tested with the plan."""
    layout = Layout(1, 64, 8)
    runs = dry_run(GLM_45, layout, 4096, 1, True, ranks=(0, 256, 511))
    with capsys.disabled():
        print("\n" + report(runs, GLM_45, layout))
    assert [(run.main, run.mtp) for run in runs] == [parameters_of_rank(GLM_45, layout, rank) for rank in (0, 256, 511)]
    everybody = [parameters_of_rank(GLM_45, layout, rank) for rank in range(512)]
    assert tuple(map(sum, zip(*everybody, strict=True))) == (352_797_814_784, 3_988_069_632)
    assert all(run.peak_bytes < 79 * 2**30 for run in runs)
