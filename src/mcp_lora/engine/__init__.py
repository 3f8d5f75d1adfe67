"""All that is asked of LLaMA-Factory: its API, its processes, and how many of them train together."""
