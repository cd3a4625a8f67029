"""The paper's numbers and claims, sweeps and variants, the statistics behind a verdict."""
