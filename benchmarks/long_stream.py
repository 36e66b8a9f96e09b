"""Read a text of any length with a model that has a memory, and print what it costs and whether it still predicts: `python -m benchmarks.long_stream MODEL TEXT`.

The text is read again and again until so many tokens are read, in pieces of 1,024, with the state carried on. Printed per sixteenth: tokens read, tokens per second of
processor time, size of the state, growth of a sixteenth's peak memory over that of the first, and the mean loss of the tokens (nats), which rises where a memory fills up.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.timing import forget_peak, peak_bytes
from remanence.memory.lm_state import LMCache
from remanence.remembering import load_reader

PIECE, PARTS = 1024, 16


def read(model: str, text: str, tokens: int, *, say: bool = True) -> list[dict[str, float]]:
    """Read `tokens` tokens and return a row per sixteenth."""
    loaded = load_reader(model)
    ids = torch.tensor(loaded.processor(text, add_special_tokens=False)["input_ids"])
    forget_peak()
    cache, rows, done, peak = LMCache(), list[dict[str, float]](), 0, 0
    with torch.no_grad():
        for part in range(PARTS):
            begun, losses = time.process_time(), []
            end = tokens * (part + 1) // PARTS
            first = done
            while done < end:
                places = torch.arange(done, min(done + PIECE, end)) % len(ids)
                piece = ids[places][None]
                losses.append(float(loaded.model(input_ids=piece, labels=piece, cache=cache).loss) * len(places))
                done += len(places)
            now = peak_bytes()
            peak = peak or now
            forget_peak()
            seconds = time.process_time() - begun
            state = cache.state.bytes if cache.state is not None else 0
            row = {
                "tokens": done,
                "speed": (done - first) / seconds,
                "state": state,
                "growth": now - peak,
                "loss": sum(losses) / (done - first),
            }
            rows.append(row)
            if say:
                print(
                    f"{done:>10,} tokens  {row['speed']:>8,.0f} /s  state {state / 2**10:,.0f} KiB  peak +{row['growth'] / 2**20:.1f} MiB  loss {row['loss']:.3f}",
                    flush=True,
                )
    return rows


def main() -> None:
    """Read what the command line names."""
    reader = argparse.ArgumentParser(prog="python -m benchmarks.long_stream", description="A long text, read with a memory.")
    reader.add_argument("model", help="folder or hub id of a model with a memory")
    reader.add_argument("text", type=Path, help="a text file")
    reader.add_argument("--tokens", type=int, default=2_000_000)
    reader.add_argument("--out", type=Path, help="JSON of the rows")
    chosen = reader.parse_args()
    torch.set_num_threads(1)
    rows = read(chosen.model, chosen.text.read_text(encoding="utf-8"), chosen.tokens)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
