# SPDX-License-Identifier: Apache-2.0
"""MTPDataModule: the LightningDataModule around the data layer. It asks the module for what the model owns."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import Any

from lightning import LightningDataModule, Trainer

from mtp_lightning.data.chat import read_template
from mtp_lightning.data.collator import MaskedInputCollator
from mtp_lightning.data.documents import Encoder
from mtp_lightning.data.loader import WindowedLoader, build_dataloader
from mtp_lightning.data.preparing import Prepared, Sources, prepare
from mtp_lightning.data.rows import TokenRows
from mtp_lightning.data.streaming import RowStream, StreamingLoader
from mtp_lightning.errors import UsageError

_SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
_EVALUATION_SEED = 0  # constant, as its epoch: validation places the same blocks in every run


class MTPDataModule(LightningDataModule):
    """Rows of tokens with mask blocks, for training and evaluation.

    A source is a file (.jsonl, .json, .parquet, .txt), a glob, a folder, ``package://demo/train.parquet`` for a file
    shipped with mtp-lightning, or a hub id: ``owner/name``, ``owner/name/config``, each with ``:split`` (default
    train). Rows are recognised by their fields: messages | prompt + completion (or completion_ids) | text | input_ids
    (+ labels) | conversations | instruction + output; an optional field domain names their domain.

    Args:
        train: a source, a list of sources, or a weighted mix: source -> share of the rows drawn in an epoch, before long
            rows are cut; a source with too few rows is repeated.
        validation: the same, for validation. None: see validation_fraction.
        test: the same, for testing.
        validation_fraction: without a validation source, hold out this share of the training rows for it: the same rows in
            every run.
        max_length: maximum tokens in a row, or the base's context if that is less. Longer texts are split into rows, longer
            prompts and chats lose their end.
        batch_size: rows in a batch, for each device.
        eval_batch_size: the same for validation and testing. None: batch_size.
        block_fraction: share of the eligible starts that get a block in training; 1.0 is the paper's full coverage.
        max_blocks_per_row: maximum number of blocks in a row in training, or None.
        eval_max_blocks_per_row: maximum number of blocks in a row in validation and testing, or None; always the same ones.
        packing: put several documents in a row of up to max_length tokens. They do not see each other.
        num_workers: processes that prepare batches in advance; 0: the training process does. The batches are the same.
        seed: seed of the order of the rows, of the mix and of the block starts. None: seed_everything, or 0 without it.
        max_rows: maximum number of training rows to read, evenly spaced over the sources. For quick runs.
        eval_max_rows: the same for validation and testing.
        chat_template: a jinja file for rows with messages, best with {% generation %} markers. None: the base's own.
        streaming_rows: read the training data as a stream that is never whole in memory or on disk; this number of rows
            forms an epoch, shuffled among themselves, and the next epoch continues where it ended. None: read all first.

    Attributes:
        rows: split -> its token rows, after ``setup``.
        report: split -> what became of the rows read, after ``setup``: plain values, see ``preparing.Report``.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: Sources | None = None,
        test: Sources | None = None,
        validation_fraction: float = 0.0,
        max_length: int = 2048,
        batch_size: int = 1,
        eval_batch_size: int | None = None,
        block_fraction: float = 1.0,
        max_blocks_per_row: int | None = None,
        eval_max_blocks_per_row: int | None = 16,
        packing: bool = False,
        num_workers: int = 0,
        seed: int | None = None,
        max_rows: int | None = None,
        eval_max_rows: int | None = None,
        chat_template: str | None = None,
        streaming_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.train = train
        self.validation = validation
        self.test = test
        self.validation_fraction = validation_fraction
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.block_fraction = block_fraction
        self.max_blocks_per_row = max_blocks_per_row
        self.eval_max_blocks_per_row = eval_max_blocks_per_row
        self.packing = packing
        self.num_workers = num_workers
        # Lightning's seed_everything leaves its seed there, for the processes that it starts too.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.max_rows = max_rows
        self.eval_max_rows = eval_max_rows
        self.chat_template = chat_template
        self.streaming_rows = streaming_rows
        self.rows: dict[str, TokenRows] = {}
        self.report: dict[str, dict[str, Any]] = {}
        self._prepared_stages: set[str] = set()
        self._streaming_loader: StreamingLoader | None = None
        self._check()

    def _check(self) -> None:
        minimum = {"max_length": 2, "num_workers": 0, "seed": 0}
        positive = (
            "batch_size eval_batch_size max_blocks_per_row eval_max_blocks_per_row max_rows eval_max_rows streaming_rows"
        )
        minimum |= dict.fromkeys(positive.split(), 1)
        for name, least in minimum.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"data.{name} must be {least} or more, got {value}.")
        if not 0 < self.block_fraction <= 1:
            raise UsageError(f"data.block_fraction must be above 0 and at most 1, got {self.block_fraction}.")
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(f"data.validation_fraction must be from 0 to below 1, got {self.validation_fraction}.")
        if self.validation is not None and self.validation_fraction:
            raise UsageError("data.validation and data.validation_fraction are both set: leave one of them out.")
        for name in ("validation_fraction", "max_rows"):
            if self.streaming_rows is not None and getattr(self, name):
                raise UsageError(f"data.{name} needs all rows, data.streaming_rows reads a stream: leave one of them out.")

    def prepare_data(self) -> None:
        """Read and encode everything once, on one process of each machine; ``setup`` then finds it in the cache."""
        trainer, _ = self._attached()
        if trainer.world_size > 1 and trainer.state.fn is not None:  # a single process does it in setup
            self._prepare(trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        """Make the token rows of a stage: fit, validate, test or predict."""
        if stage in self._prepared_stages:
            return
        for split, prepared in self._prepare(stage).items():
            self._open(split, prepared, f"data.{split}")
        self._prepared_stages.add(stage)

    def _prepare(self, stage: str) -> dict[str, Prepared]:
        """Split -> its rows, of the splits that the stage needs."""
        splits = _SPLITS.get(stage, ())
        if self.streaming_rows is not None:
            splits = tuple(split for split in splits if split != "train")
        holds_out = self.validation_fraction > 0 and "validation" in splits
        prepared: dict[str, Prepared] = {}
        if "train" in splits or holds_out:
            held_out = self.validation_fraction if holds_out else 0.0
            prepared["train"], validation = self._read("train", self.max_rows, held_out)
            if validation is not None:
                prepared["validation"] = validation
        for split in splits:
            # Training without validation is allowed; every other split needs its source.
            if split not in prepared and (getattr(self, split) is not None or stage != "fit"):
                prepared[split], _ = self._read(split, self.eval_max_rows)
        return {split: prepared[split] for split in splits if split in prepared}

    def _read(self, split: str, max_rows: int | None, held_out: float = 0.0) -> tuple[Prepared, Prepared | None]:
        sources = self._sources(split)  # limits max_length
        return prepare(
            sources,
            self._attached()[1].tokenizer,
            max_length=self.max_length,
            name=f"data.{split}",
            chat_template=self._template_source(),
            vocab_size=self._attached()[1].vocab_size,
            packing=self.packing,
            max_rows=max_rows,
            seed=self.seed,
            held_out=held_out,
            max_held_out=self.eval_max_rows,
            workers=self.num_workers,
        )

    def _sources(self, split: str) -> Sources:
        sources: Sources | None = getattr(self, split)
        if sources is None:
            raise UsageError(f"data.{split} must name a source for this command, got nothing.")
        trainer, module = self._attached()
        if module.context is not None and self.max_length > module.context:
            if trainer.is_global_zero:
                print(
                    f"data.max_length: {module.context}, the base's context, instead of {self.max_length}", file=sys.stderr
                )
            self.max_length = module.context
        return sources

    def _template_source(self) -> str | None:
        return None if self.chat_template is None else read_template(self.chat_template, "data.chat_template")

    def _attached(self) -> tuple[Trainer, Any]:
        """The trainer and its module, which owns tokenizer, num_masks and context: none of them is an argument here."""
        if self.trainer is None:
            raise UsageError("MTPDataModule takes the tokenizer from the module: attach both to a Trainer before setup.")
        return self.trainer, self.trainer.lightning_module

    def _open(self, split: str, prepared: Prepared, title: str) -> WindowedLoader:
        """Take over the rows of a split, and print their report."""
        self.rows[split] = prepared.rows
        loader = self._loader(split)
        prepared.report.padding_share = loader.row_sampler().padding_share()
        self.report[split] = asdict(prepared.report)
        if self._attached()[0].is_global_zero:
            print(f"{title}: {prepared.report}", file=sys.stderr)
        return loader

    def _ranks(self) -> tuple[int, int]:
        """Index of this rank and number of ranks."""
        trainer, _ = self._attached()
        # The strategy's word counts where several devices share the work on one batch.
        ranks = trainer.distributed_sampler_kwargs or {"rank": trainer.global_rank, "num_replicas": trainer.world_size}
        return ranks["rank"], ranks["num_replicas"]

    def _loader(self, split: str) -> WindowedLoader:
        trainer, module = self._attached()
        training = split == "train"
        seed = self.seed if training else _EVALUATION_SEED
        rank, world = self._ranks()
        collator = MaskedInputCollator(
            num_masks=module.num_masks,
            block_fraction=self.block_fraction if training else 1.0,
            max_blocks_per_row=self.max_blocks_per_row if training else self.eval_max_blocks_per_row,
            seed=seed,
            context=module.context,
        )
        loader = build_dataloader(
            self.rows[split],
            collator,
            self.batch_size if training else self.eval_batch_size,
            seed=seed,
            rank=rank,
            world=world,
            bucketed=not self.packing,
            num_workers=self.num_workers,
        )
        if not training:
            return WindowedLoader(loader, constant=True)
        limit = trainer.limit_train_batches
        return WindowedLoader(
            loader,
            accumulate=lambda: trainer.accumulate_grad_batches,
            limit=limit if isinstance(limit, int) else int(len(loader) * limit),
            constant=getattr(trainer, "overfit_batches", 0) > 0,
            epoch=trainer.current_epoch,
        )

    def train_dataloader(self) -> WindowedLoader | StreamingLoader:
        """Training batches, a new order and new block starts every epoch."""
        if self.streaming_rows is None:
            return self._loader("train")
        if self._streaming_loader is None:  # it holds the position, so there is only one
            module = self._attached()[1]
            sources = self._sources("train")
            encoder = Encoder(module.tokenizer, self.max_length, self._template_source(), module.vocab_size)
            self._streaming_loader = StreamingLoader(
                RowStream(sources, encoder, packing=self.packing),
                rows=self.streaming_rows,
                batch_rows=self.batch_size * self._ranks()[1],
                open_epoch=lambda epoch, prepared: self._open("train", prepared, f"data.train, epoch {epoch}"),
            )
        return self._streaming_loader

    def val_dataloader(self) -> WindowedLoader | list[Any]:
        """Validation batches, the same every time; none where there is no validation source."""
        return self._loader("validation") if "validation" in self.rows else []

    def test_dataloader(self) -> WindowedLoader:
        """Test batches, the same every time."""
        return self._loader("test")
