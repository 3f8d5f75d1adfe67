"""Held-out questions, answers, metrics and their statistics."""
