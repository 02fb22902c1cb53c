"""Names of torch's pipelining that a stage touches, one by one: a torch without one says so."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from mnemosyne.config import MeshConfig
from mnemosyne.parallel import stage as stage_file
from mnemosyne.parallel.mesh import init_mesh
from mnemosyne.parallel.stage import build_stage
from tests.ranks import run_ranks

SCHEDULE_HOOKS = ("_check_inputs", "_step_microbatches")
STAGE_HOOKS = (
    "_prepare_forward_infra",
    "clear_runtime_states",
    "forward_one_chunk",
    "get_fwd_recv_ops",
    "get_fwd_send_ops",
    "is_first",
)
STAGE_STATE = ("args_recv_info", "fwd_cache")  # made by the library when a stage is prepared
NEWER_STAGE_STATE = ("_inference_mode",)  # absent before torch 2.12, and then not needed


@pytest.mark.parametrize("name", SCHEDULE_HOOKS)
def test_the_schedule_of_this_torch_has_the_hook(name: str) -> None:
    has_it = hasattr(PipelineScheduleSingle, name)

    assert has_it, f"torch {torch.__version__}: PipelineScheduleSingle.{name} is gone"


@pytest.mark.parametrize("name", STAGE_HOOKS)
def test_the_stage_of_this_torch_has_the_hook(name: str) -> None:
    has_it = hasattr(PipelineStage, name)

    assert has_it, f"torch {torch.__version__}: PipelineStage.{name} is gone"


def missing_state() -> list[str]:
    """Attributes that a prepared stage lacks."""
    axis = init_mesh(MeshConfig(pp=2), "cpu").pp
    made = build_stage(axis, 4, width=8, dtype=torch.float32)
    return [name for name in STAGE_STATE if not hasattr(made._our_stage, name)]


def test_a_prepared_stage_of_this_torch_holds_its_state() -> None:
    for missing in run_ranks(missing_state, 2):
        assert missing == [], f"torch {torch.__version__}: a PipelineStage has no {missing}"


def test_no_other_hook_is_touched_and_no_other_file_touches_one() -> None:
    named = {*SCHEDULE_HOOKS, *STAGE_HOOKS, *STAGE_STATE, *NEWER_STAGE_STATE}
    tree = ast.parse(inspect.getsource(stage_file))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    touched = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("self", "stage", "self._our_stage")
    }
    package = Path(stage_file.__file__).parents[1]
    others = [path for path in package.rglob("*.py") if "pipelining" in path.read_text("utf-8")]

    assert touched - own - {"_our_stage"} == named - own
    assert others == [Path(stage_file.__file__)]
