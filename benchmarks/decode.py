"""Decoding speed on the CPU against its peers, in one run: `python -m benchmarks.decode`.

Contestants are processes of their own that take turns, one round each, in an order that rotates: whatever else the machine
does hits all of them. Figures are medians over rounds, and ratios are medians of ratios within rounds, with their range.

    python -m benchmarks.decode                                            the bundled model
    python -m benchmarks.decode --model FOLDER --name gemma-3-270m --llama-python PYTHON --gguf FILE.gguf
    python -m benchmarks.decode --model gemma-3-4b --contestants ours:int8,ours:int4

Adds one entry to benchmarks/results/decode_cpu.json, under the model's name.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.environment import RESULTS, describe
from benchmarks.kernel_table import kernel_table
from benchmarks.synthetic import text_config
from gemma_opt import gemma
from gemma_opt.evaluation.perplexity import builtin_text

WORKER = (sys.executable, "-m", "benchmarks.decode_worker")
LLAMA_WORKER = Path(__file__).with_name("llama_worker.py")
BUNDLED = "small-gemma3"
DEFAULT = "ours:int8,ours:int4,ours:fp32,transformers:bf16,transformers:fp32"
LEADER = "ours:int8"  # ratios are its speed over the others'
TOGETHER = 8  # rows of the batched measurement


@dataclass(frozen=True)
class Round:
    """One turn. times: seconds from the start to each token; for several rows, each token is one of every row."""

    times: list[float]
    tokens: list[int]
    rows: int
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Tokens a second after the first, all rows together."""
        return self.rows * (len(self.times) - 1) / (self.times[-1] - self.times[0])

    @property
    def best_step_s(self) -> float:
        """The fastest single step."""
        return min(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))


class Contestant:
    """A worker process that measures on demand."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # ours
        self.rounds: list[Round] = []
        self.together: list[Round] = []
        self.prefills: list[float] = []
        self.weight_bytes: int = self._read()["weight_bytes"]  # type: ignore[assignment]

    def _read(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}")
        return json.loads(line)

    def run(self, prompt: list[int], tokens: int, rows: int = 1) -> Round:
        """One turn."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens, "rows": rows}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return Round(answer["times"], answer["tokens"], rows, answer["peak_bytes"])  # type: ignore[arg-type]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def main(
    model: Annotated[
        str, typer.Option(help="bundled name, base folder, GGUF file, or a published size: random weights")
    ] = "small-gemma3",
    name: Annotated[str | None, typer.Option(help="key in the result file; by default the model's name")] = None,
    contestants: Annotated[str, typer.Option(help="comma-separated; see benchmarks/decode_worker.py")] = DEFAULT,
    llama_python: Annotated[str | None, typer.Option(help="a Python that has llama-cpp-python")] = None,
    gguf: Annotated[Path | None, typer.Option(help="the same weights for llama.cpp, in any format: Q8_0 is made of it")] = None,
    threads: int = torch.get_num_threads(),
    prompt_tokens: int = 64,
    tokens: int = 64,
    long_prompt: Annotated[int, typer.Option(help="prompt of the prefill measurement")] = 512,
    rounds: int = 5,
    kernels: Annotated[bool, typer.Option(help="also time every product against the bytes it must read")] = True,
) -> None:
    """Measure, print a table, and add it to the result file."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = as_folder(model, folder)
        context = max(long_prompt, prompt_tokens) + tokens
        field = [
            Contestant(entry, [*WORKER, entry, source, str(threads), str(context)])
            for entry in ["bandwidth", *contestants.split(",")]
        ]
        if llama_python:
            field += [llama(llama_python, path, threads, context) for path in peers_of(llama_python, gguf, folder)]
        try:
            compete(field, prompt_ids(source, prompt_tokens), prompt_ids(source, long_prompt), tokens, rounds)
        finally:
            for contestant in field:
                contestant.close()
        result = summary(field, {"threads": threads, "prompt_tokens": prompt_tokens, "new_tokens": tokens, "rounds": rounds})
        if kernels:
            result["kernels"] = kernel_table(text_config(source), threads)
    show(result)
    file = RESULTS / "decode_cpu.json"
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    known[name or Path(model).stem] = result
    file.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


def as_folder(model: str, scratch: Path) -> str:
    """What workers are given: a folder that loads fast, or a published size's name."""
    if model in gemma.BUNDLED:
        return str(gemma.BUNDLED[model])
    if not model.endswith(".gguf"):
        return model
    base = gemma.load_base(
        gemma.BaseFiles(model, Path(model).parent, gguf=Path(model).name), torch.float32, torch.device("cpu")
    )
    base.model.save_pretrained(scratch / "base")
    base.processing.save(scratch / "base")
    return str(scratch / "base")


def peers_of(python: str, gguf: Path | None, scratch: Path) -> list[Path]:
    """The GGUF file itself, and its weights as Q8_0."""
    if gguf is None:
        raise typer.BadParameter("--llama-python needs --gguf")
    eight = scratch / "Q8_0.gguf"
    subprocess.run([python, str(LLAMA_WORKER), "quantize", str(gguf), str(eight)], check=True)
    return [eight, gguf]


