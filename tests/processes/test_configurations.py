"""The configuration files of Accelerate say what they mean, to Accelerate itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from toy import toy_lm

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def launched(name: str, *more: str) -> Any:
    """Return what `accelerate launch` makes of a file."""
    given = ["--config_file", str(FOLDER / name), "--main_process_port", "0", *more, "-m", "remanence", "run", "recipe.yaml"]
    return _validate_launch_command(launch_command_parser().parse_args(given))[0]


def test_the_files_are_these() -> None:
    assert FILES == ["cpu.yaml", "one-node.yaml", "several-nodes.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_known_to_accelerate(name: str) -> None:
    config = load_config_from_file(str(FOLDER / name))  # refuses unknown keys
    options = {action.dest for action in launch_command_parser()._actions}
    assert config.num_processes > 1
    assert set(config.fsdp_config) <= options


@pytest.mark.parametrize("name", ["one-node.yaml", "several-nodes.yaml"])
def test_gpus_are_used_through_fsdp2_that_wraps_each_block(name: str) -> None:
    args = launched(name)
    assert args.use_fsdp
    assert args.mixed_precision == "bf16"
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    with patch_environment(**{key: value for key, value in environment.items() if key.startswith("FSDP_")}):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading
    model: nn.Module = toy_lm("llama")
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.func is transformer_auto_wrap_policy
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.model.layers[0])}


def test_nodes_share_the_processes_and_meet_at_the_first() -> None:
    args = launched("several-nodes.yaml", "--machine_rank", "1", "--main_process_port", "29500")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank, args.rdzv_backend) == ("2", "8", 1, "static")
    assert args.rdzv_endpoint == "10.0.0.1:29500"


def test_cpu_file_asks_for_processes_without_a_gpu() -> None:
    config = load_config_from_file(str(FOLDER / "cpu.yaml"))
    assert (config.distributed_type, config.use_cpu, config.num_processes) == (DistributedType.MULTI_CPU, True, 2)
    args = launched("cpu.yaml")
    assert args.use_cpu
    assert not args.multi_gpu
