"""GCondFused in PyTorch Lightning, by manual optimization, on random data."""

import pytorch_lightning as pl
import torch

from gcond_kernels import Distributed, GCondFused

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
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        options = {"distributed": Distributed(module=self.trainer.model), "accumulation_steps": 8}
        optimizer = GCondFused(sgd, {"l1": 0.85, "mse": 0.15}, grad_scaler=scaler, **options)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def training_step(self, batch, batch_idx):  # noqa: ARG002  Lightning calls it so
        """One micro-batch; with the last one of a window or of the epoch a step."""
        prediction, optimizer = self.model(batch[0]), self.optimizers()
        losses = {task: loss(prediction, batch[1]) for task, loss in LOSSES.items()}
        if optimizer.backward(losses) or self.trainer.is_last_batch:
            optimizer.resolve()  # what is not resolved yet: the short window at the end
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()  # counted: trainer.global_step
            self.lr_schedulers().step()


def fit(trainer, ckpt_path=None):
    """Trains on 20 micro-batches an epoch."""
    x = torch.randn(160, 8)
    data = torch.utils.data.TensorDataset(x, x[:, :2] - x[:, 2:4])
    trainer.fit(TwoTasks(), torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=ckpt_path)


if __name__ == "__main__":
    fit(pl.Trainer(max_epochs=1, precision="bf16-mixed", logger=False, enable_checkpointing=False))
