# SPDX-License-Identifier: Apache-2.0
"""What this package reads from the inside of Lightning's loop; no other file does.

Tried with lightning 2.5.0 to 2.6.6. Where a private attribute is missing, each function falls back to a public way that is
less exact or slower; ``tests/training/test_lightning_private.py`` says which one changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The module's trainer, or None outside of a run, where Lightning's own property raises."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def is_accumulating(trainer: Trainer) -> bool:
    """True while the current training batch does not complete an optimizer step."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    last_of_epoch = progress.is_last_batch or progress.current.ready >= trainer.num_training_batches
    return progress.current.ready % trainer.accumulate_grad_batches != 0 and not last_of_epoch


def is_logging_step(trainer: Trainer) -> bool:
    """True in ``on_train_batch_end`` if Lightning will pass the metrics of this optimizer step to the loggers."""
    untyped: Any = trainer
    interval = untyped.log_every_n_steps
    return interval > 0 and (trainer.should_stop or trainer.global_step % interval == 0)


def step_metrics(trainer: Trainer) -> dict[str, Any]:
    """What the current training step has logged so far, by name. Fallback: everything under ``train/``."""
    try:
        return dict(trainer._logger_connector.metrics["log"])
    except AttributeError:
        return {name: value for name, value in trainer.logged_metrics.items() if name.startswith("train/")}


def validation_follows(trainer: Trainer) -> bool:
    """True in ``on_train_batch_end`` if a scheduled validation comes next. Fallback: False.

    The validation that Lightning adds when a run is stopped early does not count: the same run without the stop has none.
    """
    loop: Any = trainer.fit_loop
    stop, trainer.should_stop = trainer.should_stop, False
    try:
        return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
    except AttributeError:
        return False
    finally:
        trainer.should_stop = stop


@contextmanager
def counters_of_last_batch(trainer: Trainer) -> Iterator[None]:
    """Within ``on_train_epoch_end``, set Lightning's progress counters back to the end of the epoch's last batch.

    A checkpoint with these continues with the next epoch. With those of an epoch's end Lightning runs the next epoch under
    the same number again, if ``max_steps`` alone ends the run. No fallback: without ``_batches_that_stepped`` it raises.
    """
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress

    def shift(by: int) -> None:
        for counts in ("current", "total"):
            getattr(epochs, counts).processed += by
            getattr(batches, counts).completed += by
        loop.epoch_loop._batches_that_stepped += by

    shift(-1)
    try:
        yield
    finally:
        shift(1)


def watch_fetching(trainer: Trainer, before: Callable[[], None], after: Callable[[], None]) -> bool:
    """Call ``before`` and ``after`` around each wait of the training loop for a batch; False if that is not possible.

    To be called in ``on_train_start``.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    start, stop = (getattr(type(loop), name, None) for name in ("_on_before_fetch", "_on_after_fetch"))
    if start is None or stop is None:
        return False

    def before_fetch() -> None:
        before()
        start(loop)

    def after_fetch() -> None:
        stop(loop)
        after()

    loop._on_before_fetch, loop._on_after_fetch = before_fetch, after_fetch
    return True


def cluster_environment(trainer: Trainer) -> Any:
    """How the processes were started: by Lightning, SLURM, torchrun. Fallback: unknown for a single process."""
    try:
        return trainer._accelerator_connector.cluster_environment
    except AttributeError:
        return getattr(trainer.strategy, "cluster_environment", None)


def set_csv_writer(logger: CSVLogger, writer: Any) -> None:
    """Replace the object that writes a logger's ``metrics.csv``; ``logger.experiment`` gives it back."""
    logger._experiment = writer


def use_data_parallelism_only(strategy: Any) -> None:
    """Have a ``ModelParallelStrategy`` use all processes for data parallelism; its constructor needs their number."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = strategy.num_nodes * strategy.num_processes, 1
