"""A Llama made recursive, in Hugging Face's Trainer: its LR tuned at N = 1, swept over N, its checkpoint loaded again.

python llama.py     # N is `loops`, a key that its config did not have
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import looptransfer as lt


class Loop(torch.nn.ModuleList):
    """Layers that are applied `loops` times by a forward which goes over a slice of them, as Llama's does."""

    def __getitem__(self, index):
        return [*self] * self.loops if isinstance(index, slice) else super().__getitem__(index)


class RecursiveLlamaForCausalLM(LlamaForCausalLM):
    """Without the KV cache, which has one place for each layer."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.model.layers = Loop(self.model.layers)
        self.model.layers.loops = config.loops


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sixteen numbers that go up by 0, 1 or 2, modulo 64."""
    numbers = torch.randint(3, (count, 16), generator=torch.Generator().manual_seed(seed)).cumsum(1) % 64
    return [{"input_ids": row, "labels": row} for row in numbers]


def train(run) -> float:
    torch.manual_seed(run.seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = RecursiveLlamaForCausalLM(LlamaConfig(vocab_size=64, loops=run.loops, use_cache=False, **sizes))
    lt.parametrize(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)}, run.rule)
    optimizer = torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=run.lr, weight_decay=0.01))
    settings = {"max_steps": 60, "per_device_train_batch_size": 16, "warmup_steps": 5, "save_strategy": "no"}
    settings |= {"seed": run.seed, "use_cpu": run.device == "cpu", "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(run.directory, **settings)
    trainer = Trainer(model, arguments, train_dataset=rows(1024, run.seed), optimizers=(optimizer, None))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()  # the plan is in its config.json
    return trainer.evaluate(rows(256, 10**6))["eval_loss"]


if __name__ == "__main__":
    best = lt.tune(train, loops=1, seeds=2, ledger="llama.db")
    print(lt.check(lt.sweep(train, [1, 4], around=best, octaves=[-2, -1, 0, 1, 2], seeds=2, ledger="llama.db")))
    loss = train(lt.Trial("factored", 4, best.lr, 0, "cpu", Path("llama")))
    model = RecursiveLlamaForCausalLM.from_pretrained("llama")  # warns: call_looptransfer_apply_plan
    lt.apply_plan(model)
    again = Trainer(model, TrainingArguments("again", use_cpu=True)).evaluate(rows(256, 10**6))["eval_loss"]
    print(f"held-out loss {loss!r} as trained, {again!r} as loaded")
