"""The demo's two overlaid digits, trained by several ranks.

torchrun --nproc-per-node 2 examples/torchrun_digits.py          # DistributedDataParallel
torchrun --nproc-per-node 2 examples/torchrun_digits.py --fsdp   # fully sharded

On CPUs or, where there are as many, on GPUs. With --checkpoint FOLDER it is saved there, and goes
on from there when called again, with as many ranks as you then give it.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from demo.digits import Digits
from demo.scenes import Batch
from rich.progress import track
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gcond_kernels import Distributed, GCondFused, TrainingState


def options() -> argparse.Namespace:
    """Return what the user asks for."""
    parser = argparse.ArgumentParser(description="Two overlaid digits on several ranks.")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (150)")
    parser.add_argument("--strategy", choices=("shard", "replicate"), help="shard by default")
    parser.add_argument("--fsdp", action="store_true", help="fully_shard instead of DDP")
    parser.add_argument("--checkpoint", help="folder to save to and to go on from")
    given = parser.parse_args()
    if given.fsdp and given.strategy:
        parser.error("--strategy is for DDP: with --fsdp the backward pass reduces gradients")
    return given


def train(given: argparse.Namespace, scene: Digits, device: torch.device) -> None:
    """Train with micro-batches of this rank's own; all ranks decide the same."""
    torch.manual_seed(0)
    model = scene.new_model().to(device)
    if given.fsdp:
        fully_shard(model.trunk)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    adamw = torch.optim.AdamW(model.named_parameters(), lr=scene.learning_rate, betas=(0.9, 0.95))
    optimizer = GCondFused(
        adamw,
        scene.tasks,
        accumulation_steps=scene.accumulation_steps,
        distributed=Distributed(given.strategy, model),
    )
    steps = torch.zeros((), dtype=torch.int64)
    if given.checkpoint:
        state = {"training": TrainingState(model, optimizer), "steps": steps}
    if given.checkpoint and os.path.exists(f"{given.checkpoint}/.metadata"):
        dcp.load(state, checkpoint_id=given.checkpoint)
        print(f"rank {dist.get_rank()} goes on after step {steps}")
    if steps >= given.steps:
        print("there is nothing left to do: give more --steps")
        return

    generator = torch.Generator().manual_seed(1000 * int(steps) + dist.get_rank())
    for _ in track(range(int(steps), given.steps), "training", disable=dist.get_rank() > 0):
        for _ in range(scene.accumulation_steps):
            batch = scene.micro_batch(generator).to(device)
            losses = scene.losses(model, batch, scene.tasks)
            losses = {task: values.mean() for task, values in losses.items()}
            if optimizer.backward(losses):
                optimizer.step()
        steps += 1
    if given.checkpoint:
        dcp.save(state, checkpoint_id=given.checkpoint)
    show(scene, model, optimizer, scene.validation.to(device))


@torch.no_grad()
def show(scene: Digits, model: torch.nn.Module, optimizer: GCondFused, validation: Batch) -> None:
    """Print the scores, and whether all ranks have come to the same."""
    output = model(validation.inputs)
    report = optimizer.report()
    mine = (report.weights, report.winners, output.double().sum().item())
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    if dist.get_rank() > 0:
        return
    for task, label in scene.score_labels.items():
        score = scene.score(task, output, validation.targets).mean().item()
        print(f"{label}: {100 * score:.1f} %")
    print(f"cosine in the last step: {report.min_cosine:+.3f}; weights: {report.weights}")
    for what, index in (("decision", 0), ("winners", 1), ("model", 2)):
        same = all(one[index] == mine[index] for one in of_ranks)
        print(f"{what}: {'the same' if same else 'NOT the same'} on {len(of_ranks)} ranks")


def main() -> None:
    """Train on the GPU of this rank where there are enough of them, else on the CPU."""
    given = options()
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start it with torchrun: see the first lines of this file")
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    train(given, Digits(), device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
