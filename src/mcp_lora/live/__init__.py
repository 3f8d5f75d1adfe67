"""Live MCP servers: their tools as a catalogue, rows that a teacher makes with them, and a chat."""
