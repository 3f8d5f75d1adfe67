"""Held-out questions, answers, scores and their statistics."""
