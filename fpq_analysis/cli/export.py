"""`fpq-analyze export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpq_analysis.cli.app import Json, app, check_there, guarded, log, print_json


@app.command()
@guarded
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of a quantized run; or a run: its last one.")],
    to: Annotated[str, typer.Option(help="onnx or safetensors.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file. Default: beside the checkpoint.")] = None,
    model: Annotated[str | None, typer.Option(help="For your own network: package.module:factory.")] = None,
    json: Json = False,
) -> None:
    """A quantized network for other programs: ONNX (QDQ form), or integers, scales and zero points in safetensors.

    The ONNX file is compared with the network in onnxruntime before it is kept. Needs the packages of the extra
    "export": onnx, onnxscript, onnxruntime, safetensors.

    [bold]Examples[/bold]

      fpq-analyze export checkpoints/fpq --to onnx

      fpq-analyze export checkpoints/fpq/epoch_0010.pt --to safetensors --out fpq.safetensors
    """
    check_there(checkpoint)
    from fpq_analysis.runs import export as exports

    frame = exports.export(checkpoint, to, out=out, model=model)
    if json:
        print_json(frame)
        return
    row = frame.iloc[0]
    log(f"{row['file']}: {row['bytes']:,} bytes, {row['layers']} quantized layers")
    if "images" in frame:
        log(
            f"onnxruntime on {row['images']} random images: {100 * row['same_class']:.0f} % of the answers as in "
            f"PyTorch"
        )
        log(
            f"Difference of a logit, relative to their spread: typically {row['typical']:.1g}, at most "
            f"{row['largest']:.1g}"
        )
