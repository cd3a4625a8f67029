"""What one types: fetch, rehearse, bench and the rest of the `codalib` command."""
