"""From text on disk to batches: `sources` reads documents, `shards` tokenises them once, `stream` deals them out."""
