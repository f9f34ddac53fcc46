"""Programs that measure what the documents claim, on the machine that they run on."""
