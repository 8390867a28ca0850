"""Text in several languages, from files or the hub, as sentences and as padded batches."""
