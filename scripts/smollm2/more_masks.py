# SPDX-License-Identifier: Apache-2.0
r"""Adds mask tokens to a trained adapter of SmolLM2-135M-Instruct: trains their embeddings alone, all else stays as it is.

    python scripts/smollm2/more_masks.py pretrained/smollm2-135m --num_masks 8 \
        --train answers.jsonl --validation held_out.jsonl
    mtp export --ckpt_path runs/more_masks --dtype bfloat16 --output saved

An embedding has 576 numbers, so a few hundred steps do. Decoding with the masks of before keeps its drafts to the last bit.
"""

import argparse

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from mtp_lightning import MTPDataModule, MTPModule
from mtp_lightning.callbacks.steps_progress_bar import StepsProgressBar
from mtp_lightning.losses import AnchorDistillation, LatentConsistency
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.saving.load import read_parts
from mtp_lightning.schedules import WarmupCosine


class NewMasks(MTPModule):
    """Trains the mask embeddings after the first ``num_kept`` alone."""

    num_kept = 0

    def configure_model(self) -> None:
        """Build the model, then freeze all but the new embeddings."""
        is_built = self.model is not None
        super().configure_model()
        if is_built:
            return
        self.model.requires_grad_(False)
        embeddings = self.model.mask_embeddings.requires_grad_()
        is_new = torch.arange(len(embeddings)) >= self.num_kept  # without weight decay no gradient means no change
        embeddings.register_hook(lambda gradient: gradient * is_new[:, None].to(gradient))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="the folder or run to start from, of configs/smollm2.yaml")
    parser.add_argument("--num_masks", type=int, default=8, help="masks in a block, old and new")
    parser.add_argument("--train", required=True, help="answers of the base, from mtp distill")
    parser.add_argument("--validation", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=0.004)
    parser.add_argument("--output", default="runs/more_masks")
    options = parser.parse_args()
    num_kept = read_parts(options.adapter).num_masks
    if options.num_masks <= num_kept:
        parser.error(f"--num_masks must be above {num_kept}, the number that {options.adapter} has")

    seed_everything(0)
    module = NewMasks(
        base_model="bases/smollm2-135m",
        dtype="bfloat16",
        num_masks=options.num_masks,
        lora=LoRA(rank=32),
        sampler_head=GRUSamplerHead(hidden_size=576, read_hidden=True, normalize=True),
        init_from=options.adapter,
        losses={
            "base": AnchorDistillation(head="base"),
            "sampler": AnchorDistillation(head="sampler"),
            "lcm": LatentConsistency(),
        },
        optimizer=lambda named: torch.optim.AdamW([p for _, p in named], lr=options.learning_rate, weight_decay=0.0),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, warmup_steps=5, floor=0.05),
    )
    module.num_kept = num_kept
    data = MTPDataModule(
        train=options.train,
        validation=options.validation,
        max_length=256,
        batch_size=2,
        max_blocks_per_row=256 // options.num_masks,
    )
    trainer = Trainer(
        precision="bf16-mixed",
        devices=1,
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        val_check_interval=options.steps,
        check_val_every_n_epoch=None,
        log_every_n_steps=10,
        default_root_dir=options.output,
        callbacks=[
            ModelCheckpoint(f"{options.output}/checkpoints", filename="best", enable_version_counter=False),
            StepsProgressBar(),
        ],
    )
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
