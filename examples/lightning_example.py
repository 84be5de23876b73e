"""GCondFused in PyTorch Lightning, by manual optimization, on random data."""

import pytorch_lightning as pl
import torch

from gcond_kernels import GCondFused

LOSSES = {"l1": torch.nn.L1Loss(), "mse": torch.nn.MSELoss()}


class TwoTasks(pl.LightningModule):
    """A linear model with two losses that share it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.model = torch.nn.Linear(8, 2)

    def configure_optimizers(self):
        """GCondFused around any optimizer; the scheduler takes it as it is."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # with precision="16-mixed"
        adamw = torch.optim.AdamW(self.parameters(), lr=0.02)
        tasks = {"l1": 0.85, "mse": 0.15}  # name → loss weight
        optimizer = GCondFused(
            adamw, tasks, accumulation_steps=4, grad_scaler=scaler, module=self.trainer.model
        )
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)]

    def training_step(self, batch, batch_idx):
        """One micro-batch; with the window's last one a step."""
        prediction, optimizer = self.model(batch[0]), self.optimizers()
        losses = {task: loss(prediction, batch[1]) for task, loss in LOSSES.items()}
        self.log_dict(losses, prog_bar=True)
        if optimizer.backward(losses):  # in the place of self.manual_backward
            optimizer.step()  # counted: trainer.global_step
            self.lr_schedulers().step()


def main(ckpt_path=None, devices=1, **options):
    """Trains for 8 epochs of 15 micro-batches."""
    x = torch.randn(240, 8)
    data = torch.utils.data.TensorDataset(x, x[:, :2] - x[:, 2:4])
    trainer = pl.Trainer(max_epochs=8, devices=devices, **options)
    trainer.fit(TwoTasks(), torch.utils.data.DataLoader(data, batch_size=16), ckpt_path=ckpt_path)
    print(trainer.global_step, "steps;", trainer.optimizers[0].report().cosines)


if __name__ == "__main__":
    main(logger=False, enable_checkpointing=False)
