"""Processes that wait for work, joined in a gloo process group: a pool for all tests of a size."""

import multiprocessing
import os
import pickle
import traceback
from datetime import timedelta

import torch

TIMEOUT = timedelta(seconds=60)


class Ranks:
    """`size` processes; calling it runs a function in all of them and returns what each returns."""

    def __init__(self, size, folder, backend="gloo"):
        pairs = [multiprocessing.Pipe() for _ in range(size)]
        self.pipes = [here for here, _ in pairs]
        there = [pipe for _, pipe in pairs]
        arguments = [(str(folder / "store"), pipe, backend) for pipe in there]
        self.processes = start(size, serve, arguments)
        for pipe in there:
            pipe.close()

    def __call__(self, function, *args):
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(100), f"rank {rank} does not answer"
            results.append(pickle.loads(pipe.recv_bytes()))
        failed = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(results) if not fine]
        assert not failed, "\n".join(failed)
        return [result for _, result in results]

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def start(size, function, arguments):
    """Processes that run `function(rank, size, *arguments[rank])`."""
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import, and is imported by the first optimizer or model of its kind.
    context.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "pytest"]
    )
    processes = []
    for rank in range(size):
        process = context.Process(target=function, args=(rank, size, *arguments[rank]), daemon=True)
        process.start()
        processes.append(process)
    return processes


def serve(rank, size, store, pipe, backend):
    join(rank, size, store, backend=backend)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            torch.distributed.destroy_process_group()
            return
        forget_groups()
        try:
            result = True, function(*args)
        except BaseException:
            result = False, traceback.format_exc()
        # By value: what torch sends otherwise are handles of memory that this process may free.
        pipe.send_bytes(pickle.dumps(result))


def forget_groups():
    """Ends the groups that optimizers of earlier work have made: each holds threads and sockets."""
    dist = torch.distributed
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.group_desc.startswith("gcond_kernels"):
            dist.destroy_process_group(group)


def join(rank, size, store, timeout=TIMEOUT, backend="gloo"):
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    else:
        os.environ["GCOND_CUDA_HOST"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
    )
