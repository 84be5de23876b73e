"""GCondFused with Hugging Face Accelerate, on random data; `torchrun` starts several processes."""

import torch
from accelerate import Accelerator

from gcond_kernels import Distributed, GCondFused

LOSSES = {"l1": torch.nn.L1Loss(), "mse": torch.nn.MSELoss()}


def prepare(accelerator):
    """The model, GCondFused itself, and what Accelerate makes of it and the rest."""
    x = torch.randn(160, 8)
    data = torch.utils.data.TensorDataset(x, x[:, :2] - x[:, 2:4])
    model = accelerator.prepare(torch.nn.Linear(8, 2))  # first, so that GCondFused sees the DDP
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"distributed": Distributed(module=model), "accumulation_steps": 8}
    gcond = GCondFused(sgd, {"l1": 0.85, "mse": 0.15}, grad_scaler=accelerator.scaler, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(gcond, 0.9)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    return model, gcond, *accelerator.prepare(gcond, scheduler, loader)


def train(accelerator, model, gcond, optimizer, scheduler, loader):
    """One epoch. Where the loader ends inside a window, Accelerate synchronizes, and it ends."""
    for x, y in loader:
        with accelerator.accumulate(model):
            prediction = model(x)
            gcond.backward({task: loss(prediction, y) for task, loss in LOSSES.items()})
            if accelerator.sync_gradients:
                gcond.resolve()  # before the gradient is clipped
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    accelerator = Accelerator(gradient_accumulation_steps=8)
    parts = prepare(accelerator)
    train(accelerator, *parts)
    accelerator.print(parts[1].report().cosines)
