"""``drorae analyze``: the paper's analyses of a checkpoint, as ``analysis.json`` and figures."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.tokenizer import Tokenizer
from training.distributed.device import resolve_device
from training.output.files import write_json
from training.studies.figures import draw_figures
from training.studies.measurements import BATCH_SIZE, analyze
from training.studies.summary import summarize

logger = logging.getLogger(__name__)


def analyze_command(
    checkpoint: str,
    data: Sequence[Path],
    output: Path,
    base_checkpoint: str | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
) -> dict[str, Any]:
    """``drorae analyze``: writes ``analysis.json`` and the figures under ``output``.

    Returns:
        The contents of ``analysis.json``.

    Raises:
        TrainingError, model.errors.ModelError: one sentence that names what is at fault.
    """
    place = resolve_device(device)
    tokenizer = Tokenizer.load(checkpoint, device=place, fusion="reference")
    base = None
    if base_checkpoint is not None:
        base = Tokenizer.load(base_checkpoint, device=place, fusion="reference")
    analysis = analyze(tokenizer, data, base, limit, batch_size)
    summary = summarize(analysis)
    summary["figures"] = draw_figures(analysis, output)
    write_json(output / "analysis.json", summary)
    logger.info("analyzed %d images", analysis.num_images)
    return summary
