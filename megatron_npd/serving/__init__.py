"""vLLM servers: started, spoken to, refreshed."""
