"""Scores of images against a reference, with a receipt of how they were measured."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mixar.errors import UserError
from mixar.evaluation.extractors import Extractor
from mixar.evaluation.receipt import distance_name, score_name
from mixar.evaluation.scores import (
    Features,
    Statistics,
    accumulate,
    frechet_distance,
    inception_score,
    precision_recall,
)


def evaluate(
    samples: Iterable[Tensor],
    reference: Iterable[Tensor] | Features | Statistics,
    extractor: Extractor,
    labels: Tensor | None = None,
    reconstructions: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score `samples` against `reference`. Of reconstructions and their originals, the distance is an rFID.

    Args:
        samples: batches uint8 [B, 3, H, W].
        reference: such batches, or their features or statistics; `Statistics` give no precision and recall.
        labels: int [n], the classes of the samples. With an extractor that knows the set's classes they give
            `accuracy`, the share of samples classified as their label.
        reconstructions: the samples are reconstructions of the reference; the name of the distance says so.
        progress: show bars.

    Returns:
        Plain values, ready for the receipt: `distance` {name, value}, `score` {name, mean, std}, `precision`, `recall`,
        `accuracy`, `n`, `per_class`, `digest` of the samples' pixels, `reference` {n, digest},
        `extractor` {label, description}.

    Raises:
        UserError: too few images, features of different extractors, or unequal numbers of labels and samples.
    """
    seen = accumulate(samples, extractor, "samples" if progress else None)
    if labels is not None and len(labels) != seen.n:
        raise UserError(f"{len(labels)} labels were given for {seen.n} samples: give one label per sample")
    if not isinstance(reference, Features | Statistics):
        reference = accumulate(reference, extractor, "reference" if progress else None)
    known = reference if isinstance(reference, Statistics) else reference.statistics()
    mean, std = inception_score(seen.logits)

    scores: dict[str, Any] = {
        "distance": {
            "name": distance_name(seen.label, seen.n, reconstructions),
            "value": frechet_distance(seen.statistics(), known),
        },
        "score": {"name": score_name(seen.label), "mean": mean, "std": std},
    }
    if isinstance(reference, Features):
        scores["precision"], scores["recall"] = precision_recall(seen, reference)
    if labels is not None:
        scores["per_class"] = {str(index): count for index, count in enumerate(labels.bincount().tolist()) if count}
        if extractor.classes is not None:
            scores["accuracy"] = (seen.logits.argmax(1) == labels.cpu()).double().mean().item()
    return scores | {
        "n": seen.n,
        "digest": seen.digest,
        "reference": {"n": known.n, "digest": known.digest},
        "extractor": {"label": extractor.label, "description": extractor.description},
    }
