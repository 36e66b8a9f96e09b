"""`remanence convomem`: which memory pays at which size; a thin shell over `recall_bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remanence.cli_recall import print_table
from remanence.errors import Mistake


def convomem(
    output: Annotated[Path, typer.Argument(help="Folder of the results; a run that was stopped goes on there.")],
    policy: Annotated[str, typer.Option(help="Memories beside full-context, separated by commas.")] = "blocks,bm25,own,hybrid-own",
    sizes: Annotated[str, typer.Option(help="Numbers of conversations in a history, separated by commas.")] = "1,2,5,10,20,40",
    source: Annotated[str, typer.Option(help="templates (made here), or published files: convomem, longmemeval, locomo.")] = "templates",
    data: Annotated[Path | None, typer.Option(help="File or folder of the published questions.")] = None,
    fillers: Annotated[Path | None, typer.Option(help="Folder of conversations without evidence (convomem).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per category and number of evidence messages.")] = None,
    packing: Annotated[str, typer.Option(help="standard: one history per question; batched: questions share histories.")] = "standard",
    model: Annotated[str, typer.Option(help="Who answers: hf:FOLDER, openai:MODEL@URL, or desk (a declared model of a reader).")] = "desk",
    judge: Annotated[str | None, typer.Option(help="Who judges; by default the model itself.")] = None,
    helper: Annotated[str | None, typer.Option(help="Who extracts, for extracted and blocks; by default the model itself.")] = None,
    price_in: Annotated[float, typer.Option(min=0, help="Dollars per million tokens read.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="Dollars per million tokens written.")] = 0.0,
    budget_usd: Annotated[float | None, typer.Option(help="Stop each memory once so much was spent.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Pieces that a retrieval hands over.")] = 20,
    until: Annotated[int, typer.Option(min=1, help="Conversations up to which a hybrid hands over everything.")] = 30,
    mem0: Annotated[str | None, typer.Option(help="Address of a mem0 server, for mem0.")] = None,
    embedder: Annotated[str, typer.Option(help="Of dense and own.")] = "sentence",
    seed: Annotated[int, typer.Option(min=0, help="Seed of questions and histories.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bars.")] = False,
) -> None:
    """Find out how much memory a growing history needs (ConvoMem): full context, extraction, blocks, retrieval, hybrids, and where each begins to pay.

    Example: `remanence convomem runs/convomem --policy blocks,own --sizes 1,10,30 --limit 2`
    """
    from remanence.recall_bench import compare_memories

    try:
        histories = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise Mistake("--sizes", f"'{sizes}' is no list of numbers", "write for example 1,10,30") from None
    chosen = [name.strip() for name in policy.split(",") if name.strip()]
    advice, table = compare_memories(
        chosen,
        sizes=histories,
        output=output,
        source=source,
        data=data,
        fillers=fillers,
        limit=limit,
        packing=packing,
        model=model,
        judge=judge,
        helper=helper,
        prices=(price_in, price_out),
        budget_usd=budget_usd,
        k=k,
        until=until,
        mem0=mem0,
        embedder=embedder,
        seed=seed,
        progress=not quiet,
    )
    rows = [
        (
            str(r["policy"]),
            str(r["size"]),
            str(r["n"]),
            f"{r['accuracy']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
            f"{r['cost']:.2g}",
            f"{r['p50_s']:.2g}",
        )
        for r in table
    ]
    print_table(("memory", "conversations", "n", "accuracy", "dollars a question", "seconds"), rows)
    print(advice, end="")
    print(output / "crossover.png")
