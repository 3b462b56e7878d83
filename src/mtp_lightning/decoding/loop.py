# SPDX-License-Identifier: Apache-2.0
"""Self-speculative decoding: draft, verify, accept. Lossless: the text is the base model's own, token for token.

Source: Samragh et al. 2025, §2.4. Quadratic decoding places a block after the verified token too, so that every step has a
full draft; the paper leaves it out of its count.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.decoding.execution.calibration import measure_step_costs
from mtp_lightning.decoding.execution.decode_cache import decode_cache, rounded_slots
from mtp_lightning.decoding.execution.grouped_attention import grouped
from mtp_lightning.decoding.execution.step import PARTS, Drafts
from mtp_lightning.decoding.execution.step_runner import GraphRunner, StepRunner
from mtp_lightning.decoding.limits import check_prompt, end_tokens, resolve_num_masks
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import PLAIN, usual_positions
from mtp_lightning.decoding.planning.draft_stats import DraftStats
from mtp_lightning.decoding.planning.text_lookup import LookupDraft
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.shortlist import Shortlist, shortlist_size
from mtp_lightning.decoding.step_plan import budgeted_plan, prompt_plan, step_plan
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.modeling.transformers_private import attention_kernel


class StepTokens(NamedTuple):
    """What a step gained.

    Attributes:
        tokens: the tokens, at least one: the kept draft tokens and the base model's own; cut after an end token.
        num_drafts: draft tokens that were verified.
    """

    tokens: list[int]
    num_drafts: int


class RowStep(NamedTuple):
    """What a step gained in one row of a batch.

    Attributes:
        row: number of the row.
        step: what it gained.
        finish_reason: ``stop`` after an end token, ``length`` at a limit; None: the row goes on.
    """

    row: int
    step: StepTokens
    finish_reason: str | None


def decode(
    model: MTPNetwork, prompt: Tensor, options: DecodingOptions, cache: RowCache | None = None
) -> Iterator[StepTokens]:
    """Decode one prompt and yield the tokens of each step as they are verified.

    Args:
        model: the model.
        prompt: token ids, [n] int64, n at least 1.
        options: how to decode.
        cache: ``RowCache(model.base, 1)``, to go on from what earlier calls left in it: what the prompt has in common with
            the text there is not fed again. It stays usable when the reader stops early. None: nothing is kept.

    Yields:
        What each step gained, together at most ``max_new_tokens``.

    Raises:
        UsageError: an empty prompt, one that does not fit the context, or a wrong option.
    """
    for steps in decode_rows(model, [prompt], options, cache):
        yield steps[0].step


@dataclass
class _Row:
    """A row that is being decoded.

    Attributes:
        number: its place in the batch that was given.
        length: verified tokens, the prompt's included.
        limit: how many it may have.
        drafts: draft tokens that wait to be verified.
        found: a draft from the text itself that is verified instead.
        going: whether it goes on. One that has finished stays in the batch only where shapes must not change.
    """

    number: int
    length: int
    limit: int
    drafts: int = 0
    found: LookupDraft | None = None
    going: bool = True


@torch.inference_mode()
def decode_rows(
    model: MTPNetwork,
    prompts: Sequence[Tensor],
    options: DecodingOptions,
    cache: RowCache | None = None,
    finished: Set[int] = frozenset(),
) -> Iterator[list[RowStep]]:
    """Decode several prompts together and yield what each step gained in each of them.

    Every row gains what it would gain alone. A row that has finished leaves the batch.

    Args:
        model: the model.
        prompts: token ids of each prompt, [n] int64, n at least 1.
        options: how to decode.
        cache: see ``decode``; with a single prompt.
        finished: rows that the reader wants no more of; looked at before each step.

    Yields:
        For each row that took part in the step what it gained.

    Raises:
        UsageError: an empty prompt, one that does not fit the context, or a wrong option.
    """
    J, device, B = resolve_num_masks(model, options), model.base.device, len(prompts)
    for prompt in prompts:
        check_prompt(len(prompt), model.context)
    seeds = row_seeds(options.seed, B)
    if len(seeds) != B:
        raise UsageError(f"seed must be an int or one for each of the {B} rows, got {len(seeds)}.")
    stop = end_tokens(model, options)
    rows = [_Row(r, len(p), min(len(p) + options.max_new_tokens, model.context)) for r, p in enumerate(prompts)]
    slots_ever = max(row.limit for row in rows) + (J + 1) ** 2
    choice = TokenChoice(options, seeds, device)
    budget, spent = None, PLAIN
    steps = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(decode_cache(model).use(model))
        choice.shortlist = draft_shortlist(model, options) if J else None
        graphs = options.compile and GraphRunner.takes(model, options)
        if graphs:
            decode_cache(model).drop_stale_graphs(model)
        if cache is not None:
            cache.rewind(prompts[0].tolist())
            if graphs:
                cache.reserve(rounded_slots(slots_ever), rounded_slots(slots_ever))
        elif graphs:
            cache = stack.enter_context(decode_cache(model).kv_cache(model, B, slots_ever))
        else:
            cache = RowCache(model.base, B)
        if graphs:
            cache.wipe()
        runner = (GraphRunner if graphs else StepRunner)(model, cache, choice, options.sampler_head)
        remaining = [prompt[held:].to(device) for prompt, held in zip(prompts, cache.lengths, strict=True)]
        tokens, draft_scores = torch.nn.utils.rnn.pad_sequence(remaining, batch_first=True), None
        room = _room(rows, J, runner.padded)
        if options.num_masks == "auto" and J and not model.is_sharded:
            budget = make_budget(model, options, B, graphs)
            budget.costs.batch = B, cache.capacity
            choice.confident = budget.coupled
            chained = options.sampler_head and model.sampler_head is not None
            budget.stops_early = budget.coupled and device.type == "cpu" and chained and not graphs
            spent = budget.first(room)
            if options.prompt_lookup and options.coupled:
                budget.read([prompt.tolist() for prompt in prompts])
        plan = prompt_plan(options.decoding, [len(each) for each in remaining], spent.masks if budget else room)
        while True:
            begin = time.perf_counter()
            c = plan.num_drafts
            cache.reserve(max(cache.lengths) + plan.layouts[0].size, slots_ever)
            if budget is not None:
                choice.least = budget.least
            out, read = runner.run(plan, tokens, draft_scores, [row.length for row in rows])
            steps += 1
            gained: list[RowStep] = []
            for r, (row, (kept, *found)) in enumerate(zip(rows, read, strict=True)):
                if not row.going:
                    continue
                layout = plan.layouts[plan.choice[r]]
                cache.lengths[r] += layout.last + 1 + kept
                new = found[: kept + 1]
                end = next((i for i, token in enumerate(new, 1) if token in stop), None)
                row.length += kept + 1
                reason = "stop" if end else "length" if row.length >= row.limit or steps == options.max_steps else None
                gained.append(RowStep(row.number, StepTokens(new[:end], plan.drafted[r]), reason))
                depth = min(layout.block_after(kept)[1], out.draft.tokens.shape[1])
                row.drafts = max(0, min(depth, row.limit - row.length - 1))
            was = [r for r, row in enumerate(rows) if row.going]
            if budget is not None:
                links = out.draft.tokens.shape[1]
                if steps > 1 and runner.was_graph is not None:
                    budget.observe(spent, links, time.perf_counter() - begin, runner.was_graph)
                budget.learn(
                    spent,
                    links,
                    [read[r][0] for r in was],
                    [plan.drafted[r] for r in was],
                    [rows[r].drafts for r in was],
                    [[part / PARTS for part in read[r][c + 2 :]] for r in was],
                    [read[r][1 : read[r][0] + 2] for r in was],
                )
            yield gained
            going = [
                r for r, each in zip(was, gained, strict=True) if each.finish_reason is None and each.row not in finished
            ]
            if not going:
                return
            accepted, own, draft = out.num_accepted, out.own, out.draft
            if len(going) < len(was) and runner.padded:
                if budget is not None:
                    budget.select([was.index(r) for r in going])
                for r in set(was) - set(going):
                    rows[r].going, rows[r].drafts, rows[r].found = False, 0, None
            elif len(going) < len(was):
                going = _filled(going)
                cache.keep_rows(going)
                rows = [rows[r] for r in going]
                index = torch.tensor(going, device=device)
                choice.select(index)
                if budget is not None:
                    budget.select(going)
                accepted, own = accepted.index_select(0, index), own.index_select(0, index)
                scores = None if draft.scores is None else draft.scores.index_select(0, index)
                draft = Drafts(draft.tokens.index_select(0, index), scores)
            room = _room(rows, J, runner.padded)
            if budget is None:
                plan = step_plan(options.decoding, [row.drafts for row in rows], room, runner.padded)
            else:
                live = [row for row in rows if row.going]
                spent = budget.choose(room, [row.drafts for row in live], [row.limit - row.length - 1 for row in live])
                for row, known in zip(live, budget.rows, strict=True):
                    row.found = known.found
                    row.drafts = len(row.found.tokens) if row.found else row.drafts
                plan = budgeted_plan([row.drafts for row in rows], spent, runner.padded)
            draft = _of_length(draft, plan.num_drafts)
            if plan.num_drafts:
                draft = _with_found(draft, [row.found for row in rows])
            tokens, draft_scores = torch.cat([own.gather(1, accepted[:, None]), draft.tokens], dim=1), draft.scores


def _of_length(draft: Drafts, count: int) -> Drafts:
    """So many draft tokens of each row; where there are fewer, what is added is not verified."""
    tokens, scores = draft.tokens[:, :count], None if draft.scores is None else draft.scores[:, :count]
    missing = count - tokens.shape[1]
    if missing > 0:
        tokens = F.pad(tokens, (0, missing))
        scores = None if scores is None else F.pad(scores, (0, 0, 0, missing))
    return Drafts(tokens, scores)


def _with_found(draft: Drafts, found: Sequence[LookupDraft | None]) -> Drafts:
    """The drafts of the rows whose text offers a better one put in place of those of their blocks."""
    count = draft.tokens.shape[1]
    lines = [[r, *(each.tokens + [0] * count)[:count]] for r, each in enumerate(found) if each is not None]
    if not lines:
        return draft
    numbers = torch.tensor(lines, device=draft.tokens.device)  # in one piece: a copy to the device waits
    return draft._replace(tokens=draft.tokens.index_copy(0, numbers[:, 0], numbers[:, 1:]))


def _room(rows: Sequence[_Row], num_masks: int, padded: bool) -> int:
    """Masks that a block may have: those past the last token that a row may still gain would be for nothing.

    They are fed all the same where shapes must not change.
    """
    return num_masks if padded else max(0, min(num_masks, max(row.limit - row.length for row in rows) - 2))


def _filled(going: list[int]) -> list[int]:
    """Rows that go on, ordered so that as many as can be stay in their places: ``[0, 3, 4] -> [0, 4, 3]``."""
    staying = {r for r in going if r < len(going)}
    moving = [r for r in going if r >= len(going)]
    return [r if r in staying else moving.pop() for r in range(len(going))]


@torch.inference_mode()
def calibrate(model: MTPNetwork, options: DecodingOptions) -> None:
    """Measure what steps cost where ``auto`` will ask for it, so that a clock that starts now does not count it.

    Args:
        model: the model.
        options: how to decode.

    Raises:
        UsageError: J outside 1..k.
    """
    if resolve_num_masks(model, options) and options.num_masks == "auto" and not model.is_sharded:
        with evaluating(model), decode_cache(model).use(model):
            make_budget(model, options, 1, options.compile and GraphRunner.takes(model, options))


def make_budget(model: MTPNetwork, options: DecodingOptions, num_rows: int, graphs: bool) -> Budget:
    """The planner of a batch; the costs of steps are measured once a model.

    Args:
        model: the model, its fused layers in use.
        options: how to decode.
        num_rows: rows of the batch.
        graphs: whether steps are graphs, which take other times.

    Returns:
        The planner.
    """
    shortlist = draft_shortlist(model, options)
    kind = graphs, model.unembed.vocab_size if shortlist is None else len(shortlist.tokens)
    if kind not in decode_cache(model).calibrations:
        single = TokenChoice(replace(options, logits_processor=None, repetition_penalty=1.0), [0], model.base.device)
        single.shortlist = shortlist
        decode_cache(model).calibrations[kind] = (
            measure_step_costs(model, single, usual_positions(model.num_masks)),
            DraftStats(model.num_masks),
        )
    costs, record = decode_cache(model).calibrations[kind]
    few = graphs and model.base.device.type == "cpu"  # there each shape takes seconds to compile
    return Budget(costs, record, model.num_masks, num_rows, options.decoding == "quadratic", options.coupled, few=few)


def draft_shortlist(model: MTPNetwork, options: DecodingOptions) -> Shortlist | None:
    """The tokens that drafts are chosen from.

    Args:
        model: the model, its fused layers in use.
        options: how to decode.

    Returns:
        The shortlist; None: the whole vocabulary.
    """
    vocab_size = model.unembed.vocab_size
    size = shortlist_size(model.label_counts, vocab_size, options.draft_vocabulary)
    return None if size == vocab_size or model.is_sharded else decode_cache(model).shortlist(model, size)


@contextlib.contextmanager
def evaluating(model: MTPNetwork) -> Iterator[None]:
    """Evaluation mode and a cache-friendly attention kernel; every module's own mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    kernel = attention_kernel(model.base)
    model.eval()
    if kernel == "flex_attention":  # a step's few queries gain nothing from it, and every cache length would be a compile
        capped = getattr(text_config(model.base), "attn_logit_softcapping", None) is not None
        model.base.set_attn_implementation("eager" if capped else "sdpa")
    try:
        with grouped(model.base):
            yield
    finally:
        for module in training:
            module.training = True
        if kernel == "flex_attention":
            model.base.set_attn_implementation(kernel)
