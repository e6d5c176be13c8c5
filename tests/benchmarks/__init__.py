"""The benchmark behind `bin/bench`: whole jobs beside `SentenceTransformer.encode`, side by side."""
