"""Rollout: the student answers prompts on vLLM servers, launched here or given by URL, and spoken to over HTTP."""
