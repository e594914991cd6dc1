"""Conversations with a trained model: an engine that batches requests, an HTTP server, a chat."""
