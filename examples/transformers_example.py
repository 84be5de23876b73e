"""GCondFused in Hugging Face's Trainer, on random data; `torchrun` starts several processes."""

import torch
from transformers import Trainer, TrainingArguments

from gcond_kernels import Distributed, GCondFused

LOSSES = {"l1": torch.nn.L1Loss(), "mse": torch.nn.MSELoss()}


class TwoTasks(Trainer):
    """Trains a model on two losses that share it."""

    def create_optimizer(self, model=None):
        """Trainer's own optimizer in a GCondFused."""
        if self.optimizer is None:
            steps, scaler = self.args.gradient_accumulation_steps, self.accelerator.scaler
            options = {"accumulation_steps": steps, "grad_scaler": scaler}
            # "replicate": rank 0 saves the optimizer, without the others.
            options["distributed"] = Distributed("replicate", self.model)
            adamw = super().create_optimizer(model)
            self.gcond = self.optimizer = GCondFused(adamw, {"l1": 0.85, "mse": 0.15}, **options)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):  # noqa: ARG002  its signature
        """One micro-batch. Trainer clips and steps where it synchronizes."""
        with self.compute_loss_context_manager():
            # Not `model`: with several processes that is a DDP, made after the optimizer.
            prediction = self.model.train()(inputs["input"])
            losses = {task: loss(prediction, inputs["labels"]) for task, loss in LOSSES.items()}
        self.gcond.backward(losses)
        if self.accelerator.sync_gradients:
            self.gcond.resolve()  # before the gradient is clipped
        return sum(losses.values()).detach() / self.current_gradient_accumulation_steps


def main(folder, resume=None, **options):
    """Trains on 20 micro-batches an epoch."""
    data = [{"input": x, "labels": x[:2] - x[2:4]} for x in torch.randn(160, 8)]
    args = TrainingArguments(folder, remove_unused_columns=False, **options)
    trainer = TwoTasks(torch.nn.Linear(8, 2), args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    main("trainer_output", gradient_accumulation_steps=8, max_grad_norm=0.5, report_to="none")
