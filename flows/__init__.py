"""Order, retry and schedule of the stages; no tensor is touched here."""
