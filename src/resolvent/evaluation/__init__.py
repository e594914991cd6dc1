"""Measuring what a model has learnt: how well it predicts, what it remembers, and how far back it looks."""

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
