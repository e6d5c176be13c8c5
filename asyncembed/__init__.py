"""asyncembed: streams of texts in, one embedding per text out."""
