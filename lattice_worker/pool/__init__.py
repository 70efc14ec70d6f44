"""The processes that run user code, as the agent sees them: they are forked by zygotes, reused by key, and ended."""
