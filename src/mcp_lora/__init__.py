"""mcp-lora: tune a language model to call MCP tools, with LLaMA-Factory."""
