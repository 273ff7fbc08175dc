"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_LOADING = "Model"

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Short name, hub id or local folder.", rich_help_panel=_LOADING),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=_LOADING)
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread a large model over GPUs: auto, balanced, balanced_low_0 or sequential.",
        rich_help_panel=_LOADING,
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=_LOADING)
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.", rich_help_panel=_LOADING)
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=_LOADING),
]
ImageOption = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", help="Your own picture; repeat for several in one prompt."),
]
PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="The question about --image.")]
MaxNewTokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Longest answer; by default the task's.")
]
RunArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN]", help="Run directory; by default the newest below runs/.", show_default=False
    ),
]


def parse_shares(option: str, text: str) -> list[float]:
    """Shares in (0, 1] with commas between, as in `0.1,0.2`; `UserError` for anything else."""
    from avlprof.errors import UserError

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0.0 < share <= 1.0 for share in found):
        raise UserError(f"{option} must be shares in (0, 1] with commas, as in 0.1,0.2,0.4, got '{text}'")
    return found
