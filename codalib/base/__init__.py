"""Files, folders, hardware, processes and seeds: what every room stands on."""
