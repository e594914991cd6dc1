"""Measures of trained models: loss on text, recall of a fact, and the influence of early tokens."""

from resolvent.evaluation.influence import Influences, measure_influence
from resolvent.evaluation.language import LanguageScore, evaluate_documents
from resolvent.evaluation.needle import NeedleScores, evaluate_needle
from resolvent.evaluation.positions import PositionScores, evaluate_positions
from resolvent.evaluation.switches import switched_off

__all__ = [
    "Influences",
    "LanguageScore",
    "NeedleScores",
    "PositionScores",
    "evaluate_documents",
    "evaluate_needle",
    "evaluate_positions",
    "measure_influence",
    "switched_off",
]
