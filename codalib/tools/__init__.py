"""What one types: the `codalib` command, a module for each or for two of its subcommands (`codalib --help`)."""
