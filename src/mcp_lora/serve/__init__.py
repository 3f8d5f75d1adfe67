"""Use an adapter: chat, exports, servers, and their parity with training."""
