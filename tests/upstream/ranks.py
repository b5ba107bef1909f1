"""Processes for the parallel mixins, whose own helper is not in Transformers' source distribution."""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_rank(rank: int, function: Callable, world_size: int, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    # Transformers reads these when it makes its device mesh
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    store = dist.TCPStore("localhost", port, world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable:
    """`run_distributed(n)(function)(*arguments)` calls `function(rank, *arguments)` in n gloo processes."""

    def decorate(function: Callable) -> Callable:
        def run(*arguments) -> None:
            # made here, so that no other process can take the port
            store = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            mp.spawn(run_rank, args=(function, world_size, store.port, arguments), nprocs=world_size)

        return run

    return decorate
