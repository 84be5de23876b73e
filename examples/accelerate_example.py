"""GCondFused with Hugging Face Accelerate, on random data."""

import torch
from accelerate import Accelerator

from gcond_kernels import GCondFused

LOSSES = {"l1": torch.nn.L1Loss(), "mse": torch.nn.MSELoss()}


def prepare(accelerator):
    """GCondFused itself, for `backward`; and what Accelerate makes of it and the rest."""
    x = torch.randn(240, 8)
    data = torch.utils.data.TensorDataset(x, x[:, :2] - x[:, 2:4])
    model = accelerator.prepare(
        torch.nn.Linear(8, 2)
    )  # first: with several processes it is wrapped
    adamw = torch.optim.AdamW(model.parameters(), lr=0.02)
    tasks = {"l1": 0.85, "mse": 0.15}  # name → loss weight
    # The scaler is there with mixed_precision="fp16", else it is None.
    gcond = GCondFused(
        adamw, tasks, accumulation_steps=4, grad_scaler=accelerator.scaler, module=model
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(gcond, 0.99)
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    return gcond, model, *accelerator.prepare(gcond, scheduler, loader)


def train(gcond, model, optimizer, scheduler, loader):
    """One epoch of 15 micro-batches; returns the last losses."""
    for x, y in loader:
        prediction = model(x)
        losses = {task: loss(prediction, y) for task, loss in LOSSES.items()}
        if gcond.backward(losses):  # in the place of accelerator.backward
            optimizer.step()  # by Accelerate, which updates the scaler
            scheduler.step()
    return {task: loss.item() for task, loss in losses.items()}


def main():
    """8 epochs; torchrun starts several processes."""
    accelerator = Accelerator()
    parts = prepare(accelerator)
    for epoch in range(8):
        print(epoch, train(*parts))
    accelerator.end_training()


if __name__ == "__main__":
    main()
