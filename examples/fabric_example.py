"""GCondFused with Lightning Fabric, on random data."""

import torch
from lightning_fabric import Fabric

from gcond_kernels import Distributed, GCondFused

LOSSES = {"l1": torch.nn.L1Loss(), "mse": torch.nn.MSELoss()}


def prepare(fabric):
    """The model, GCondFused, and a loader."""
    x = torch.randn(160, 8)
    data = torch.utils.data.TensorDataset(x, x[:, :2] - x[:, 2:4])
    model = fabric.setup(torch.nn.Linear(8, 2))  # first, so that GCondFused sees the DDP
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = getattr(fabric.strategy.precision, "scaler", None)  # with precision="16-mixed"
    options = {"distributed": Distributed(module=model), "accumulation_steps": 8}
    gcond = GCondFused(sgd, {"l1": 0.85, "mse": 0.15}, grad_scaler=scaler, **options)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=8))
    return model, fabric.setup_optimizers(gcond), loader


def train(fabric, model, optimizer, scheduler, loader):
    """One epoch; its last window may be short."""
    for number, (x, y) in enumerate(loader, start=1):
        with fabric.autocast():
            prediction = model.module(x)  # in mixed precision model(x) asks for fabric.backward
        losses = {task: loss(prediction, y) for task, loss in LOSSES.items()}
        if optimizer.backward(losses) or number == len(loader):
            optimizer.resolve()  # what is not resolved yet: the short window at the end
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            scheduler.step()


if __name__ == "__main__":
    fabric = Fabric()
    fabric.launch()
    model, optimizer, loader = prepare(fabric)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(fabric, model, optimizer, scheduler, loader)
