# SPDX-License-Identifier: Apache-2.0
"""Answers one prompt with plain and with speculative decoding, side by side in the terminal.

    python scripts/smollm2/side_by_side.py pretrained/smollm2-135m --prompt "Why is the sky blue?"

Both run in this process, one step of one at a time, each on a clock of its own: the one whose clock is behind is next. So
the columns grow as they would on two machines like this one.
"""

import argparse
import time

import torch
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel

from mtp_lightning import MTPModel

PROMPT = "Anna has 3 boxes with 12 apples each and gives 8 apples away. How many are left?"


class Runner:
    """One text while it is generated, with the seconds that it has taken."""

    def __init__(self, title: str, model: MTPModel, prompt: list[dict[str, str]], options: dict[str, object]) -> None:
        self.title = title
        self.seconds = 0.0
        self.finished = False
        self.stream = model.stream(prompt, **options)

    def advance(self) -> None:
        """Run until the next piece of text."""
        started = time.perf_counter()
        self.finished = next(self.stream, None) is None
        self.seconds += time.perf_counter() - started

    @property
    def rate(self) -> float:
        """Tokens a second so far."""
        return len(self.stream.token_ids) / max(self.seconds, 1e-9)

    def panel(self, width: int) -> Panel:
        """The text so far in a box."""
        steps = max(1, len(self.stream.accepted_per_step))
        foot = f"{self.rate:.1f} tokens/s, {len(self.stream.token_ids) / steps:.2f} tokens a step"
        return Panel(self.stream.text, title=self.title, subtitle=foot, width=width)


def main() -> None:
    """Run both and say what was gained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="saved folder, checkpoint file or hub id")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max_new_tokens", type=int, default=120)
    parser.add_argument("--num_masks", default="auto", help="a number, or auto (the default)")
    parser.add_argument("--base_model", default=None)
    parser.add_argument("--dtype", default="float32", help="float32: near ties, where texts may differ, are rare")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model = MTPModel.from_pretrained(args.model, base_model=args.base_model, dtype=args.dtype, device=args.device)
    num_masks = args.num_masks if args.num_masks == "auto" else int(args.num_masks)
    speculative = {"decoding": "quadratic", "num_masks": num_masks}
    prompt = [{"role": "user", "content": args.prompt}]
    for options in (speculative, {"decoding": "autoregressive"}):  # the first use of each prepares what the next ones reuse
        for _ in model.stream(prompt, max_new_tokens=8, **options):
            pass

    runners = [
        Runner("plain decoding", model, prompt, {"decoding": "autoregressive", "max_new_tokens": args.max_new_tokens}),
        Runner("several tokens a step", model, prompt, speculative | {"max_new_tokens": args.max_new_tokens}),
    ]
    console = Console()
    width = min(60, console.width // 2)
    console.print(f"[bold]{args.prompt}[/bold]")
    with Live(console=console, refresh_per_second=15, transient=False) as live:
        while running := [runner for runner in runners if not runner.finished]:
            min(running, key=lambda runner: runner.seconds).advance()
            live.update(Columns([runner.panel(width) for runner in runners]))
    plain, ours = runners
    equal = plain.stream.token_ids == ours.stream.token_ids
    verdict = "the same text" if equal else "texts differ where two tokens nearly tie"
    console.print(f"\n{ours.rate / plain.rate:.2f} times as fast; {verdict}")


if __name__ == "__main__":
    main()
