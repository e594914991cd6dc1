"""Measuring what a model has learnt."""

from resolvent.evaluation.language import LanguageScore, evaluate_documents

__all__ = ["LanguageScore", "evaluate_documents"]
