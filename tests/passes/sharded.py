"""llmopt as accelerate runs it with FSDP2, but on processors: torch shards there too, accelerate only on GPUs."""

import sys

from accelerate import state
from accelerate.utils import DistributedType

_begin = state.AcceleratorState.__init__


def _begin_sharded(self, *arguments, fsdp_plugin=None, **options):
    first = not self.initialized
    _begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if first and fsdp_plugin is not None:
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


if __name__ == "__main__":
    state.AcceleratorState.__init__ = _begin_sharded
    from llmopt.__main__ import main

    sys.exit(main())
