"""Everything that uses LLaMA-Factory: its API, its processes, and their topology."""
