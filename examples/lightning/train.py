"""A looped decoder in Lightning: its LR tuned at N = 1 and swept over N; checkpoints, EMA and Monitor.

python train.py     # pip install pytorch-lightning
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

import looptransfer as lt


def rows(count: int, seed: int) -> torch.utils.data.DataLoader:
    """Numbers that go up by 0, 1 or 2, modulo 64."""
    numbers = torch.randint(3, (count, 17), generator=torch.Generator().manual_seed(seed)).cumsum(1) % 64
    return torch.utils.data.DataLoader(numbers, batch_size=16)


class Counting(pl.LightningModule):
    def __init__(self, rule: lt.Rule, loops: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model, tokens = lt.LoopedDecoder(width=32, heads=2, loops=loops), next(iter(rows(1, 0)))
        self.plan = lt.parametrize(self.model, tokens[:, :-1], rule)
        self.monitor = lt.Monitor(self.model, tokens[:, :-1], loss=lambda logits: self.loss(logits, tokens))

    def loss(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lt.param_groups(self.model, torch.optim.AdamW, lr=self.hparams.lr, weight_decay=0.1))

    def training_step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model(tokens[:, :-1]), tokens)

    def on_train_batch_end(self, *_) -> None:
        self.log_dict(self.monitor(self.global_step))

