"""`python -m ppo_rlhf` with FSDP2 on CPUs, where Accelerate silently takes DDP instead: started by torchrun.

The plugin is put where Accelerate itself puts it on GPUs; all after that is Accelerate's own code.
"""

import sys

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState

from ppo_rlhf.run import processes


def sharding(**options):
    accelerator = Accelerator(**options)
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


if __name__ == "__main__":
    processes.Accelerator = sharding
    from ppo_rlhf.cli import main

    sys.exit(main(sys.argv[1:]))