def llama(python: str, path: Path, threads: int, context: int) -> Contestant:
    """llama.cpp on one file."""
    name = "llama.cpp:Q8_0" if path.stem == "Q8_0" else f"llama.cpp:{path.stem}"
    return Contestant(name, [python, str(LLAMA_WORKER), "serve", str(path), str(threads), str(context)])


def prompt_ids(source: str, count: int) -> list[int]:
    """`<bos>` and English text; random ids where there is no tokenizer."""
    folder = Path(source)
    if not folder.is_dir():
        return torch.randint(300, 200_000, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = gemma.load_processing(folder, gemma.read_config(folder)).tokenizer
    return [2, *tokenizer.encode(builtin_text()[: 12 * count], add_special_tokens=False)][:count]


def compete(field: list[Contestant], prompt: list[int], long_prompt: list[int], tokens: int, rounds: int) -> None:
    """Rounds in rotating order, after one that only warms up."""
    for turn in range(rounds + 1):
        for contestant in field[turn % len(field) :] + field[: turn % len(field)]:
            single = contestant.run(prompt, tokens)
            prefill = contestant.run(long_prompt, 1) if contestant.name != "bandwidth" else None
            batch = contestant.run(prompt, tokens, TOGETHER) if contestant.name.startswith("ours") else None
            if turn == 0:
                continue
            contestant.rounds.append(single)
            if prefill:  # not the bandwidth, whose two times are no tokens
                contestant.prefills.append(len(long_prompt) / prefill.times[0])
            if batch:
                contestant.together.append(batch)
                typer.echo(f"round {turn} {contestant.name}: {single.rate:.1f} tok/s", err=True)


def summary(field: list[Contestant], conditions: dict[str, int]) -> dict[str, object]:
    """Medians over rounds, and ratios within them."""
    memory, *racers = field
    copies, reads = zip(*(entry.times for entry in memory.rounds), strict=True)
    copy = 2 * memory.weight_bytes / statistics.median(copies) / 1e9
    read = memory.weight_bytes / statistics.median(reads) / 1e9
    leader = next((racer for racer in racers if racer.name == LEADER), racers[0])
    return {
        **conditions,
        "batch": 1,
        "environment": describe() | {"threads": conditions["threads"]},
        "copy_gb_s": copy,
        "read_gb_s": read,
        "rows": [row_of(racer, leader, copy) for racer in racers],
    }


def row_of(racer: Contestant, leader: Contestant, copy_gb_s: float) -> dict[str, object]:
    """One contestant's figures."""
    rate = statistics.median(entry.rate for entry in racer.rounds)
    ratios = [mine.rate / theirs.rate for mine, theirs in zip(leader.rounds, racer.rounds, strict=True)]
    prefills = [mine / theirs for mine, theirs in zip(leader.prefills, racer.prefills, strict=True)]
    moved = racer.weight_bytes * rate / 1e9
    row: dict[str, object] = {
        "contestant": racer.name,
        "tokens_per_second": rate,
        "best_step_ms": 1e3 * min(entry.best_step_s for entry in racer.rounds),
        "weight_bytes_per_token": racer.weight_bytes,
        "gb_s": moved,
        "share_of_copy": moved / copy_gb_s,
        "time_to_first_token_ms": 1e3 * statistics.median(entry.times[0] for entry in racer.rounds),
        "prefill_tokens_per_second": statistics.median(racer.prefills),
        "peak_bytes": max(entry.peak_bytes for entry in racer.rounds),
        f"{leader.name} over it": [min(ratios), statistics.median(ratios), max(ratios)],
        f"{leader.name} prefill over it": [min(prefills), statistics.median(prefills), max(prefills)],
        "first_tokens": racer.rounds[0].tokens[:16],
    }
    if racer.together:
        together = [batch.rate / single.rate for batch, single in zip(racer.together, racer.rounds, strict=True)]
        row[f"tokens_per_second_{TOGETHER}_rows"] = statistics.median(entry.rate for entry in racer.together)
        row[f"{TOGETHER} rows over 1"] = [min(together), statistics.median(together), max(together)]
    return row


def show(result: dict[str, object]) -> None:
    """The table for people."""
    typer.echo(f"memory: copy {result['copy_gb_s']:.1f} GB/s, read {result['read_gb_s']:.1f} GB/s; {result['threads']} threads")
    rows: list[dict[str, object]] = result["rows"]  # type: ignore[assignment]
    for row in rows:
        (ratio,) = (value for key, value in row.items() if key.endswith(" over it") and "prefill" not in key)
        eight = row.get(f"tokens_per_second_{TOGETHER}_rows")
        typer.echo(
            f"{row['contestant']:28} {row['tokens_per_second']:8.1f} tok/s {row['gb_s']:6.1f} GB/s "
            f"{row['share_of_copy']:6.1%} of copy, first token {row['time_to_first_token_ms']:7.1f} ms, "
            f"prefill {row['prefill_tokens_per_second']:7.0f} tok/s, peak {row['peak_bytes'] / 1e9:5.2f} GB, "  # type: ignore[operator]
            f"ours is {ratio[1]:5.2f}x" + (f", {TOGETHER} rows {eight:.0f} tok/s" if eight else "")  # type: ignore[index]
        )
    for entry in result.get("kernels", ()):  # type: ignore[attr-defined]
        typer.echo("  ".join(f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in entry.values()))


if __name__ == "__main__":
    typer.run(main)
